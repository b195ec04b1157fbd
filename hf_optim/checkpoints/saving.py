"""Saving: what stock ``save_pretrained`` writes for an optimized model.

The weights and ``config.json`` are written by transformers itself, through its own hooks (``model.hf_quantizer``, the
class of the model and of its configuration). This module wraps that call for models that have a run (``save_methods``):
the save is atomic, and the record, the card and the files that the steps export are written with it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist
from transformers import PreTrainedModel

from ..errors import CheckpointError
from ..runs.progress import stage
from ..runs.run import Run, find_run, require_sound
from ..runs.weight_digests import weight_digests
from ..toolkit import exits
from ..toolkit.distributed import collectives, fsdp
from ..toolkit.exits import ExitHeads, ExitSettings, exits_of, save_exits, store_settings, stored_settings
from ..trust import code
from . import save_methods
from .atomic import replace_directory, use_default_mode
from .hub import local_directory
from .source import find_processor, has_processor

# Measures the checkpoint in a directory.
Measure = Callable[[Path], Mapping[str, Any]]

# Configurations of tokenizers and processors, which may name code.
PROCESSOR_CONFIGS = (
    "tokenizer_config.json",
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
)
_WEIGHTS = re.compile(r"(model|pytorch_model|adapter_model|exits)[^/]*\.(safetensors|bin)(\.index\.json)?$")


def attach_save_methods(run: Run) -> None:
    """Make ``run.model.save_pretrained`` and ``push_to_hub`` write the record and the card too."""
    from .hub import push_to_hub

    save_methods.install(run.model, {"save_pretrained": _save_pretrained, "push_to_hub": push_to_hub})


def detach_save_methods(model: PreTrainedModel) -> None:
    """Undo ``attach_save_methods``; a model with exits still writes their file."""
    if exits_of(model) is None:
        save_methods.uninstall(model)


def attach_exit_save(model: PreTrainedModel) -> None:
    """Make ``save_pretrained`` of a model with exits write their file too, also without a run."""
    from .hub import push_to_hub

    save_methods.install(model, {"save_pretrained": _save_pretrained, "push_to_hub": push_to_hub})


def attach_exits(model: PreTrainedModel, settings: ExitSettings) -> ExitHeads:
    """Give a model exits, in place of those that it may have, and return them; ``save_pretrained`` writes them, too.

    Raises ``ModelError`` for a model without blocks, an encoder-decoder, and a block that the model has not.
    """
    made = exits.attach_exits(model, settings)
    attach_exit_save(model)
    return made


def save_exits_of(model: PreTrainedModel, directory: Path) -> None:
    """Write the file of a model's exits, if it has any, and their entry into its configuration, not yet to disk."""
    if exits_of(model) is not None:
        save_exits(model, directory)
    else:
        store_settings(model.config, None)  # of a model that a step has replaced


def save_plain(model: PreTrainedModel, directory: str | Path, **kwargs: Any) -> None:
    """Call transformers' own ``save_pretrained`` of a model, which may be optimized."""
    with stage("saving"):
        save_methods.call_former(model, "save_pretrained", directory, **kwargs)


def save(run: Run, directory: str | Path, *, measure: Measure | None = None, **kwargs: Any) -> Path:
    """Write the checkpoint of a finished run: weights, config, tokenizer, record, card. Atomic.

    Args:
        measure: measures the checkpoint before it is moved to ``directory``; the metrics go on the record and the card.
        kwargs: for the stock ``save_pretrained``.

    Raises ``CheckpointError`` if it cannot be written, or if pruned weights are no longer zero (an adapter was merged
    without the masks); the former content of ``directory`` is then untouched.
    """
    from ..compressed.packed.accelerate import make_savable
    from ..runs.masking import stray_weights

    directory = Path(directory)
    if stray := stray_weights(run):
        raise CheckpointError(_stray_message(run, stray))
    # A model that was quantized before the run may have been decoded by a forward since.
    make_savable(run.model)
    with replace_directory(directory, stale=is_weights) as beside:
        save_exits_of(run.model, beside)
        save_plain(run.model, beside, **kwargs)
        if run.tokenizer is None and not has_processor(directory):
            _write_source_processor(run.model, beside)
        describe(run, beside, measure)
    return directory


def _write_source_processor(model: PreTrainedModel, beside: Path) -> None:
    """Write the tokenizer or image processor of the checkpoint that a model was loaded from, if it is on this machine.

    A recipe without data loads none, and a checkpoint without one can be neither evaluated nor served. Code of a
    tokenizer is not run for it, and not referred to.
    """
    home = str(getattr(model.config, "_name_or_path", "") or "")
    found = local_directory(home) if home else None
    if found is None or not has_processor(found):
        return
    processor = find_processor(str(found), model.main_input_name)
    if processor is not None:
        processor.save_pretrained(beside)
        _drop_processor_code(processor, beside)


