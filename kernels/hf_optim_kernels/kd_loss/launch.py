"""From tensors to launches of the distillation loss: a program per row, and per piece of its gradient."""

from __future__ import annotations

import math

import torch
import triton
from torch import Tensor

from ..common import tuning
from ..common.launch import is_aligned, launch
from .kernel import _gradient_kernel, _losses_kernel
from .naive import DIRECTIONS

OP = "kd-loss"
# Columns of a step of a row's program, and of a piece of the gradient: the fastest on an H100 and an H200.
DEFAULT = {"step": 4096, "piece": 2048}


def losses(
    student: Tensor, teacher: Tensor, kept: Tensor | None, temperature: float, direction: str, beta: float
) -> tuple[Tensor, Tensor]:
    """Return ``naive.losses`` in float32, and the statistics ``[rows, 3]`` that ``gradient`` needs.

    ``student`` and ``teacher`` are ``[rows, classes]`` with contiguous rows.
    """
    rows, V = student.shape
    found = torch.empty(rows, dtype=torch.float32, device=student.device)
    statistics = torch.empty(rows, 3, dtype=torch.float32, device=student.device)
    if rows == 0:
        return found, statistics
    block, warps = _block(V, _columns(student, V)["step"])
    launch(
        _losses_kernel, (rows, 1, 1),
        (student, teacher, found if kept is None else kept, found, statistics, V, student.stride(0), teacher.stride(0),
         math.log2(math.e) / temperature, temperature**2, beta),
        _constants(direction, kept, block), num_warps=warps, num_stages=3,
        key=(*_key(student, teacher, kept, direction), block, warps),
    )  # fmt: skip
    return found, statistics


def gradient(
    student: Tensor, teacher: Tensor, kept: Tensor | None, statistics: Tensor, upstream: Tensor, out: Tensor,
    temperature: float, direction: str, beta: float,
) -> None:  # fmt: skip
    """Write ``naive.gradient`` into ``out`` ``[rows, classes]``, which may be ``teacher``."""
    rows, V = student.shape
    if rows == 0:
        return
    block, warps = _block(V, _columns(student, V)["piece"])
    launch(
        _gradient_kernel, (rows, triton.cdiv(V, block), 1),
        (student, teacher, statistics if kept is None else kept, statistics, upstream, out, V, student.stride(0),
         teacher.stride(0), out.stride(0), math.log2(math.e) / temperature, temperature, beta),
        _constants(direction, kept, block), num_warps=warps, num_stages=1,
        key=(*_key(student, teacher, kept, direction), block, warps, out.dtype, out.stride(0), upstream.dtype,
             is_aligned(out)),
    )  # fmt: skip


def _columns(student: Tensor, V: int) -> dict[str, int]:
    return tuning.choose(OP, (V, 1), 1, student.dtype, student.device, lambda rows: DEFAULT)


def _block(V: int, most: int) -> tuple[int, int]:
    block = max(16, min(most, triton.next_power_of_2(V)))
    return block, max(1, min(8, block // 256))


def _constants(direction: str, kept: Tensor | None, block: int) -> dict[str, object]:
    return {"DIRECTION": DIRECTIONS.index(direction), "HAS_KEPT": kept is not None, "BLOCK": block}


def _key(student: Tensor, teacher: Tensor, kept: Tensor | None, direction: str) -> tuple:
    shape = (student.shape[1], student.stride(0), teacher.stride(0))
    given = () if kept is None else (kept.dtype, is_aligned(kept))
    return (student.dtype, teacher.dtype, *shape, direction, *given, is_aligned(student), is_aligned(teacher))
