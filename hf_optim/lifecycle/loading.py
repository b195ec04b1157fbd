"""From a recipe and a model to an optimized model: ``from_pretrained(optim_config=...)`` and ``optimize``."""

from __future__ import annotations

import functools
import logging
import os
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from ..checkpoints.read_errors import readable_errors
from ..checkpoints.source import name_of_load
from ..compressed.packed.accelerate import kernels_for
from ..compressed.packed.loader import with_packed_quantizer
from ..errors import DataError, ModelError, RecipeError
from ..recipes.composition import step_label
from ..recipes.config import OptimConfig
from ..recipes.contract import OnRanks
from ..recipes.technique import Technique
from ..runs.acceptance import require_in_memory_map, require_model, require_runnable
from ..runs.progress import stage
from ..runs.run import Run, traits_of, traits_of_config
from ..runs.stored_zeros import KnownZeros, known_zeros
from ..toolkit.checkpoint.model_config import own_configs
from ..toolkit.checkpoint.placement import NewHeads, load_placed
from ..toolkit.checkpoint.safetensors import UnsupportedCheckpoint
from ..toolkit.checkpoint.stock_errors import explained
from ..toolkit.checkpoint.stored_codes import require_known_format
from ..toolkit.distributed.fsdp import has_sharded_parameters
from ..toolkit.offloading import offload_plan
from ..trust.lookup import Where
from .load_arguments import (
    LOOKUP,
    apply_prepared,
    check_files,
    given_experts,
    has_other_layers,
    prepared_load,
    refuse_data_fields,
    resolve_config,
    restrict,
)
from .offloaded import (
    PackedBlocks,
    compute_device,
    offload_finished,
    offload_loaded,
    offloading_step,
    report_plan,
)
from .stages import attach_model, require_data, run_stages, start_run
from .step_checks import require_supported_steps
from .stored_exits import attach_exits, find_exits
from .tensor_parallel import divides, load_part, requested

log = logging.getLogger(__name__)

AUTO = "auto"


def load(
    cls: type[PreTrainedModel],
    stock: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    optim_config: Any,
) -> Any:
    """Load a model with the stock ``from_pretrained``, optimize it, and run the result on kernels.

    In addition to the arguments of the stock method, which are passed through, it accepts ``calibration=`` (anything
    that ``optimize`` accepts) and ``tokenizer=``.
    """
    calibration, tokenizer = kwargs.pop("calibration", None), kwargs.pop("tokenizer", None)
    restrict(kwargs)
    if isinstance(optim_config, str) and optim_config == AUTO:
        return _load_auto(cls, stock, args, kwargs)
    from ..toolkit.experts import detach_experts

    recipe = OptimConfig.parse(optim_config)
    _refuse_streamed(recipe)
    offloading = offloading_step(recipe)
    require_in_memory_map(kwargs.get("device_map"))
    chosen_experts = given_experts(kwargs)
    source = args[0] if args else kwargs.pop("pretrained_model_name_or_path", None)
    config, kwargs = resolve_config(cls, source, kwargs)
    refuse_data_fields(kwargs, config)
    run = start_run(recipe, config)
    run.tokenizer, run.loading, run.loaded_class = tokenizer, True, cls
    # Everything that can be refused is refused here, before a weight is read.
    recipe.check(traits_of_config(config))
    require_data(run, calibration)
    kwargs |= prepared_load(run, kwargs)
    if divides(recipe, run.config, kwargs) and getattr(run.config, "quantization_config", None) is not None:
        # Each rank loads its part of the packed weights, which leaves nothing to do for a step that changes none.
        return _load_auto(cls, stock, (source, *args[1:]), {**kwargs, "config": run.config})
    files = check_files(source, run.config, kwargs)
    trains = any(stage.trains for stage in recipe.stages)
    wants_info = kwargs.pop("output_loading_info", False)
    if offloading is not None and len(recipe.steps) == 1 and files:
        try:
            return _load_offloaded(run, offloading, stock, source, args, files, kwargs, wants_info)
        except UnsupportedCheckpoint as reason:
            log.info("loaded as a whole, then offloaded, since %s", reason)
    new_heads = NewHeads.ALL if trains else NewHeads.CLASSIFIERS
    model, info = _load_placed(stock, source, args, run.config, files, kwargs, new_heads)
    run.loading = False
    attach_exits(model, source, kwargs)
    zeros = _stored_zeros(model, source, kwargs)
    recipe.check(traits_of(model) | zeros.traits)  # what its configuration alone does not show
    attach_model(run, model, source, kwargs.get("revision"), zeros)
    if files:
        run.record.measured["before"] = {"bytes_on_disk": sum(path.stat().st_size for path in files)}
    model = run_stages(run, calibration)
    if run.stage is None:
        _put_on_kernels(model)
        if chosen_experts is not None:
            detach_experts(model)
        offload_finished(run, model)
    return (model, info) if wants_info else model


