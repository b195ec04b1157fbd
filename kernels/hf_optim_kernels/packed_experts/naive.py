"""The specification of the packed experts in plain PyTorch.

Every expert ``e`` has a matrix ``W_e`` [out, in], stored as in ``wna16.naive``: codes on a grid with one scale (and
zero point) for every group of columns of a row, or float8 numbers with scales. A *pair* is a token with one of the
``k`` experts that the router chose for it. Experts with numbers from ``E`` on stand for "computed by none".

    expert_linear   y[pair] = W_e x[row of the pair]
    packed_experts  y[t] = sum over j of weights[t, j] * down_e(silu(gate_e x[t]) * up_e x[t]),  e = experts[t, j]

The weight is decoded in the dtype of the input, one chosen expert at a time: there is never a dense copy of all.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..w8a8 import naive as eight_bit
from ..wna16 import float4
from ..wna16 import naive as weight_only

FLOAT8 = torch.float8_e4m3fn
# Weights decoded at a time on a CPU: few enough for its caches, many enough for a dozen operations on them.
CHUNK = 1 << 20
# How inputs are quantized, by number: (float8, dynamic, symmetric); 0 leaves them.
INPUTS = (None, ("int8", True, True), ("int8", True, False), ("int8", False, True), ("int8", False, False),
          ("float8", True, True), ("float8", False, True))  # fmt: skip


class StackedWeight(NamedTuple):
    """The matrices [out, in] of E experts.

    Attributes:
        packed: int16 [E, k-tiles, out, slice], each made by ``wna16.naive.pack``; or float8_e4m3fn [E, out, in].
        scale: [E, groups, out], floating point; of 4-bit floats int32 [E, k-tiles, out, words], see ``wna16.float4``.
        zero: uint8 [E, groups, out] in [0, 2^width); None for the symmetric grid.
        order: int64 [E, parts, in]: stored column ``j`` of a part (an equal share of the rows: the gate and the other
            half) is column ``order[e, part, j]`` of the input; None for the identity.
        input_scale, input_zero: [E, parts], of inputs on a static grid; or None.
        width: bits of a stored code, 4 or 8.
        group_size: columns that share a scale; ``columns`` or more for one scale per row.
        columns: ``in``.
        inputs: how inputs are quantized, an index of ``INPUTS``.
        format: the kind of numbers, ``wna16.float4.INTEGER``, ``NVFP4`` or ``MXFP4``.
        divisor: float32 [E, out], of NVFP4; otherwise None.
    """

    packed: Tensor
    scale: Tensor
    zero: Tensor | None
    order: Tensor | None
    input_scale: Tensor | None
    input_zero: Tensor | None
    width: int
    group_size: int
    columns: int
    inputs: int
    format: int = float4.INTEGER
    divisor: Tensor | None = None

    @property
    def experts(self) -> int:
        """E."""
        return self.packed.shape[0]

    @property
    def rows(self) -> int:
        """``out``."""
        return self.scale.shape[2]


def storage_group(group_size: int, columns: int) -> int:
    """Return the group size by which columns are laid out: that of the scales, if the layout has it."""
    return group_size if group_size % 16 == 0 else columns


def codes(weight: StackedWeight, expert: int) -> Tensor:
    """Return the codes of an expert in their stored order: uint8 [out, in] in [0, 2^width), or float8."""
    if weight.packed.dtype == FLOAT8:
        return weight.packed[expert]
    return weight_only.unpack(weight.packed[expert], weight.width, weight.columns, weight.format)


def decode_rows(weight: StackedWeight, expert: int, begin: int, end: int, dtype: torch.dtype) -> Tensor:
    """Return rows ``begin`` to ``end`` of an expert's matrix in ``dtype``, their columns in the stored order."""
    if weight.format:
        return _decode_floats(weight, expert, begin, end).to(dtype)
    count, groups = end - begin, weight.scale.shape[1]
    scale = weight.scale[expert, :, begin:end].T.float()[..., None]
    if weight.packed.dtype == FLOAT8:
        values = weight.packed[expert, begin:end].to(torch.float32)
    else:
        words = weight.packed[expert, :, begin:end].transpose(0, 1)
        slices = weight_only.WORD // weight.width
        wide = torch.empty(count, words.shape[1], slices, words.shape[2], device=words.device)
        for place in range(slices):
            wide[:, :, place] = (words >> (place * weight.width)).bitwise_and_((1 << weight.width) - 1)
        values = wide.view(count, -1)[:, : weight.columns]
    values = values.reshape(count, groups, -1)
    if weight.packed.dtype != FLOAT8:
        zero = None if weight.zero is None else weight.zero[expert, :, begin:end].T.float()[..., None]
        values.sub_(2.0 ** (weight.width - 1) if zero is None else zero)
    return values.mul_(scale).view(count, -1).to(dtype)


