"""The N:M mask of SparseGPT: chosen group by group, on weights that already make up for the groups before.

With ``H = X Xᵀ + λI`` and ``H⁻¹ = Uᵀ U`` (upper Cholesky factor), removing the weight ``w_j`` from a row whose columns
before ``j`` are fixed costs ``w_j² / U_jj²``, and the columns behind make up for it by ``-w_j / U_jj · U_{j, j+1:}``
(SparseGPT, 2301.00774, sections 3.2 to 3.4; the costs are those of OBS, Hassibi and Stork 1992). In each group the
``group - keep`` cheapest are removed before the next group is looked at.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .masks import nm_mask

# Columns between two updates of all that follow.
BLOCK = 128


def obs_mask(
    weight: Tensor, upper: Tensor, keep: int, group: int, kept: Tensor | None = None, alive: Tensor | None = None
) -> Tensor:
    """Return the N:M mask that SparseGPT chooses.

    Args:
        weight: ``[out, in]``, the dense weights; ``in`` a multiple of ``group``.
        upper: ``[in, in]``, the upper Cholesky factor of the inverse of the damped Hessian.
        keep, group: N and M.
        kept: an earlier mask ``[out, in]``, True = kept, or None; removed weights stay removed.
        alive: bool ``[in]``, False for inputs that were zero in every token, whose weights cost nothing; None: all.

    Returns:
        bool ``[out, in]``, True = kept; at most ``keep`` in a group.
    """
    work = weight.to(upper.dtype).clone()
    diagonal = upper.diagonal()
    costs_nothing = torch.zeros_like(diagonal, dtype=torch.bool) if alive is None else ~alive
    mask = torch.empty_like(work, dtype=torch.bool)
    width = group * max(1, BLOCK // group)
    for begin in range(0, work.shape[1], width):
        end = min(begin + width, work.shape[1])
        errors = torch.zeros_like(work[:, begin:end])
        for first in range(begin, end, group):
            columns = slice(first, first + group)
            cost = (work[:, columns] / diagonal[columns]).square().masked_fill(costs_nothing[columns], 0.0)
            mask[:, columns] = nm_mask(cost, keep, group, None if kept is None else kept[:, columns])
            for j in range(first, first + group):
                error = work[:, j].masked_fill(mask[:, j], 0.0) / diagonal[j]
                work[:, j:end].addr_(error, upper[j, j:end], alpha=-1.0)
                errors[:, j - begin] = error
        work[:, end:].addmm_(errors, upper[begin:end, end:], alpha=-1.0)
    return mask