def _load_offloaded(
    run: Run,
    step: Technique,
    stock: Callable[..., Any],
    source: Any,
    args: tuple[Any, ...],
    files: tuple[Path, ...],
    kwargs: dict[str, Any],
    wants_info: bool,
) -> Any:
    """Load a checkpoint whose blocks go where a step wants them, one after the other.

    Raises ``UnsupportedCheckpoint`` for a compressed one that cannot be packed block by block.
    """
    settings = dict(step.offloading() or {})
    device = compute_device(kwargs.get("device_map"))
    packed = None
    if require_known_format(run.config, str(source)) is not None or kwargs.get("quantization_config") is not None:
        if kwargs.get("quantization_config") is not None:
            raise UnsupportedCheckpoint("the call specifies how to load it")
        packed = with_packed_quantizer(run.config, kwargs.get("key_mapping"), deferred=True)
    given = {**kwargs, "device_map": {"": "meta"}}
    model, info = _load_placed(stock, source, args, run.config, files, given, NewHeads.NONE, packed)
    model.eval()
    run.loading = False
    attach_model(run, model, source, kwargs.get("revision"), _stored_zeros(model, source, kwargs))
    run.record.measured["before"] = {"bytes_on_disk": sum(path.stat().st_size for path in files)}
    converter = PackedBlocks(kernels_for(model)) if packed is not None else None
    try:
        model = offload_loaded(model, files, settings, device, converter, lambda: run_stages(run))
    except ModelError as error:
        raise ModelError(f"{run.label(step)}: {error}") from error
    report_plan(run, step, offload_plan(model))
    return (model, info) if wants_info else model


def optimize(
    model: PreTrainedModel,
    config: Any,
    calibration: Any = None,
    *,
    tokenizer: Any = None,
    device: torch.device | str | None = None,
    journal: Any = None,
    kernels: bool = False,
    dense: bool = False,
    announce: bool = True,
) -> PreTrainedModel:
    """Optimize a model that is in memory.

    Unlike ``from_pretrained``, it leaves ordinary layers (dequantized weights) unless ``kernels`` is set. It cannot
    tell weights of a checkpoint from random ones: what stock transformers did not find in the files of a model that
    was loaded without ``optim_config``, it has named in a warning only.

    Args:
        model: the model; it is changed in place, unless a step replaces it by a model of another class.
        config: the recipe: an ``OptimConfig``, a technique, a list of techniques or mappings, a mapping, the path of a
            YAML or JSON file, or the name of a shipped recipe.
        calibration: calibration data: a ``datasets.Dataset``, a list of texts, token ids ``[n, seq_len]`` (int64), a
            list of batches (mappings of tensors), a ``DataLoader``, a file or Hub id; None for what the recipe names.
        tokenizer: needed for texts; None loads the one of the model's own checkpoint.
        device: where blocks are calibrated; None for where the model is.
        journal: a ``BlockJournal`` that keeps completed blocks, so that a killed calibration can resume.
        kernels: run the finished model on kernels, as ``from_pretrained`` does (see ``hf_optim.accelerate``).
        dense: the caller will save the weights uncompressed (``hf-optim compress --dense``), so that stock transformers
            need not be able to load the compressed format for this class of model.
        announce: log how a model whose recipe waits for training is trained, and warn if it is trained otherwise; False
            for a caller that trains it itself.

    Returns:
        The optimized model. After a recipe with a training stage it is ready to be trained: give it to
        ``OptimTrainer``, or to a stock ``Trainer`` with ``hf_optim.callbacks(model)``.

    Raises:
        RecipeError, DataError, ModelError, NumericalError: see ``hf_optim.errors``.
    """
    recipe = OptimConfig.parse(config)
    _refuse_streamed(recipe)
    require_model(model)
    own_configs(model)
    find_exits(model)
    run = start_run(recipe, model.config)
    run.tokenizer, run.journal, run.dense, run.announce = tokenizer, journal, dense, announce
    run.device = torch.device(device) if device is not None else None
    zeros = known_zeros(model)
    recipe.check(traits_of(model) | zeros.traits)
    _refuse_shards(recipe, model)
    try:
        require_data(run, calibration)
    except DataError:
        require_supported_steps(recipe, model, dense=dense)  # no data would help a model that a step refuses
        raise
    apply_prepared(run, model)
    attach_model(run, model, getattr(model.config, "_name_or_path", None), zeros=zeros)
    model = run_stages(run, calibration)
    if kernels and run.finished:
        _put_on_kernels(model)
    offload_finished(run, model)
    return model


def _stored_zeros(model: PreTrainedModel, source: Any, kwargs: Mapping[str, Any]) -> KnownZeros:
    """Return the zeros that the record of a checkpoint tells of, wherever it was found."""
    if source is None:
        return known_zeros(model)
    lookup = {key: kwargs.get(key) for key in LOOKUP if key not in ("subfolder", "force_download")}
    return known_zeros(model, Where(os.fspath(source), kwargs.get("subfolder") or "", lookup))


def _refuse_streamed(recipe: OptimConfig) -> None:
    if recipe.driver == "streamed":
        raise RecipeError(
            "driver streamed never holds the whole model in memory, so it cannot return one: run "
            "`hf-optim compress MODEL --recipe R --output D --driver streamed` and load what it writes, or leave the "
            "driver out"
        )


