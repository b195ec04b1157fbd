"""The specification of ``hf_optim::llm_int8`` in plain PyTorch (Dettmers et al., LLM.int8(), 2208.07339).

With O the columns of ``X`` [rows, in] where any ``|x|`` is above the threshold (or not finite)::

    y[m, n] = (sum_{k not in O} c[m, k] w[n, k]) s[m] t[n] + (sum_{k in O} x[m, k] w[n, k]) t[n] + bias[n]
    c[m, k] = round(x[m, k] / s[m]),   s[m] = max{|x[m, k]| : |x[m, k]| <= threshold} / 127

The weight is ``w t``: int8 codes and a scale for each row, ``t[n] = max_k |W[n, k]| / 127``. A magnitude below the
threshold counts for ``s`` even if its column has an outlier in another row, so that ``s`` depends on one row only.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

LEVELS = 127.0


class PackedTensors(NamedTuple):
    """A packed weight [out, in].

    Attributes:
        weight: int8 codes [out, in] in [-127, 127], contiguous.
        scale: float32 [out].
        bias: [out], or None.
        semaphores: int32 zeros (``tiles.semaphores_size`` of them), zero again after a call. Calls that share them must
            not overlap.
    """

    weight: Tensor
    scale: Tensor
    bias: Tensor | None
    semaphores: Tensor


def quantize_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize a dense weight [out, in] to int8 codes [out, in] and float32 scales [out]."""
    wide = weight.detach().float()
    scale = wide.abs().amax(1) / LEVELS
    divisor = torch.where(scale == 0, 1.0, scale)
    return (wide / divisor[:, None]).round().clamp(-LEVELS, LEVELS).to(torch.int8), scale


def quantize_rows(x: Tensor, threshold: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return codes [rows, in] (int8), scales [rows] (float32) and the outlier columns [in] (bool) of ``x`` [rows, in].

    The codes of outlier columns are arbitrary.
    """
    wide = x.float()
    outlying = ~(wide.abs() <= threshold)
    inner = torch.where(outlying, 0.0, wide)
    top = inner.abs().amax(1)
    inverse = torch.where(top > 0, LEVELS / top, 0.0)
    codes = (inner * inverse[:, None]).round().clamp(-LEVELS, LEVELS).to(torch.int8)
    return codes, top / LEVELS, outlying.any(0)


def llm_int8(x: Tensor, weight: Tensor, w_scale: Tensor, bias: Tensor | None, threshold: float) -> Tensor:
    """Return [..., out] in the dtype of ``x`` [..., in]; ``weight`` is int8 [out, in], ``w_scale`` float32 [out]."""
    if not x.numel():
        y = x.new_zeros(*x.shape[:-1], weight.shape[0])
        return y if bias is None else y + bias.to(x.dtype)
    flat = x.reshape(-1, x.shape[-1])
    codes, scale, columns = quantize_rows(flat, threshold)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    # Sums of products of codes are exact in float64.
    y = (codes.masked_fill(columns, 0).double() @ weight.double().T).to(wide) * scale[:, None].to(wide)
    y = y + flat[:, columns].to(wide) @ weight[:, columns].to(wide).T
    y = y * w_scale.to(wide)
    y = y if bias is None else y + bias.to(wide)
    return y.to(x.dtype).view(*x.shape[:-1], weight.shape[0])


def dequantize(weight: Tensor, w_scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the weight [out, in] in ``dtype``."""
    return weight.to(dtype) * w_scale[:, None].to(dtype)
