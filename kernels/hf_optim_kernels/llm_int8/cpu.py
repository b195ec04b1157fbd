"""LLM.int8() on a CPU: PyTorch's own integer product, ``aten::_int_mm``, and a float32 product of the outlier columns.

Codes and exact sums are those of ``naive``, so that outputs agree up to float32 rounding. If no column of the input is
outlying, the second product is left out.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..common.cpu_linear import INT_MM_DTYPES, MOST_INT_MM_COLUMNS, unsupported_by_int_mm
from . import naive

# From here, this is faster than the dense product for all but few numbers of rows (one thread of a 2.8 GHz Ice Lake).
LEAST_WEIGHTS = 1 << 20


def unsupported_reason(weight: Any) -> str | None:
    """Return why this CPU path does not run, or does not speed up, a ``QuantizedWeight``; None if it does."""
    count = weight.shape[0] * weight.shape[1]
    if count < LEAST_WEIGHTS:
        return f"a layer of {count:,} weights is faster dense (packed from {LEAST_WEIGHTS:,})"
    return unsupported_by_int_mm(weight.dtype, weight.shape[1])


def llm_int8(x: Tensor, weight: Tensor, w_scale: Tensor, bias: Tensor | None, threshold: float) -> Tensor:
    """Return ``naive.llm_int8`` of ``x`` [..., in], by the integer product where it supports the input."""
    if not x.numel() or x.dtype not in INT_MM_DTYPES or x.shape[-1] > MOST_INT_MM_COLUMNS:
        return naive.llm_int8(x, weight, w_scale, bias, threshold)
    flat = x.reshape(-1, x.shape[-1])
    wide = flat.float()
    size = wide.abs()
    # A comparison with NaN is false.
    outlying = (size <= threshold).logical_not_()
    columns = outlying.any(0).nonzero().flatten()
    if len(columns):
        size = size.masked_fill_(outlying, 0.0)
    top = size.amax(1, keepdim=True)
    inverse = torch.where(top > 0, naive.LEVELS / top, 0.0)
    codes = (wide * inverse).round_()
    if len(columns):
        codes.index_fill_(1, columns, 0.0)
    y = torch._int_mm(codes.to(torch.int8), weight.t()) * (top / naive.LEVELS)
    if len(columns):
        y.addmm_(wide[:, columns], weight[:, columns].float().t())
    y = y.mul_(w_scale) if bias is None else torch.addcmul(bias.float(), y, w_scale)
    return y.to(x.dtype).view(*x.shape[:-1], weight.shape[0])
