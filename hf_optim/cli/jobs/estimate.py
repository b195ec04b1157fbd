"""Estimate the cost and the result of a recipe from the configuration of a model; no weights are downloaded."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedConfig

from ...calibration.throughput import measure_flops_per_second
from ...data.token_sequences import sequence_length
from ...evaluation.reported import format_bytes
from ...recipes.config import OptimConfig
from ...recipes.traits import FLOAT_WEIGHTS, QUANTIZED, Trait
from ...runs.scope import Scope
from ...toolkit import topology
from ...toolkit.checkpoint.model_config import build_meta_model
from ...toolkit.quantization.grids import fit_group_size


def traits_of_config(config: PreTrainedConfig) -> set[Trait]:
    """Return the traits of a model before optimization, as far as its configuration determines them."""
    return {QUANTIZED} if getattr(config, "quantization_config", None) is not None else {FLOAT_WEIGHTS}


def bytes_per_weight(config: PreTrainedConfig) -> int:
    """Return the bytes of a weight in the dtype of a configuration; of float32 if that names none."""
    dtype = getattr(config, "dtype", None)  # a value of config.json, which may be anything
    return (dtype if isinstance(dtype, torch.dtype) else torch.float32).itemsize


def estimate(recipe: OptimConfig, config: PreTrainedConfig, trust_remote_code: bool = False) -> dict[str, Any]:
    """Estimate parameters, bytes before and after, and memory and time of calibration.

    ``readable`` has the same numbers as text. ``bytes_after`` is None if a step changes the architecture, since the
    configuration then does not determine the result. The time is that of the forward passes only, at the float32 rate
    of this machine: two passes of the calibration tokens, two operations per parameter and token. Code that comes with
    the model runs only with ``trust_remote_code``.
    """
    model = build_meta_model(config, trust_remote_code)
    width = bytes_per_weight(config)
    parameters = sum(p.numel() for p in model.parameters())
    changed = any(step.changes_architecture() for step in recipe.steps)
    stored = None if changed else _stored_bytes(recipe, model, width)
    block = max((sum(p.numel() for p in b.module.parameters()) for b in topology.blocks(model)), default=parameters)
    tokens = _calibration_tokens(recipe, config)
    seconds = 2 * 2.0 * parameters * tokens / measure_flops_per_second(_device(), torch.float32) if tokens else 0.0
    return {
        "class": type(model).__name__,
        "parameters": parameters,
        "bytes_before": parameters * width,
        "bytes_after": stored,
        "block_bytes": block * width,
        "calibration_tokens": tokens,
        "calibration_seconds": round(seconds, 3),
        "readable": {
            "parameters": f"{parameters:,}",
            "weights on disk": f"{format_bytes(parameters * width)} -> "
            + ("depends on the new architecture" if stored is None else format_bytes(stored)),
            "on the accelerator at once": f"{format_bytes(block * width)} of weights (the largest block)",
            "calibration": f"{tokens:,} tokens, {_duration(seconds)} of forward passes here" if tokens else "no data",
        },
    }


def _stored_bytes(recipe: OptimConfig, model: torch.nn.Module, width: int) -> int:
    total = sum(p.numel() for p in model.parameters()) * width
    step = next((s for s in reversed(recipe.steps) if QUANTIZED in s.contract().adds), None)
    bits = getattr(step, "bits", None)
    if step is None or bits is None:
        return total
    selected = Scope("", model, model).select(getattr(step, "targets", ("Linear",)), getattr(step, "skip", ()))  # type: ignore[arg-type]
    for module in selected.values():
        if not isinstance(module, torch.nn.Linear):
            continue
        rows, columns = module.weight.shape
        group_size = getattr(step, "group_size", None)
        groups = columns // fit_group_size(columns, group_size) if group_size else 1
        total += rows * (_packed_bytes(columns, bits) + groups * width - columns * width)
    return total


def _packed_bytes(columns: int, bits: int) -> int:
    """Return the bytes of a row: one per value at 8 bits, below that packed into 32-bit words."""
    return columns if bits == 8 else 4 * -(-columns * bits // 32)


def _calibration_tokens(recipe: OptimConfig, config: PreTrainedConfig) -> int:
    if not any(stage.needs_data for stage in recipe.stages) or getattr(config, "vocab_size", None) is None:
        return 0
    return (recipe.calibration.samples or 128) * sequence_length(config, None, recipe.calibration.seq_len)


def _duration(seconds: float) -> str:
    for unit, size in (("h", 3600), ("min", 60), ("s", 1)):
        if seconds >= size:
            return f"about {seconds / size:,.0f} {unit}"
    return "under a second"


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
