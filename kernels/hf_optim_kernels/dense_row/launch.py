"""From tensors to the launch: how many programs share a weight's rows."""

from __future__ import annotations

from functools import cache
from itertools import product
from typing import Any

import torch
import triton
from torch import Tensor

from ..common import tuning
from ..common.launch import begins_early, is_aligned, launch
from .kernel import _dense_row_kernel

Config = dict[str, Any]
OP = "dense-row"
# Bytes of a row that a warp loads at once, and programs of a multiprocessor whose loads fit its shared memory.
WARP_BYTES, SHARED_BYTES = 2048, 200_000


def default(channels: int) -> Config:
    """Return the configuration for a weight of ``channels`` columns that no table knows.

    ``warps`` of a program, ``programs`` of a multiprocessor, ``rows`` that a program reads at once, ``stages`` whose
    loads are under way, and ``lines`` of 128 bytes that it fetches before it waits for the launch before.
    """
    size = 2 * triton.next_power_of_2(channels)
    warps = min(8, max(2, size // WARP_BYTES))
    rows = max(1, min(4, 8192 // size))
    stages = 4
    programs = max(1, min(4, SHARED_BYTES // (size * rows * (stages - 1))))
    return {"warps": warps, "programs": programs, "rows": rows, "stages": stages, "lines": 32 * warps}


def candidates(channels: int) -> list[Config]:
    """Return configurations worth timing, the default first."""
    first = default(channels)
    found = [first, {**first, "lines": 0}]
    size = 2 * triton.next_power_of_2(channels)
    for warps in (4, 8):
        for rows, stages, programs in product((1, 2), (1, 3, 4), (2, 3, 4, 8)):
            held = size * rows * (stages - 1) * programs
            under_way = held or size * rows * programs
            # Registers hold what a warp reads at once.
            if held <= SHARED_BYTES and under_way >= 48_000 and size * rows <= warps * 8192 and warps * programs <= 48:
                found.append(
                    {"warps": warps, "programs": programs, "rows": rows, "stages": stages, "lines": 32 * warps}
                )
    return [each for at, each in enumerate(found) if each not in found[:at]]


@cache
def _processors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def dense_row(x: Tensor, weight: Tensor, bias: Tensor | None, config: Config | None = None) -> Tensor:
    """Return ``naive.dense_row``: ``x`` [K] contiguous, ``weight`` [N, K] contiguous; result [N]."""
    N, K = weight.shape
    out = x.new_empty(N)
    if config is None:
        config = tuning.choose(OP, (N, K), 1, x.dtype, x.device, lambda rows: default(K))
    block = triton.next_power_of_2(K)
    early = begins_early(x)
    constants = {
        "BLOCK_K": block, "ROWS": config["rows"], "STAGES": config["stages"], "FULL": block == K,
        "HAS_BIAS": bias is not None, "LINES": config["lines"] if early else 0, "EARLY": early,
    }  # fmt: skip
    processors = _processors(x.device.index) if x.is_cuda else 2
    programs = min(triton.cdiv(N, config["rows"]), config["programs"] * processors)
    given = (x, weight, x if bias is None else bias, out)
    key = (*(t.dtype for t in given), *(is_aligned(t) for t in given), N % 16, K, *constants.values(), config["warps"])
    launch(
        _dense_row_kernel, (programs, 1, 1), (*given, N, K), constants, num_warps=config["warps"], num_stages=1,
        key=key, early=early,
    )  # fmt: skip
    return out
