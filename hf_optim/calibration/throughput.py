"""How fast a calibration was beside the least it could take: figures for the record."""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Sequence
from typing import Any

import torch

from ..runs.run import Run
from ..toolkit import topology
from .floor import block_lower_bound

log = logging.getLogger(__name__)


def count_calibration_tokens(run: Run) -> int:
    """Tokens (or pictures, or whatever the main input has) of one pass over the calibration data."""
    if run.data is None:
        return 0
    main = run.model.main_input_name
    shapes = [batch[main].shape for batch in run.data.batches if main in batch]
    return sum(shape[0] * (shape[1] if len(shape) == 2 else 1) for shape in shapes)


def summarize_throughput(run: Run, seconds: Sequence[float], passes: int, device: torch.device) -> dict[str, Any]:
    """``blocks``, ``seconds_per_block``, and with data ``tokens_per_second`` through a block and its ``floor``.

    Args:
        run: whose model has blocks and whose data they saw.
        seconds: of each block that this run calibrated; those of an earlier, killed run are not among them.
        passes: how often the calibration data went through these blocks, all together.
        device: where the blocks were.
    """
    if not seconds:
        return {"blocks": 0}
    mean = sum(seconds) / len(seconds)
    figures: dict[str, Any] = {
        "blocks": len(seconds),
        "seconds_per_block": round(mean, 4),
        "slowest_block_seconds": round(max(seconds), 4),
    }
    if passes and (tokens := count_calibration_tokens(run)):
        figures |= {"calibration_tokens": tokens, "tokens_per_second": round(tokens / mean, 1)}
        figures |= _floor(run, tokens, passes / len(seconds), device)
    return figures


def _floor(run: Run, tokens: int, passes: float, device: torch.device) -> dict[str, Any]:
    """The floor of the largest block, in operations and at the rates measured here."""
    blocks = topology.blocks(run.model)
    try:
        trace = topology.trace(run.model)
    except Exception as error:
        # Anything can go wrong in somebody else's forward, and nothing depends on this figure.
        log.debug("no floor: %s", error)
        return {}
    largest = max(blocks, key=lambda block: sum(p.numel() for p in block.module.parameters()))
    floor = block_lower_bound(trace, largest.name, tokens)
    rate, wide = measure_flops_per_second(device, run.model.dtype), measure_flops_per_second(device, torch.float32)
    return {
        "floor": {
            "passes_per_block": round(passes, 2),
            "forward_flops_per_pass": floor.forward,
            "second_order_flops": floor.second_order,
            "flops_per_block": passes * floor.forward + floor.second_order,
            "forward_seconds_per_block": round(passes * floor.forward / rate, 4),
            "seconds_per_block": round(floor.seconds(passes, rate, wide), 4),
        }
    }


@functools.cache
def measure_flops_per_second(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of a matrix product here, measured in about a tenth of a second or less."""
    size = 4096 if device.type == "cuda" else 1024
    a = torch.randn(size, size, device=device).to(dtype)
    (a @ a)[0, 0].item()
    best = 0.0
    for _ in range(3):
        started = time.perf_counter()
        (a @ a)[0, 0].item()
        best = max(best, 2 * size**3 / (time.perf_counter() - started))
    return best
