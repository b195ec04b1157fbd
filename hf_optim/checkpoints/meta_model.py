"""A model without weights, exactly as transformers would load it: class, dtypes, ties, conversions of names.

transformers itself loads the checkpoint, onto the meta device: it resolves the files, applies its renamings and
conversions, and says what is missing or of another shape, and no weight is read. What a checkpoint does not hold
(rotary frequencies, position ids) is then computed, as transformers computes it.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from ..errors import CheckpointError, ModelError, OptimError
from ..toolkit.checkpoint.model_config import load_config, model_class
from .hub import local_directory
from .read_errors import readable_errors
from .source import ModelSource, summarize_error


@dataclass(frozen=True)
class MetaModel:
    """A model without weights, and where its weights are.

    Attributes:
        model: every parameter and persistent buffer is on the meta device; other buffers are real, on the CPU.
        files: the safetensors shards.
        missing: names of parameters and buffers that the checkpoint does not have.
        unexpected: tensors of the checkpoint that the model has no place for.
    """

    model: PreTrainedModel
    files: tuple[Path, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]


def build(source: ModelSource) -> MetaModel:
    """The skeleton of a checkpoint. A Hub model is downloaded into the cache, unless it is there.

    Raises ``ModelError`` or ``CheckpointError``: no such model, pickles, truncated shards, tensors of another shape
    than the configuration says.
    """
    config = load_config(source.model, source.trust_remote_code, source.revision)
    dtype = source.dtype if source.dtype == "auto" else getattr(torch, source.dtype)
    files: list[Path] = []
    try:
        with readable_errors(source.model), _files_noted(files), _quiet():
            model, info = model_class(config).from_pretrained(
                source.model,
                dtype=dtype,
                use_safetensors=True,
                device_map={"": "meta"},
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                **source.arguments,
            )
    except OptimError:
        raise
    except (OSError, ValueError, RuntimeError) as error:
        raise ModelError(f"cannot load {source.model}: {summarize_error(error)}") from error
    for name, stored, built in sorted(info["mismatched_keys"], key=str):
        raise CheckpointError(
            f"{name} is {list(stored)} in {source.model}, and {type(model).__name__} with its config.json has "
            f"{list(built)}: the weights and the configuration belong to different models"
        )
    _compute_buffers(model)
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    missing = tuple(sorted(set(info["missing_keys"]) - tied))
    return MetaModel(model.eval(), tuple(files), missing, tuple(sorted(info["unexpected_keys"])))


def is_local(source: ModelSource) -> bool:
    """Whether the shards of a checkpoint are on this machine: a directory, or in the Hub's cache."""
    home = local_directory(source.model, source.revision)
    return home is not None and any(home.glob("*.safetensors"))


@contextlib.contextmanager
def _files_noted(files: list[Path]) -> Iterator[None]:
    """Note which files transformers resolves the checkpoint to."""
    from transformers import modeling_utils

    stock = modeling_utils._get_resolved_checkpoint_files

    def noting(*args: Any, **kwargs: Any) -> Any:
        found = stock(*args, **kwargs)
        files.extend(Path(path) for path in found[0] or ())
        return found

    modeling_utils._get_resolved_checkpoint_files = noting
    try:
        yield
    finally:
        modeling_utils._get_resolved_checkpoint_files = stock


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' progress bar and load report: nothing is loaded, and what is wrong is raised."""
    from transformers.utils import logging as theirs

    level, bars = theirs.get_verbosity(), theirs.is_progress_bar_enabled()
    theirs.set_verbosity(logging.ERROR)
    theirs.disable_progress_bar()
    try:
        yield
    finally:
        theirs.set_verbosity(level)
        if bars:
            theirs.enable_progress_bar()


def _compute_buffers(model: PreTrainedModel) -> None:
    """Compute the buffers that no checkpoint holds, by the initialization that transformers runs for them."""
    for name, buffer in list(model.named_non_persistent_buffers()):
        path, _, key = name.rpartition(".")
        holder = model.get_submodule(path)
        holder._buffers[key] = torch.empty_like(buffer, device="cpu")
        holder._is_hf_initialized = False  # type: ignore[assignment]
    model.initialize_weights()
