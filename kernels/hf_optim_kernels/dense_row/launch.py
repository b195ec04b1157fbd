"""From tensors to the launch: how many programs share the rows of weights."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import product
from typing import Any

import torch
import triton
from torch import Tensor

from ..common import tuning
from ..common.launch import begins_early, is_aligned, launch
from .kernel import _dense_row_kernel
from .naive import MOST_WEIGHTS, NO_ACT

Config = dict[str, Any]
OP, GATED = "dense-row", "dense-row-gated"
# Warps of a program whose row has up to WIDE bytes, programs of a multiprocessor, bytes of weights that a program reads
# at once, and of shared memory. Of the settings that were timed on five layers on an H200 the fastest have four warps,
# and of four layers three programs.
WARPS, PROGRAMS, WIDE, AT_ONCE, SHARED_BYTES = 4, 3, 32_768, 8192, 200_000
# Rows of weights from which on each program has some.
MANY = 512


def default(channels: int, matrices: int = 1, outputs: int = MANY) -> Config:
    """Return the configuration for weights of ``channels`` columns, ``outputs`` rows together, that no table knows.

    ``warps`` of a program, ``programs`` of a multiprocessor, ``rows`` that a program reads at once, of each of
    ``matrices``, ``stages`` whose loads are under way, whether programs read blocks in turn (``strided``), and
    ``lines`` of 128 bytes that a program fetches before it waits for the launch before.
    """
    row = 2 * triton.next_power_of_2(channels)
    warps = WARPS if row <= WIDE else 2 * WARPS
    rows = max(1, min(4, AT_ONCE // (row * matrices), outputs // MANY))
    programs, stages = PROGRAMS, 4
    while _held(row, matrices, rows, stages, programs) > SHARED_BYTES:
        programs, stages = (programs - 1, stages) if stages == 3 and programs > 1 else (programs, stages - 1)
    return _config(warps, programs, rows, stages)


def candidates(channels: int, matrices: int = 1, outputs: int = MANY) -> list[Config]:
    """Return configurations worth timing, the default first."""
    first = default(channels, matrices, outputs)
    found = [first, {**first, "lines": 0}, {**first, "strided": False}]
    row = 2 * triton.next_power_of_2(channels)
    for warps in (4, 8):
        for rows, stages, programs in product((1, 2), (1, 3, 4), (2, 3, 4, 8)):
            held = _held(row, matrices, rows, stages, programs)
            at_once = row * matrices * rows
            # Registers hold what a warp reads at once.
            fits = held <= SHARED_BYTES and at_once <= warps * 8192 and warps * programs <= 48
            if fits and (held or at_once * programs) >= 48_000:
                found.append(_config(warps, programs, rows, stages))
    return [each for at, each in enumerate(found) if each not in found[:at]]


def _config(warps: int, programs: int, rows: int, stages: int) -> Config:
    return {
        "warps": warps, "programs": programs, "rows": rows, "stages": stages, "lines": 32 * warps, "strided": True,
    }  # fmt: skip


def _held(row: int, matrices: int, rows: int, stages: int, programs: int) -> int:
    """Return the bytes of shared memory that loads under way take on a multiprocessor."""
    return row * matrices * rows * (stages - 1) * programs


@cache
def _processors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def dense_row(x: Tensor, weight: Tensor, bias: Tensor | None, config: Config | None = None) -> Tensor:
    """Return ``naive.dense_row``: ``x`` [K] contiguous, ``weight`` [N, K] contiguous; result [N]."""
    return dense_rows(x, [weight], [] if bias is None else [bias], config=config)[0]


def dense_rows(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor] = (),
    act: int = NO_ACT,
    config: Config | None = None,
) -> list[Tensor]:
    """Return ``naive.dense_rows``: vectors and the weights' rows contiguous; results [N_i]."""
    K = weights[0].shape[1]
    sizes = [len(weight) for weight in weights]
    gated = act != NO_ACT
    out = [x.new_empty(size) for size in (sizes[:1] if gated else sizes)]
    if config is None:
        op, matrices = (GATED, 2) if gated else (OP, 1)
        config = tuning.choose(op, (sum(sizes), K), 1, x.dtype, x.device, lambda _: default(K, matrices, sum(sizes)))
    block = triton.next_power_of_2(K)
    early = begins_early(x)
    constants = {
        "BLOCK_K": block, "ROWS": config["rows"], "STAGES": config["stages"], "FULL": block == K,
        "COUNT": len(weights), "HAS_BIAS": len(biases) > 0, "ACT": act, "STRIDED": config["strided"],
        "LINES": config["lines"] if early else 0, "EARLY": early,
    }  # fmt: skip
    processors = _processors(x.device.index) if x.is_cuda else 2
    units = sum(triton.cdiv(len(each), config["rows"]) for each in out)
    given = [x]
    for several in (weights, biases or [x], out):
        given += [*several, *[several[0]] * (MOST_WEIGHTS - len(several))]
    numbers = (*sizes, *sizes[:1] * (MOST_WEIGHTS - len(sizes)), K)
    key = (
        *(t.dtype for t in given), *(is_aligned(t) for t in given), *(1 if n == 1 else n % 16 == 0 for n in numbers),
        *constants.values(), config["warps"],
    )  # fmt: skip
    launch(
        _dense_row_kernel, (min(units, config["programs"] * processors), 1, 1), (*given, *numbers), constants,
        num_warps=config["warps"], num_stages=1, key=key, early=early,
    )  # fmt: skip
    return out
