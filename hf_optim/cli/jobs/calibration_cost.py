"""What a stage without training takes: memory on the device and the host, tokens, and forward passes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ...calibration.throughput import measure_flops_per_second
from ...data.token_sequences import sequence_length
from ...evaluation.reported import format_bytes
from ...recipes.composition import Stage
from ...toolkit import topology
from ...toolkit.topology.linear_layers import features
from .plan import Plan


def calibration_tokens(plan: Plan) -> int:
    """Return the tokens of the calibration data; 0 if no stage needs any, or if the model reads no tokens."""
    config = plan.source.config
    if not plan.needs_calibration or getattr(config.get_text_config(), "vocab_size", None) is None:
        return 0
    data = plan.recipe.calibration
    return (data.samples or 128) * sequence_length(config, None, data.seq_len)


def driver_of(plan: Plan, stage: Stage, model: Any) -> str:
    """Return the driver that a stage runs under: ``whole_model``, ``blockwise`` or ``streamed``."""
    driver = plan.recipe.driver
    if driver == "streamed":
        return driver
    # The driver finds the blocks of a model that cannot be traced without weights, once these are loaded.
    whole = not topology.known_blocks(model) or (stage.needs_data and topology.exchanged_state(model))
    return "whole_model" if driver == "whole_model" or whole else "blockwise"


def calibration_cost(plan: Plan, stage: Stage, model: Any, found: Mapping[str, Any]) -> dict[str, Any]:
    """Return the cost of a stage that does not train; ``found`` has the sizes of the model."""
    driver, width = driver_of(plan, stage, model), plan.width
    tokens = found["calibration_tokens"] if stage.needs_data else 0
    data = plan.recipe.calibration
    hidden = getattr(plan.source.config.get_text_config(), "hidden_size", None) or 0
    teacher = any(step.implements("calibrate") and step.needs_teacher() for step in stage.steps)
    kept = tokens * hidden * width * (3 if teacher else 1)
    rows = min(tokens, data.batch_size * sequence_length(plan.source.config, None, data.seq_len)) if tokens else 0
    inside = _inside_block(model, rows, width) if stage.needs_data else 0
    current = found["block_bytes"] if driver != "whole_model" else found["bytes_before"]
    on_device = current + inside
    if driver == "streamed":
        # The current block and the next one being read; or the modules outside the blocks, one at a time.
        weights = max(2 * found["block_bytes"], _largest_outside(model) * width + found["block_bytes"])
    else:
        weights = found["bytes_before"]
    host = weights + (0 if plan.recipe.spill is not None else kept)
    if plan.resolved_device.type == "cpu":
        # The outputs of a block replace those of the one before when all batches have passed.
        host += inside + (kept if driver == "blockwise" else 0)
    passes = 2 if stage.needs_data else 0
    rate = measure_flops_per_second(plan.resolved_device, torch.float32) if tokens else 1.0
    seconds = passes * 2.0 * found["parameters"] * tokens / rate
    return {
        "steps": [step.name for step in stage.steps],
        "kind": "calibration" if stage.needs_data else "without data",
        "driver": driver,
        "calibration_tokens": tokens,
        "activation_bytes": kept,
        "forward_seconds": round(seconds, 6),
        "device_bytes": on_device if plan.resolved_device.type != "cpu" else host,
        "host_bytes": host,
        "readable": _readable(stage, driver, tokens, seconds, on_device, plan),
    }


def _readable(stage: Stage, driver: str, tokens: int, seconds: float, on_device: int, plan: Plan) -> dict[str, str]:
    if not stage.needs_data:
        return {"calibration": f"no data needed ({driver})"}
    rows = {}
    if plan.resolved_device.type != "cpu":
        rows["calibration on the device"] = f"{format_bytes(on_device)} at once ({driver})"
    if not tokens:
        return {**rows, "calibration": f"as many examples as the data has, at most {plan.recipe.calibration.samples}"}
    time = f", {duration(seconds)} of forward passes here" if seconds else ""
    return {**rows, "calibration": f"{tokens:,} tokens{time} ({driver})"}


def _inside_block(model: Any, rows: int, width: int) -> int:
    """Return the bytes that one block takes beside its weights while a batch passes and its layers are solved for.

    ``rows`` are the tokens of a batch.

    Every linear keeps its output, and second-order techniques one Gram matrix in float32 for each input, a copy of the
    weight of the layer being solved, and its inverse.
    """
    layers = [features(layer) for name, layer in topology.linears(model).items() if _in_blocks(model, name)]
    per_block = max(1, len(topology.known_blocks(model)))
    outputs = sum(out for out, _ in layers) // per_block * rows * width
    grams = 4 * sum(columns**2 for _, columns in layers) // per_block
    solving = max((4 * (2 * out * columns + 2 * columns**2) for out, columns in layers), default=0)
    return outputs + grams + solving


def _in_blocks(model: Any, name: str) -> bool:
    return any(name.startswith(f"{block.name}.") for block in topology.known_blocks(model))


def _largest_outside(model: Any) -> int:
    """Return the weights of the largest parameter outside the blocks."""
    outside = [p.numel() for name, p in model.named_parameters() if not _in_blocks(model, name)]
    return max(outside, default=0)


def duration(seconds: float) -> str:
    """Return a rough duration as text: ``"about 3 min"``."""
    for unit, size in (("h", 3600), ("min", 60), ("s", 1)):
        if seconds >= size:
            return f"about {seconds / size:,.0f} {unit}"
    return "under a second"