def _refuse_shards(recipe: OptimConfig, model: PreTrainedModel) -> None:
    """Raise ``ModelError`` for weights in shards (FSDP2) that a step says it cannot work with."""
    if not has_sharded_parameters(model):
        return
    for number, step in enumerate(recipe.steps):
        if step.spec.parallel.fsdp is OnRanks.NO:
            raise ModelError(
                f"{step_label(number, step)}: the weights are in shards (FSDP2), and {step.name} needs them whole: "
                "train on one device or with DDP (`hf-optim list` says what each technique can do on ranks)"
            )


def _put_on_kernels(model: PreTrainedModel) -> None:
    """Run a finished model on kernels. Kernels were not asked for explicitly: log unsupported layers.

    Of a model with floating-point weights that is news for few: an N:M pattern has kernels on some devices only, and
    such a model may be trained next.
    """
    from ..compressed.packed.accelerate import accelerate
    from ..compressed.packed.codebook_layers import codebook_linears
    from ..compressed.packed.packed_linear import KernelWarning

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", KernelWarning)
        accelerate(model)
    compressed = any(hasattr(module, "quantization_scheme") for module in model.modules()) or codebook_linears(model)
    for warning in caught:
        log.log(logging.WARNING if compressed else logging.INFO, "%s", warning.message)


def _load_auto(cls: Any, stock: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Load a checkpoint unchanged; run its compressed layers on kernels, and its experts with their capacity."""
    from ..compressed.packed.accelerate import accelerate
    from ..compressed.packed.checkpoint_formats import (
        UNAPPLIED_CACHE,
        require_divisible_inputs,
        unapplied_cache_scheme,
        unapplied_cache_warning,
    )
    from ..compressed.packed.packed_linear import KernelWarning
    from ..toolkit.experts import attach_experts, attach_stored_settings, detach_experts
    from ..toolkit.packing import attach_stored_packing

    wants_info = kwargs.pop("output_loading_info", False)
    chosen_experts = given_experts(kwargs)
    source = args[0] if args else kwargs.pop("pretrained_model_name_or_path", None)
    with readable_errors(source):
        config, kwargs = resolve_config(cls, source, kwargs)
        files = check_files(source, config, kwargs)
    quantized = require_known_format(config, str(source)) is not None or kwargs.get("quantization_config") is not None
    new_heads = NewHeads.NONE if quantized else NewHeads.CLASSIFIERS
    request = requested(kwargs, config, quantized)
    try:
        if request is not None:

            def load_packed(given: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
                packed = with_packed_quantizer(config, kwargs.get("key_mapping"))
                return _load_placed(stock, None, args, config, files, given, new_heads, packed)

            model, info = load_part(request, load_packed, source, config, files, kwargs)
            attach_experts(model)
            return (model, info) if wants_info else model
        if any(kwargs.get(key) is not None for key in ("quantization_config", "state_dict")):
            raise UnsupportedCheckpoint("the call specifies how to load it")
        packed = with_packed_quantizer(config, kwargs.get("key_mapping"))
        model, info = _load_placed(stock, source, args, config, files, kwargs, new_heads, packed)
    except UnsupportedCheckpoint as reason:
        log.debug("loaded by stock transformers, since %s", reason)
        with explained(str(reason) if quantized else ""):
            model, info = _load_placed(stock, source, args, config, files, kwargs, new_heads)
        require_runnable(model)
        require_divisible_inputs(model)
        accelerate(model)
    if kind := unapplied_cache_scheme(model, config):
        vars(model)[UNAPPLIED_CACHE] = kind
        warnings.warn(unapplied_cache_warning(kind), KernelWarning, stacklevel=4)
    attach_stored_settings(model)
    (attach_experts if chosen_experts is None else detach_experts)(model)
    attach_exits(model, source, kwargs)
    attach_stored_packing(model)
    return (model, info) if wants_info else model


def _load_placed(
    stock: Callable[..., Any],
    source: Any,
    args: tuple[Any, ...],
    config: PreTrainedConfig,
    files: Iterable[Path] | None,
    kwargs: Mapping[str, Any],
    new_heads: NewHeads,
    packed: PreTrainedConfig | None = None,
) -> tuple[Any, dict[str, Any]]:
    """Load with the stock method, and refuse a checkpoint that does not give every tensor of the model its values.

    ``packed`` is the configuration to load with if it is not ``config``, that of the checkpoint.
    """
    given = dict(kwargs)
    ignore = bool(given.pop("ignore_mismatched_sizes", False))
    bound = functools.partial(stock, source, *args[1:], config=config if packed is None else packed, **given)
    with readable_errors(source), stage(name_of_load(source)):
        return load_placed(
            bound,
            config,
            files if files is not None else kwargs.get("state_dict") or {},
            source,
            new_heads=new_heads,
            ignore_mismatched_heads=ignore,
            changed_config=has_other_layers(source, config, kwargs),
        )
