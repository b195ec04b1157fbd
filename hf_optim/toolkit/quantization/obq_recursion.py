r"""Optimal Brain Quantization of many rows at once: the exact greedy recursion, every row in an order of its own.

With ``H = E[x xᵀ]`` and ``F`` the columns of a row that are still free, one step (2208.11580, section 5, the weight
leaving the problem by lemma 1)::

    p    = argmin over q in F of (quant(w_q) - w_q)² / [H_F⁻¹]_qq
    w   -= (w_p - quant(w_p)) / [H_F⁻¹]_pp · [H_F⁻¹]_{p,:}
    H_{F\p}⁻¹ = H_F⁻¹ - [H_F⁻¹]_{:,p} [H_F⁻¹]_{p,:} / [H_F⁻¹]_pp

A row costs about ``in³ / 3`` multiplications, since a column that is quantized leaves the inverse, and updates of the
inverse are applied ``BLOCK`` at a time, in one product. Each row holds an inverse of its own, ``in²`` numbers; rows are
taken in chunks of bounded memory. How they are cut changes the result by rounding errors only.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .grids import Grid, round_codes
from .hessian import inverse_cholesky

# Steps between two updates of the inverses. A step needs one column and the diagonal, which are kept up to date.
BLOCK = 32


@torch.no_grad()
def quantize_greedily(
    weight: Tensor,
    hessian: Tensor,
    grid: Grid,
    *,
    damp: float = 0.01,
    outliers_first: bool = True,
    memory: float = 2.0**30,
    what: str = "the Hessian",
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Codes that keep the error of ``weight @ x`` low, by the recursion above.

    Args:
        weight: ``[out, in]``, float32 or float64 like ``hessian``. Exact zeros keep the code of zero: they leave the
            problem of their row first, without any error.
        hessian: ``[in, in]``, ``E[x xᵀ]``, any scale.
        grid: fixed scales, per tensor, per channel or per group of neighbouring columns.
        damp: share of the mean diagonal added to the diagonal; raised where it does not do.
        outliers_first: a weight that was pushed beyond the ends of its grid, so that its error is more than half a
            step, is quantized at once, before the compensation of others pushes it further.
        memory: most bytes for the inverses.
        what: what a ``NumericalError`` calls the Hessian.
        progress: called after each chunk of rows with the rows that are done and all of them.

    Returns:
        int8 codes ``[out, in]``.
    """
    rows, columns = weight.shape
    upper = inverse_cholesky(hessian, damp, what).upper
    inverse = upper.T @ upper
    scale, zero = expand_grid(grid, rows, columns, weight.dtype)
    # The inverse, and its copy while it is packed together.
    chunk = max(1, int(memory // (2 * columns * columns * weight.element_size())))
    parts = []
    for begin in range(0, rows, chunk):
        own = slice(begin, begin + chunk)
        parts.append(_recursion(weight[own], inverse, scale[own], zero[own], grid, outliers_first))
        if progress is not None:
            progress(min(begin + chunk, rows), rows)
    return torch.cat(parts).to(torch.int8)


def expand_grid(grid: Grid, rows: int, columns: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Scale and zero point of every weight, ``[rows, columns]`` each; views where one serves several weights."""

    def every(sides: Tensor) -> Tensor:
        if grid.spec.strategy == "group":
            return sides.repeat_interleave(columns // sides.shape[-1], -1)
        return sides.expand(rows, columns)

    scale = every(grid.scale.to(dtype))
    return scale, torch.zeros_like(scale) if grid.zero_point is None else every(grid.zero_point.to(dtype))


def _recursion(
    weight: Tensor, inverse: Tensor, scale: Tensor, zero: Tensor, grid: Grid, outliers_first: bool
) -> Tensor:
    """Codes of some rows. ``inverse`` ``[in, in]`` is the same for all of them at the beginning."""
    rows, columns = weight.shape
    line = torch.arange(rows, device=weight.device)
    place = torch.arange(columns, device=weight.device).expand(rows, columns)
    codes = torch.empty_like(weight)
    free, pruned = weight.clone(), weight == 0
    inverses = inverse.expand(rows, columns, columns).clone()
    for begin in range(0, columns, BLOCK):
        steps = min(BLOCK, columns - begin)
        diagonal = inverses.diagonal(dim1=1, dim2=2).clone()
        done = torch.zeros_like(pruned)
        # What the steps of this block take off the inverses: column after column, with the square root of the pivot.
        taken = weight.new_zeros(rows, place.shape[1], steps)
        for step in range(steps):
            code = torch.where(pruned, zero, round_codes(free, scale, zero, grid.spec))
            error = free - (code - zero) * scale
            chosen = _next(error, diagonal, scale, pruned, done, outliers_first)
            codes[line, place[line, chosen]] = code[line, chosen]
            past = taken[:, :, :step]
            column = inverses[line, chosen] - (past @ past[line, chosen].unsqueeze(2)).squeeze(2)
            pivot = column[line, chosen]
            free -= (error[line, chosen] / pivot).unsqueeze(1) * column.masked_fill(pruned, 0)
            column = column / pivot.sqrt().unsqueeze(1)
            taken[:, :, step] = column
            diagonal -= column.square()
            done[line, chosen] = True
        keep = (~done).nonzero()[:, 1].view(rows, -1)
        inverses = inverses.baddbmm_(taken, taken.mT, alpha=-1)
        inverses = inverses[line[:, None, None], keep[:, :, None], keep[:, None, :]]
        free, pruned, place, scale, zero = (side.gather(1, keep) for side in (free, pruned, place, scale, zero))
    return codes


def _next(error: Tensor, diagonal: Tensor, scale: Tensor, pruned: Tensor, done: Tensor, outliers_first: bool) -> Tensor:
    """The column that each row quantizes now: pruned ones first, then outliers, then the cheapest."""
    score = error.square() / diagonal.masked_fill(done, 1.0)
    # Finite scores all lie above the negative ones, and the order among those is kept.
    if outliers_first:
        outlier = error.abs() > scale / 2
        score = torch.where(outlier & ~pruned, -1 / (1 + score), score)
    score = score.masked_fill(pruned, -2.0)
    return score.masked_fill(done, torch.inf).argmin(1)
