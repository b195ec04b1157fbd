r"""Optimal Brain Quantization (OBQ) of many rows at once: the exact greedy recursion, each row in its own order.

With ``H = E[x xᵀ]`` and ``F`` the columns of a row that are still free, one step is (2208.11580, section 5; the weight
leaves the problem by lemma 1)::

    p    = argmin over q in F of (quant(w_q) - w_q)² / [H_F⁻¹]_qq
    w   -= (w_p - quant(w_p)) / [H_F⁻¹]_pp · [H_F⁻¹]_{p,:}
    H_{F\p}⁻¹ = H_F⁻¹ - [H_F⁻¹]_{:,p} [H_F⁻¹]_{p,:} / [H_F⁻¹]_pp

A row costs about ``in³ / 3`` multiplications, since a quantized column leaves the inverse, and updates of the inverse
are applied ``BLOCK`` at a time, in one product. Each row has its own inverse of ``in²`` numbers; rows are processed in
chunks of bounded memory. The chunk size changes the result only by rounding errors.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .grids import Grid, round_codes
from .hessian import inverse_cholesky

# Steps between two updates of the inverses. A step needs only one column and the diagonal, which are kept up to date.
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
    label: str = "the Hessian",
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Quantize a weight by the recursion above, so that the error of ``weight @ x`` stays low.

    Args:
        weight: ``[out, in]``, float32 or float64 like ``hessian``. Exact zeros keep the code of zero: they leave the
            problem of their row first, without error.
        hessian: ``[in, in]``, ``E[x xᵀ]``, any scale.
        grid: fixed scales, per tensor, per channel or per group of adjacent columns.
        damp: share of the mean diagonal added to the diagonal; raised if the Hessian is still singular.
        outliers_first: quantize a weight at once if it was pushed beyond the ends of its grid, so that its error is
            more than half a scale, before the compensation of others pushes it further.
        memory: upper limit in bytes on the inverses.
        label: name of the Hessian in the message of a ``NumericalError``.
        progress: called after each chunk with the number of rows done and of all rows.

    Returns:
        int8 codes ``[out, in]``.
    """
    rows, columns = weight.shape
    upper = inverse_cholesky(hessian, damp, label).upper
    inverse = upper.T @ upper
    scale, zero = expand_grid(grid, rows, columns, weight.dtype)
    # The inverse, and its copy while finished columns are removed.
    chunk = max(1, int(memory // (2 * columns * columns * weight.element_size())))
    parts = []
    for begin in range(0, rows, chunk):
        own = slice(begin, begin + chunk)
        parts.append(_recursion(weight[own], inverse, scale[own], zero[own], grid, outliers_first))
        if progress is not None:
            progress(min(begin + chunk, rows), rows)
    return torch.cat(parts).to(torch.int8)


def expand_grid(grid: Grid, rows: int, columns: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the scale and the zero point of every weight, ``[rows, columns]`` each; views where weights share them."""

    def expand(values: Tensor) -> Tensor:
        if grid.spec.strategy == "group":
            return values.repeat_interleave(columns // values.shape[-1], -1)
        return values.expand(rows, columns)

    scale = expand(grid.scale.to(dtype))
    return scale, torch.zeros_like(scale) if grid.zero_point is None else expand(grid.zero_point.to(dtype))


def _recursion(
    weight: Tensor, inverse: Tensor, scale: Tensor, zero: Tensor, grid: Grid, outliers_first: bool
) -> Tensor:
    """Return the codes of some rows, which all start with the same ``inverse`` ``[in, in]``."""
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
        # What the steps of this block subtract from the inverses: a column per step, divided by the root of its pivot.
        updates = weight.new_zeros(rows, place.shape[1], steps)
        for step in range(steps):
            code = torch.where(pruned, zero, round_codes(free, scale, zero, grid.spec))
            error = free - (code - zero) * scale
            chosen = _next_column(error, diagonal, scale, pruned, done, outliers_first)
            codes[line, place[line, chosen]] = code[line, chosen]
            past = updates[:, :, :step]
            column = inverses[line, chosen] - (past @ past[line, chosen].unsqueeze(2)).squeeze(2)
            pivot = column[line, chosen]
            free -= (error[line, chosen] / pivot).unsqueeze(1) * column.masked_fill(pruned, 0)
            column = column / pivot.sqrt().unsqueeze(1)
            updates[:, :, step] = column
            diagonal -= column.square()
            done[line, chosen] = True
        keep = (~done).nonzero()[:, 1].view(rows, -1)
        inverses = inverses.baddbmm_(updates, updates.mT, alpha=-1)
        inverses = inverses[line[:, None, None], keep[:, :, None], keep[:, None, :]]
        free, pruned, place, scale, zero = (values.gather(1, keep) for values in (free, pruned, place, scale, zero))
    return codes


def _next_column(
    error: Tensor, diagonal: Tensor, scale: Tensor, pruned: Tensor, done: Tensor, outliers_first: bool
) -> Tensor:
    """Return the column that each row quantizes next: pruned ones first, then outliers, then the cheapest."""
    score = error.square() / diagonal.masked_fill(done, 1.0)
    # Outliers get scores in [-1, 0), below all others, in the same order; pruned weights get -2.
    if outliers_first:
        outlier = error.abs() > scale / 2
        score = torch.where(outlier & ~pruned, -1 / (1 + score), score)
    score = score.masked_fill(pruned, -2.0)
    return score.masked_fill(done, torch.inf).argmin(1)
