"""The specification of the column recursion in plain PyTorch (GPTQ, 2210.17323, equations 2 and 3).

Columns are taken in the order ``p_0, p_1, ...``; ``U`` is upper triangular over columns in that order, ``Uᵀ U = H⁻¹``::

    c[:, q]   = clamp(w[:, q] / s[:, g(q)] + z[:, g(q)], low, high), rounded half to even;  z[:, g(q)] where w was 0
    e[:, q]   = (w[:, q] - (c[:, q] - z[:, g(q)]) s[:, g(q)]) / U[q, q]
    w[:, r]  -= e[:, q] U[q, r]                            for every r after q

with ``g(q) = p_q // group_size``, the group of the column in the weight.
"""

from __future__ import annotations

import torch
from torch import Tensor


def recurse(
    weight: Tensor, upper: Tensor, order: Tensor, scale: Tensor, zero: Tensor | None, group_size: int, low: float,
    high: float, start: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Return the codes of ``weight``.

    Args:
        weight: ``[rows, columns]``, any float type; computed in the type of ``upper``. Exact zeros stay zero.
        upper: ``[columns, columns]``, over columns in ``order``.
        order: int64 ``[columns]``, a permutation: the column of the weight at each position.
        scale: ``[rows, columns / group_size]``, positive.
        zero: whole numbers of the shape of ``scale``; None for zeros.
        group_size: adjacent columns that share a scale.
        low, high: the smallest and the largest code, within int8.
        start: ``[rows, columns]``, the values of ``w`` to begin with; None for ``weight``.

    Returns:
        int8 ``[rows, columns]``, columns as in the weight.
    """
    rest = (weight if start is None else start)[:, order].to(upper.dtype)
    group = order // group_size
    s = scale.to(upper.dtype)[:, group]
    z = torch.zeros_like(s) if zero is None else zero.to(upper.dtype)[:, group]
    kept = weight[:, order] != 0
    codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    for q, column in enumerate(order.tolist()):
        code = (rest[:, q] / s[:, q] + z[:, q]).clamp(low, high).round()
        code = torch.where(kept[:, q], code, z[:, q])
        error = (rest[:, q] - (code - z[:, q]) * s[:, q]) / upper[q, q]
        rest[:, q + 1 :] -= torch.outer(error, upper[q, q + 1 :])
        codes[:, column] = code.to(torch.int8)
    return codes
