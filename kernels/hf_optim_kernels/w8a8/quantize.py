"""Triton kernels that quantize rows, alone or as the epilogue of the operation that computes the rows.

A program computes one whole row in registers, so that its largest magnitude and its codes cost one reading. Magnitudes
are compared as integers, since ``tl.max`` of floats would lose a NaN. ``naive`` has the equations.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.dense import as_rows
from ..common.launch import is_aligned, launch
from ..common.numerics import INFINITY_BITS, ROUND, divide, magnitude
from . import naive

# The operations whose epilogue quantizes: none, a norm, or an activation with or without a factor.
PLAIN, RMS_NORM, LAYER_NORM, GATED = range(4)


@triton.jit
def token_grid(top, low, high, DTYPE: tl.constexpr, EPS: tl.constexpr, FLOAT8: tl.constexpr, ASYMMETRIC: tl.constexpr):
    """Return scales (float32) and zero points (int32) of rows, from their magnitudes (bits), minima and maxima."""
    peak = top.to(tl.float32, bitcast=True)
    levels = tl.full(top.shape, 448.0 if FLOAT8 else 127.5, tl.float32)
    if ASYMMETRIC:
        scale = divide((high - low).to(DTYPE).to(tl.float32), tl.full(top.shape, 255.0, tl.float32))
    else:
        scale = divide(peak, levels)
    scale = scale.to(DTYPE).to(tl.float32)
    scale = tl.where(scale == 0.0, EPS, scale)
    zero = tl.zeros(top.shape, tl.int32)
    if ASYMMETRIC:
        ratio = divide(low, scale).to(DTYPE).to(tl.float32)
        shift = (-128.0 - ratio).to(DTYPE).to(tl.float32)
        zero = ((tl.minimum(tl.maximum(shift, -128.0), 127.0) + ROUND) - ROUND).to(tl.int32)
    return tl.where(top >= INFINITY_BITS, peak, scale), zero


@triton.jit
def encode(x, scale, zero, DTYPE: tl.constexpr, FLOAT8: tl.constexpr, ASYMMETRIC: tl.constexpr):
    """Return codes (int8 or float8) of float32 values, ``scale`` and ``zero`` broadcasting against them."""
    if DTYPE == tl.bfloat16:  # noqa: SIM108, SIM300
        # A quotient of two bfloat16 is never within 2^-17 of a tie, so the reciprocal rounds the same way.
        steps = x * (1.0 / scale)
    else:
        steps = divide(x, scale)
    steps = steps.to(DTYPE).to(tl.float32)
    if ASYMMETRIC:
        steps = (steps + zero.to(tl.float32)).to(DTYPE).to(tl.float32)
    if FLOAT8:
        # NaN must pass, and it does: comparisons with it are false.
        steps = tl.where(steps > 448.0, 448.0, tl.where(steps < -448.0, -448.0, steps))
        return steps.to(tl.float8e4nv)
    else:
        steps = tl.minimum(tl.maximum(steps, -128.0), 127.0)
        return ((steps + ROUND) - ROUND).to(tl.int8)


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    if ACTIVATION == "silu":
        return x * tl.sigmoid(x)
    elif ACTIVATION == "gelu":
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        # (1 + tanh(u)) / 2 = sigmoid(2 u)
        return x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    else:
        return tl.where(x < 0.0, 0.0, x)  # keeps NaN


@triton.jit(do_not_specialize=["eps"])
def rows_kernel(
    x, second, third, static_scale, static_zero, codes, scales, zeros, full, eps, K, x_stride, second_stride,
    FUSED_OP: tl.constexpr, ACTIVATION: tl.constexpr, HAS_SECOND: tl.constexpr, HAS_THIRD: tl.constexpr,
    KEEP: tl.constexpr, STATIC: tl.constexpr, FLOAT8: tl.constexpr, ASYMMETRIC: tl.constexpr, EPS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Program m computes row m: ``x`` is the input or gate, ``second`` the weight of a norm or the factor of a gate."""
    DTYPE: tl.constexpr = x.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)[None, :]
    inside = column < K
    value = tl.load(x + row * x_stride + column, inside, 0.0).to(tl.float32)
    if FUSED_OP == 1:
        value = value * tl.rsqrt(tl.sum(value * value, 1, keep_dims=True) / K + eps)
        weight = tl.load(second + column, inside, 0.0).to(tl.float32)
        value = (value.to(DTYPE).to(tl.float32) * weight).to(DTYPE).to(tl.float32)
    elif FUSED_OP == 2:
        value = tl.where(inside, value - tl.sum(value, 1, keep_dims=True) / K, 0.0)
        value = value * tl.rsqrt(tl.sum(value * value, 1, keep_dims=True) / K + eps)
        value = value * tl.load(second + column, inside, 0.0).to(tl.float32)
        if HAS_THIRD:
            value += tl.load(third + column, inside, 0.0).to(tl.float32)
        value = value.to(DTYPE).to(tl.float32)
    elif FUSED_OP == 3:
        value = activate(value, ACTIVATION).to(DTYPE).to(tl.float32)
        if HAS_SECOND:
            factor = tl.load(second + row * second_stride + column, inside, 0.0).to(tl.float32)
            value = (value * factor).to(DTYPE).to(tl.float32)
    if KEEP:
        tl.store(full + row * K + column, value.to(DTYPE), inside)
    top = tl.max(magnitude(value), 1, keep_dims=True)
    if STATIC:
        scale = tl.zeros([1, 1], tl.float32) + tl.load(static_scale).to(tl.float32)
        zero = tl.zeros([1, 1], tl.int32)
        if ASYMMETRIC:
            zero += tl.load(static_zero).to(tl.int32)
        shown = tl.where(top >= INFINITY_BITS, top.to(tl.float32, bitcast=True), scale)
    else:
        low = tl.minimum(tl.min(value, 1, keep_dims=True), 0.0)
        high = tl.maximum(tl.max(value, 1, keep_dims=True), 0.0)
        scale, zero = token_grid(top, low, high, DTYPE, EPS, FLOAT8, ASYMMETRIC)
        shown = scale
    tl.store(codes + row * K + column, encode(value, scale, zero, DTYPE, FLOAT8, ASYMMETRIC), inside)
    one = tl.zeros([1, 1], tl.int32)
    tl.store(scales + row + one, shown)
    if ASYMMETRIC:
        tl.store(zeros + row + one, zero)


