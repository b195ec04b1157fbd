"""LLM.int8() on a CPU: PyTorch's own integer product, ``aten::_int_mm``, and a float32 product of the outlier columns.

The codes are those of ``naive``, whose exact sums these are too, so that outputs agree to float32 rounding. Nothing
else is quantized: where no column of the input is outlying, the second product is left out.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import naive

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Sums of products of int8 codes stay below 2^31 up to here.
MOST_COLUMNS = 1 << 16
# Where this is faster than the dense product for every number of rows but few (one thread of a 2.8 GHz Ice Lake).
LEAST_WEIGHTS = 1 << 20


def unsupported_reason(weight: Any) -> str | None:
    """Return why this CPU path does not run, or does not speed up, a ``QuantizedWeight``; None if it does."""
    count = weight.shape[0] * weight.shape[1]
    if weight.dtype not in DTYPES:
        return f"{str(weight.dtype).removeprefix('torch.')} inputs; served are float32, bfloat16 and float16"
    if weight.shape[1] > MOST_COLUMNS:
        return f"{weight.shape[1]} columns; int32 sums are exact up to {MOST_COLUMNS}"
    if count < LEAST_WEIGHTS:
        return f"a layer of {count:,} weights is faster dense (from {LEAST_WEIGHTS:,})"
    if not torch.cpu._is_vnni_supported():
        return "PyTorch's integer product was measured with AVX512-VNNI, which this CPU has not"
    return None


def llm_int8(x: Tensor, weight: Tensor, w_scale: Tensor, bias: Tensor | None, threshold: float) -> Tensor:
    """``naive.llm_int8`` for inputs of ``DTYPES``, [..., in] -> [..., out]."""
    if not x.numel() or x.dtype not in DTYPES or x.shape[-1] > MOST_COLUMNS:
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
