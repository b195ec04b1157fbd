"""The specification of the 8-bit operators in plain PyTorch.

A row ``x`` [in] is quantized to codes ``c``, on a grid that is computed per row (dynamic) or given (static)::

    int8, symmetric     s = max|x| / 127.5          c = clamp(round(x / s), -128, 127)
    int8, asymmetric    s = (max x - min x) / 255    c = clamp(round(x / s + z), -128, 127), z = round(-128 - min x / s)
    float8 (e4m3)       s = max|x| / 448             c = x / s rounded to e4m3

where ``min x`` and ``max x`` include 0, and ``s`` is the machine epsilon where it would be 0. Every step is rounded to
the dtype of ``x``, as in compressed-tensors, so that codes are those of its fake quantization. A row that is not finite
gets ``s`` = its largest magnitude (Inf or NaN), also on a static grid: it stays visible in the output.

The product is ``y[m, n] = (sum_k c[m, k] w[n, k] - z[m] sum_k w[n, k]) s[m] t[n] + bias[n]`` with codes ``w`` [out, in]
and scales ``t`` [out] of the weight. Quantizing in the layer that computes the row is ZeroQuant's (2206.01861).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

FLOAT8 = torch.float8_e4m3fn
INT8_LEVELS, FLOAT8_LEVELS = 127.5, 448.0
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu")


class PackedTensors(NamedTuple):
    """A packed weight [out, in].

    Attributes:
        weight: codes [out, in], int8 or float8_e4m3fn, contiguous; inputs are quantized to the same type.
        scale: float32 [out].
        sums: int32 [out], the sums of the rows of an int8 weight; read where inputs are asymmetric.
        bias: [out], or None.
        semaphores: int32 split-k semaphores, zeros before and after a call. Calls that share them must not overlap.
    """

    weight: Tensor
    scale: Tensor
    sums: Tensor
    bias: Tensor | None
    semaphores: Tensor


class InputGrid(NamedTuple):
    """The grid on which inputs are quantized.

    Attributes:
        scale, zero: [1], of static inputs; None where each row has its own grid (or no zero points).
        is_symmetric: True for a grid without zero points.
    """

    scale: Tensor | None
    zero: Tensor | None
    is_symmetric: bool


def quantize(
    x: Tensor, float8: bool, symmetric: bool = True, scale: Tensor | None = None, zero: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return codes [..., in] (int8 or float8_e4m3fn), scales [...] and zero points [...] (int32).

    Args:
        x: [..., in], floating.
        scale, zero: of a static grid, one element each; None for a grid per row.

    The scales are float32 (float64 for float64). The zero points are an empty tensor if the grid is symmetric.
    """
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    top = x.abs().amax(-1)
    if scale is None:
        scale, zero = token_grid(x, float8, symmetric)
    else:
        scale = scale.to(compute).reshape(()).expand(top.shape)
        if zero is not None:
            zero = zero.to(torch.int32).reshape(()).expand(top.shape)
    steps = (x.to(compute) / scale[..., None].to(compute)).to(x.dtype)
    if zero is not None:
        steps = steps + zero[..., None].to(x.dtype)
    scale = torch.where(top.isfinite(), scale.to(compute), top.to(compute))
    zero = x.new_empty(0, dtype=torch.int32) if zero is None else zero.contiguous()
    if float8:
        return steps.clamp(-FLOAT8_LEVELS, FLOAT8_LEVELS).to(FLOAT8), scale, zero
    return steps.nan_to_num(-128.0).clamp(-128, 127).round().to(torch.int8), scale, zero


def token_grid(x: Tensor, float8: bool, symmetric: bool) -> tuple[Tensor, Tensor | None]:
    """Return scales [...] in the dtype of ``x`` and zero points [...] (int32; None if symmetric) of its rows."""
    low, high = x.amin(-1).clamp_max(0), x.amax(-1).clamp_min(0)
    eps = torch.finfo(x.dtype).eps
    if symmetric:
        scale = torch.maximum(-low, high) / (FLOAT8_LEVELS if float8 else INT8_LEVELS)
        return scale.masked_fill(scale == 0, eps), None
    scale = (high - low) / 255
    scale = scale.masked_fill(scale == 0, eps)
    return scale, (-128 - low / scale).nan_to_num(0.0).clamp(-128, 127).round().to(torch.int32)


def dequantize(codes: Tensor, scale: Tensor, zero: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return ``(codes - zero) * scale``: codes [..., in], scales and zero points [...]."""
    values = codes.to(dtype)
    if zero is not None and zero.numel():
        values = values - zero[..., None].to(dtype)
    return values * scale[..., None].to(dtype)


def multiply(
    x: Tensor, x_scale: Tensor, x_zero: Tensor | None, weight: Tensor, scale: Tensor, bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """Multiply codes ``x`` [..., in] and ``weight`` [out, in]: [..., out] in ``dtype``. Sums of int8 are exact."""
    compute = torch.float64 if dtype == torch.float64 or weight.dtype == torch.int8 else torch.float32
    codes = x.to(compute)
    if x_zero is not None and x_zero.numel():
        codes = codes - x_zero[..., None].to(compute)
    y = (codes @ weight.to(compute).T) * x_scale[..., None].to(compute) * scale.to(compute)
    return (y if bias is None else y + bias.to(compute)).to(dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return ``x / sqrt(mean(x^2) + eps)`` rounded to the dtype of ``x``, times ``weight`` [in] (as in Llama)."""
    wide = x.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """Return ``torch.nn.functional.layer_norm`` over the last dimension."""
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


def gated(gate: Tensor, up: Tensor | None, activation: str) -> Tensor:
    """Return ``activation(gate) * up``, or the activation alone; both [..., in]."""
    check_activation(activation)
    value = F.gelu(gate, approximate="tanh") if activation == "gelu_tanh" else getattr(F, activation)(gate)
    return value if up is None else value * up


def check_activation(name: str) -> None:
    """Raise ``ValueError`` if ``name`` is not one of ``ACTIVATIONS``."""
    if name not in ACTIVATIONS:
        raise ValueError(f"activation {name!r} is not supported, only {', '.join(ACTIVATIONS)}")