def _decode_floats(weight: StackedWeight, expert: int, begin: int, end: int) -> Tensor:
    """Return rows of 4-bit floats in bfloat16, as stock transformers decodes them."""
    patterns = weight_only.unpack(weight.packed[expert, :, begin:end], weight.width, weight.columns, weight.format)
    groups = -(-weight.columns // weight.group_size)
    bytes_ = float4.unpack_scales(weight.scale[expert, :, begin:end], weight.format, groups)
    scale = float4.scale_numbers(bytes_, weight.format)
    if weight.divisor is not None:
        scale = scale / weight.divisor[expert, begin:end, None]
    numbers = float4.numbers(patterns).view(*scale.shape, -1)
    return numbers.mul_(scale[..., None]).view(end - begin, -1).to(torch.bfloat16)


def dequantize(weight: StackedWeight, expert: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the matrix [out, in] of an expert in ``dtype``, its columns in the order of the input."""
    dense = decode_rows(weight, expert, 0, weight.rows, dtype)
    if weight.order is None:
        return dense
    orders = weight.order[expert]
    parts = [
        torch.empty_like(part).index_copy_(1, order, part)
        for part, order in zip(dense.chunk(len(orders)), orders, strict=True)
    ]
    return torch.cat(parts)


def linear(x: Tensor, weight: StackedWeight, expert: int) -> Tensor:
    """Return the rows ``x`` [n, in] times the matrix of one expert: [n, out].

    On a CPU a few rows of the matrix are decoded at a time, which stay in the cache for the product.
    """
    out = x.new_empty(len(x), weight.rows)
    parts = max(1 if t is None else t.shape[1] for t in (weight.order, weight.input_scale))
    size = weight.rows // parts
    step = size if x.is_cuda else max(16, CHUNK // max(1, weight.columns))
    for part in range(parts):
        own = _inputs(x, weight, expert, part)
        for begin in range(part * size, (part + 1) * size, step):
            end = min(begin + step, (part + 1) * size)
            out[:, begin:end] = F.linear(own, decode_rows(weight, expert, begin, end, x.dtype))
    return out


def _inputs(x: Tensor, weight: StackedWeight, expert: int, part: int) -> Tensor:
    """Return the input of a part, rounded to its grid, its columns in the stored order."""
    grid = INPUTS[weight.inputs]
    if grid is not None:
        kind, dynamic, symmetric = grid
        scale = zero = None
        if not dynamic and weight.input_scale is not None:
            scale = weight.input_scale[expert, part]
            zero = None if weight.input_zero is None else weight.input_zero[expert, part]
        x = _rounded(x, kind == "float8", symmetric, scale, zero)
    return x if weight.order is None else x[:, weight.order[expert, part]]


def _rounded(x: Tensor, float8: bool, symmetric: bool, scale: Tensor | None, zero: Tensor | None) -> Tensor:
    found, scale, zero = eight_bit.quantize(x, float8, symmetric, scale, zero)
    return eight_bit.dequantize(found, scale, zero, x.dtype)


def chosen(experts: Tensor, count: int) -> Iterator[tuple[int, Tensor]]:
    """Yield the number of each chosen expert with its pairs, int64 [n], in their order. experts: int64 [T, k]."""
    flat = experts.reshape(-1)
    ordered, order = torch.sort(flat, stable=True)
    numbers, sizes = (each.tolist() for each in torch.unique_consecutive(ordered, return_counts=True))
    for number, pairs in zip(numbers, order.split(sizes), strict=True):
        if 0 <= number < count:
            yield number, pairs


def pairs_per_row(x: Tensor, experts: Tensor) -> int:
    """Return how many pairs read the same row: ``k`` for rows of tokens, 1 for rows of pairs."""
    return experts.shape[1] if len(x) != experts.numel() else 1


def expert_linear(x: Tensor, experts: Tensor, weight: StackedWeight) -> Tensor:
    """Return the product of each pair, [T k, out]; zeros for pairs that no expert computes.

    Args:
        x: [T, in], or [T k, in] with a row for each pair.
        experts: int64 [T, k].
    """
    out = x.new_zeros(experts.numel(), weight.rows)
    each = pairs_per_row(x, experts)
    for number, pairs in chosen(experts, weight.experts):
        out[pairs] = linear(x[pairs // each], weight, number)
    return out


def expert_linear_grad(grad: Tensor, experts: Tensor, weight: StackedWeight) -> Tensor:
    """Return the gradient of each pair's input, [T k, in], from that of its product [T k, out]."""
    out = grad.new_zeros(len(grad), weight.columns)
    for number, pairs in chosen(experts, weight.experts):
        out[pairs] = grad[pairs] @ dequantize(weight, number, grad.dtype)
    return out


def packed_experts(hidden: Tensor, experts: Tensor, weights: Tensor, up: StackedWeight, down: StackedWeight) -> Tensor:
    """Return the output [T, d] of experts with a SiLU gate.

    Args:
        hidden: [T, d].
        experts: int64 [T, k].
        weights: [T, k].
        up: [2 I, d], the rows of the gate first.
        down: [d, I].
    """
    gate, other = expert_linear(hidden, experts, up).chunk(2, dim=-1)
    inner = F.silu(gate) * other
    return combine(expert_linear(inner, experts, down), weights, hidden.dtype)


def combine(pairs: Tensor, weights: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the weighted sum [T, d] of the outputs [T k, d] of pairs; weights: [T, k]."""
    weighted = pairs * weights.reshape(-1, 1)
    return weighted.view(*weights.shape, pairs.shape[1]).sum(dim=1).to(dtype)