def _stray_message(run: Run, stray: list[str]) -> str:
    more = f" and {len(stray) - 1} more parameters have" if len(stray) > 1 else " has"
    if run.trained_alone:
        cause = "the model was trained without hf_optim's callbacks, which keep pruned weights at zero"
    else:
        cause = "the model was trained without hf_optim's callbacks, or adapters were merged without the masks"
    return (
        f"{stray[0]}{more} weights where they were pruned: {cause}. Train with hf_optim.OptimTrainer or "
        "Trainer(callbacks=hf_optim.callbacks(model)), merge adapters with hf_optim.merge_adapters(model), or give the "
        "zeros up with hf_optim.release(model)"
    )


def describe(run: Run, beside: Path, measure: Measure | None = None) -> None:
    """Write the other files of a finished run's checkpoint: tokenizer, files of the steps, record and card."""
    from ..evaluation.cards.card import Card
    from ..evaluation.sizes import bytes_on_disk

    if run.tokenizer is not None:
        run.tokenizer.save_pretrained(beside)
    drop_unused_code(run, beside)
    after = run.record.measured.setdefault("after", {})
    after["bytes_on_disk"] = bytes_on_disk(beside)
    run.record.weights = weight_digests(beside)
    card = Card(run.record, beside)
    run.call_on(run.recipe.steps, "export", directory=beside, card=card)
    run.record.write(beside)
    if measure is not None and (metrics := measure(beside)):
        after |= metrics
        run.record.write(beside)
    card.write(beside)


def drop_unused_code(run: Run, directory: Path) -> None:
    """Remove references to code from the configurations that a run wrote, where a stock class wrote them.

    A stock class keeps the ``auto_map`` of the checkpoint that it was loaded from, although it does not run that code;
    a caller who loads the result with ``trust_remote_code=True`` would. Models and tokenizers whose own code was
    trusted keep their references, and models of generated classes those to the code that is written with them.
    """
    from .remote_code import written_code

    written = written_code(run.model)
    if written is not None or (code.is_stock(run.model) and _has_stock_parts(run.model.config)):
        for name in ("config.json", "generation_config.json"):
            code.drop_references(directory / name, written.auto_map if written is not None else None)
    if run.tokenizer is not None:
        _drop_processor_code(run.tokenizer, directory)


def _drop_processor_code(processor: Any, directory: Path) -> None:
    if _has_stock_parts(processor):
        for name in PROCESSOR_CONFIGS:
            code.drop_references(directory / name)


def _has_stock_parts(thing: Any) -> bool:
    """Return True if a configuration, tokenizer or processor and the ones that it holds have stock classes."""
    parts = [part for part in vars(thing).values() if hasattr(part, "save_pretrained")]
    return all(code.is_stock(part) for part in (thing, *parts))


def is_weights(name: str) -> bool:
    """Return True for a file of a checkpoint that holds weights, or that is an index of such files."""
    return bool(_WEIGHTS.match(name))


def _save_pretrained(model: PreTrainedModel, save_directory: Any, *args: Any, **kwargs: Any) -> None:
    """Save with transformers' own method; the record, the card and the steps' files are written beside."""
    run = find_run(model)
    if run is None:
        _save_with_exits(model, save_directory, *args, **kwargs)
        return
    main = args[0] if args else kwargs.get("is_main_process", True)
    require_sound(run)
    shared = collectives.world_size() > 1 and fsdp.has_sharded_parameters(model)
    if not main or (shared and collectives.rank()):  # transformers gathers on all ranks, and writes on the first one
        save_methods.call_former(model, "save_pretrained", save_directory, *args, **kwargs)
        if shared:
            dist.barrier()
        return
    if args:
        kwargs["is_main_process"] = main
    push = kwargs.pop("push_to_hub", False)
    if run.finished:
        save(run, save_directory, **kwargs)
    else:
        # A checkpoint in mid-training: plain and quick, and marked as unfinished by its record.
        if stored_settings(model.config) is not None:
            Path(save_directory).mkdir(parents=True, exist_ok=True)
            save_exits_of(model, Path(save_directory))
        save_plain(model, save_directory, **kwargs)
        use_default_mode(path for path in Path(save_directory).iterdir() if is_weights(path.name))
        drop_unused_code(run, Path(save_directory))
        run.record.write(Path(save_directory))
    if shared:
        dist.barrier()  # no rank goes on before the whole checkpoint is in its place
    if push:
        model.push_to_hub(kwargs.get("repo_id", Path(save_directory).name), token=kwargs.get("token"))


def _save_with_exits(model: PreTrainedModel, save_directory: Any, *args: Any, **kwargs: Any) -> None:
    """Save a model without a run, with transformers' own method, and the file of its exits."""
    main = args[0] if args else kwargs.get("is_main_process", True)
    if main:
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        save_exits_of(model, Path(save_directory))
    save_methods.call_former(model, "save_pretrained", save_directory, *args, **kwargs)
