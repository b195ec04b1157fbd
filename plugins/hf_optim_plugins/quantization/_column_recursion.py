r"""The column recursion of GPTQ, and sweeps of coordinate descent over its codes.

A sweep rounds the columns once more, in the same order, each to the code that is best while all others stay as they
are (coordinate descent; QuantEase, 2309.01885, in whose method it takes the place of the recursion). With ``H`` and all
columns in that order, ``d = diag(H)``, the codes' values ``q`` and the gradient ``G = (w - q) H``, the target of column
``j`` depends on new values before it and on old ones behind it::

    t_j = q_j + (G_j - sum over r < j of (q'_r - q_r) H_rj) / d_j          q'_j = quant(t_j)

This is the column recursion of GPTQ with another factor and another start, so that its blocks and its kernel compute
it: with ``T = triu(H)`` and ``U = diag(d) T^-1``, whose diagonal is 1, it begins at ``q + G T^-1`` and goes on by
``e_j = t_j - q'_j``, ``t_r -= e_j U_jr``.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_optim.toolkit.quantization import Grid, refit_scales, round_codes

log = logging.getLogger(__name__)
# Rows whose gradient is computed at a time.
STRIP = 2048


def column_order(hessian: Tensor, act_order: bool) -> Tensor:
    """Return the columns in the order in which they are rounded, int64 ``[in]``."""
    if not act_order:
        return torch.arange(len(hessian), device=hessian.device)
    return hessian.diagonal().argsort(descending=True, stable=True)


@torch.no_grad()
def recurse(
    weight: Tensor, upper: Tensor, order: Tensor, grid: Grid, block_size: int = 128, start: Tensor | None = None
) -> Tensor:
    """Round the columns of ``weight`` in ``order``; return int8 codes ``[out, in]``.

    Args:
        weight: ``[out, in]``, any float type. Exact zeros keep the code of zero.
        upper: ``[in, in]``, ``U`` of the columns in ``order``, in the dtype of the computation.
        order: int64 ``[in]``, a permutation.
        grid: per channel or per group of neighbouring columns.
        block_size: columns between two updates of the rest.
        start: ``[out, in]``, the values with which the recursion begins; None for ``weight``.
    """
    size = grid.spec.group_size or weight.shape[1]
    if upper.is_cuda and upper.dtype == torch.float32 and not grid.spec.is_float4:
        try:
            from hf_optim_kernels.column_recursion import launch as kernels
        except ImportError as error:
            log.debug("no kernel for GPTQ's recursion (%s): torch runs it, column by column", error)
        else:
            ends = (grid.spec.low, grid.spec.high)
            scale, zero = grid.scale.float(), grid.zero_point
            return kernels.recurse(weight, upper, order, scale, zero, size, *ends, block_size, start)
    # Transposed, so that a column is contiguous in memory.
    rest = (weight if start is None else start).T[order].to(upper.dtype)
    work = _Columns(grid, rest, weight.T[order] != 0, upper, order // size)
    codes = torch.empty(weight.T.shape, dtype=torch.int8, device=weight.device)
    for begin in range(0, len(rest), block_size):
        end = min(begin + block_size, len(rest))
        codes[order[begin:end]] = work.round_range(begin, end)
        rest[end:].addmm_(upper[begin:end, end:].T, rest[begin:end], alpha=-1)
    return codes.T.contiguous()


@dataclass
class _Columns:
    """The recursion in torch. ``rest`` ``[in, out]``: columns in order; rounded columns hold their errors instead."""

    grid: Grid
    rest: Tensor
    kept: Tensor
    upper: Tensor
    group: Tensor

    def round_range(self, begin: int, end: int) -> Tensor:
        """Round columns ``begin`` to ``end`` by halves; return int8 codes ``[end - begin, out]``."""
        if end - begin == 1:
            return self.round_one(begin)[None]
        middle, rest = (begin + end) // 2, self.rest
        first = self.round_range(begin, middle)
        rest[middle:end].addmm_(self.upper[begin:middle, middle:end].T, rest[begin:middle], alpha=-1)
        return torch.cat([first, self.round_range(middle, end)])

    def round_one(self, q: int) -> Tensor:
        free, group = self.rest[q], self.group[q]
        scale = self.grid.scale[:, group].to(free.dtype)
        zero = torch.zeros_like(scale) if self.grid.zero_point is None else self.grid.zero_point[:, group].to(scale)
        code = torch.where(self.kept[q], round_codes(free, scale, zero, self.grid.spec), zero)
        self.rest[q] = (free - (code - zero) * scale) / self.upper[q, q]
        return code.to(torch.int8)


@torch.no_grad()
def refine(
    weight: Tensor,
    codes: Tensor,
    grid: Grid,
    hessian: Tensor,
    upper: Tensor,
    order: Tensor,
    rounds: int,
    block_size: int = 128,
) -> tuple[Tensor, Grid]:
    """Fit the scales to the codes and the codes to the scales, in turn; return both.

    Neither step raises ``tr((Q - W) H (Q - W)ᵀ)``, beyond rounding errors.

    Args:
        weight: ``[out, in]``, any float type. Exact zeros keep the code of zero.
        codes: int8 ``[out, in]``, to begin with.
        grid: of the codes; its scales remain numbers of the dtype of ``weight``, its zero points stay.
        hessian: ``[in, in]``, damped, with a positive diagonal; float32 or float64, the dtype of the computation.
        upper: ``[in, in]``, ``descent_factor(hessian, order)``.
        order: int64 ``[in]``, in which columns are rounded.
        rounds: how often.
        block_size: as in ``recurse``.
    """
    for _ in range(rounds):
        grid = refit_scales(weight, codes, grid, hessian, weight.dtype)
        start = _targets(weight, codes, grid, hessian, upper, order)
        codes = recurse(weight, upper, order, grid, block_size, start)
    return codes, grid


def _targets(weight: Tensor, codes: Tensor, grid: Grid, hessian: Tensor, upper: Tensor, order: Tensor) -> Tensor:
    """Return where a sweep begins, ``q + G T^-1``, columns as in the weight: ``[out, in]``, dtype of ``hessian``."""
    start = torch.empty(weight.shape, dtype=hessian.dtype, device=weight.device)
    diagonal = hessian.diagonal()
    for begin in range(0, len(weight), STRIP):
        rows = slice(begin, begin + STRIP)
        values = grid.rows(begin, begin + STRIP).dequantize(codes[rows]).to(hessian.dtype)
        gradient = (weight[rows].to(hessian.dtype) - values) @ hessian
        start[rows, order] = values[:, order] + (gradient / diagonal)[:, order] @ upper
    return start