def quantize_rows(
    x: Tensor, float8: bool, symmetric: bool, scale: Tensor | None = None, zero: Tensor | None = None, *,
    fused_op: int = PLAIN, second: Tensor | None = None, third: Tensor | None = None, activation: str = "",
    eps: float = 0.0, keep: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return codes [..., in], scales [...], zero points [...] (or [0]) and, with ``keep``, the row [..., in] (or [0]).

    Args:
        x: [..., in], the rows, or the input of ``fused_op``, which computes them.
        float8, symmetric, scale, zero: the grid, as in ``naive.quantize``.
        second: the weight [in] of a norm, or the factor [..., in] of an activation.
        third: the bias [in] of a LayerNorm.
        activation, eps: of ``fused_op``.
    """
    flat = as_rows(x)
    M, K = flat.shape
    factor = None if second is None else (as_rows(second) if fused_op == GATED else second)
    codes = torch.empty(x.shape, dtype=naive.FLOAT8 if float8 else torch.int8, device=x.device)
    scales = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    zeros = torch.empty(x.shape[:-1] if not symmetric else 0, dtype=torch.int32, device=x.device)
    full = torch.empty(x.shape if keep else 0, dtype=x.dtype, device=x.device)
    if not M or not K:
        return codes, scales.fill_(torch.finfo(x.dtype).eps), zeros.zero_(), full
    block = max(16, triton.next_power_of_2(K))
    warps = min(16, max(1, block // 512))
    stride = factor.stride(0) if factor is not None else 0
    constants = {
        "FUSED_OP": fused_op, "ACTIVATION": activation, "HAS_SECOND": factor is not None,
        "HAS_THIRD": third is not None, "KEEP": keep, "STATIC": scale is not None, "FLOAT8": float8,
        "ASYMMETRIC": not symmetric, "EPS": torch.finfo(x.dtype).eps, "BLOCK": block,
    }  # fmt: skip
    others = [t if t is not None else flat for t in (factor, third, scale, zero)]
    key = (
        *constants.values(), K, flat.stride(0), stride, *(t.dtype for t in (flat, *others)), is_aligned(flat, *others)
    )  # fmt: skip
    args = (flat, *others, codes, scales, zeros, full, eps, K, flat.stride(0), stride)
    launch(rows_kernel, (M, 1, 1), args, constants, num_warps=warps, num_stages=1, key=key)
    return codes, scales, zeros, full
