"""Calibration throughput, and the lower bound it is compared with, for the record."""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Sequence
from typing import Any

import torch

from ..runs.run import Run
from ..toolkit import topology
from .lower_bound import block_lower_bound

log = logging.getLogger(__name__)


def count_calibration_tokens(run: Run) -> int:
    """Return the tokens (or images, or whatever the main input counts) in one pass over the calibration data."""
    if run.data is None:
        return 0
    main = run.model.main_input_name
    shapes = [batch[main].shape for batch in run.data.batches if main in batch]
    return sum(shape[0] * (shape[1] if len(shape) == 2 else 1) for shape in shapes)


def summarize_throughput(run: Run, seconds: Sequence[float], passes: int, device: torch.device) -> dict[str, Any]:
    """Return ``blocks`` and ``seconds_per_block``; with data also ``tokens_per_second`` per block and its ``floor``.

    Args:
        run: the run, for its model and its calibration data.
        seconds: for each block calibrated in this process; blocks restored from a killed run are not counted.
        passes: passes of the calibration data through these blocks, in total.
        device: where the blocks ran.
    """
    if not seconds:
        return {"blocks": 0}
    mean = sum(seconds) / len(seconds)
    metrics: dict[str, Any] = {
        "blocks": len(seconds),
        "seconds_per_block": round(mean, 4),
        "slowest_block_seconds": round(max(seconds), 4),
    }
    if passes and (tokens := count_calibration_tokens(run)):
        metrics |= {"calibration_tokens": tokens, "tokens_per_second": round(tokens / mean, 1)}
        metrics |= _lower_bound(run, tokens, passes / len(seconds), device)
    return metrics


def _lower_bound(run: Run, tokens: int, passes: float, device: torch.device) -> dict[str, Any]:
    """Return the lower bound of the largest block: its operations, and its seconds at the rates measured here."""
    blocks = topology.blocks(run.model)
    try:
        trace = topology.trace(run.model)
    except Exception as error:
        # Tracing runs the forward of arbitrary models. The metric is optional, so a failure must not stop the run.
        log.debug("no lower bound of the calibration time: %s", error)
        return {}
    largest = max(blocks, key=lambda block: sum(p.numel() for p in block.module.parameters()))
    bound = block_lower_bound(trace, largest.name, tokens)
    rate, float32_rate = (measure_flops_per_second(device, dtype) for dtype in (run.model.dtype, torch.float32))
    return {
        "floor": {
            "passes_per_block": round(passes, 2),
            "forward_flops_per_pass": bound.forward,
            "second_order_flops": bound.second_order,
            "flops_per_block": passes * bound.forward + bound.second_order,
            "forward_seconds_per_block": round(passes * bound.forward / rate, 4),
            "seconds_per_block": round(bound.seconds(passes, rate, float32_rate), 4),
        }
    }


@functools.cache
def measure_flops_per_second(device: torch.device, dtype: torch.dtype) -> float:
    """Measure the operations per second of a matrix product on this device, in about 0.1 s or less."""
    size = 4096 if device.type == "cuda" else 1024
    a = torch.randn(size, size, device=device).to(dtype)
    (a @ a)[0, 0].item()
    best = 0.0
    for _ in range(3):
        started = time.perf_counter()
        (a @ a)[0, 0].item()
        best = max(best, 2 * size**3 / (time.perf_counter() - started))
    return best
