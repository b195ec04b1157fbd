"""Weight-only quantized linear layers on a CPU: PyTorch's own packed operators, where they are right and faster.

Codes of up to 4 bits run on ``aten::_weight_int4pack_mm_for_cpu`` (groups of 32, 64, 128 or 256 columns, rows in
sixteens), codes of 5 to 8 bits on ``aten::_weight_int8pack_mm`` (one scale a row, symmetric, columns in sixteens). Both
read and write bfloat16; other types run up to a hundred times slower than dense. They serve models in bfloat16, and in
float16, whose inputs are rounded to it: results differ from the dense ones by about 0.3 % (norm of the difference over
norm).

Models in float32 stay dense (``DenseLinear``). A sum of three bfloat16 parts would carry the input through, but the
operators round their output too. The exact way round is three int8 digits of each input through ``aten::_int_mm``, for
one scale a row alone: for one row of 2048 x 2048 weights that product takes 673 us against 816 dense, for 256 x 256 15
against 11, and the digits are not made yet. ``DenseLinear`` has the decoded weight and calls ``linear``: the numbers of
stock's reload, without compressed-tensors' forward around it, which alone costs a small layer more than its product.

Measured with torch 2.13, one thread of a 2.8 GHz Ice Lake (AVX512 without bfloat16 products), the best of several, in
microseconds, as packed / dense in bfloat16::

    int4, out x in    1 row        8 rows       32 rows       256 rows
    256 x 256         10 / 20      27 / 78      92 / 178      644 / 1168
    1536 x 384        49 / 117     129 / 395    465 / 1241    3912 / 9452
    2048 x 2048       288 / 563    1351 / 3697  4229 / 10416  36165 / 66799
    int8
    256 x 256         15 / 20      35 / 78      130 / 178     970 / 1168
    2048 x 2048       271 / 563    1195 / 3697  4445 / 10416  44162 / 66799
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..common.codes import Codes

INT4_GROUPS = (256, 128, 64, 32)
INT4_ROWS = 16
# With other numbers of columns the int8 operator reads past the end of its operands.
INT8_COLUMNS = 16
CAPABILITIES = ("AVX2", "AVX512")
DTYPES = (torch.bfloat16, torch.float16)
# On a CPU that multiplies bfloat16 itself the dense product takes more rows than this.
MOST_ROWS = 8
# bfloat16 scales and zero points move the weight; more than this (norm over norm) and the layer stays dense.
MOST_ERROR = 2.0**-8


def unsupported_reason(weight: Any) -> str | None:
    """Why an ``hf_optim.compressed.weights.QuantizedWeight`` stays dense on this CPU; None where it need not."""
    rows, columns = weight.shape
    capability = torch.backends.cpu.get_cpu_capability()
    if weight.dtype == torch.float32:
        return None
    if weight.dtype not in DTYPES:
        return f"{str(weight.dtype).removeprefix('torch.')} inputs; served are float32, bfloat16 and float16"
    if capability not in CAPABILITIES:
        return f"PyTorch's packed operators were measured with {' and '.join(CAPABILITIES)}, this CPU has {capability}"
    if weight.ordered:
        return "its columns are reordered; PyTorch's packed operators have no order"
    return _unsupported_int4(weight, rows) if weight.bits <= 4 else _unsupported_int8(weight, columns)


def _unsupported_int4(weight: Any, rows: int) -> str | None:
    if _int4_group(weight.group_size) is None:
        return f"groups of {weight.group_size} columns; PyTorch's int4 operator has {', '.join(map(str, INT4_GROUPS))}"
    return f"{rows} rows are no multiple of {INT4_ROWS}" if rows % INT4_ROWS else None


def _unsupported_int8(weight: Any, columns: int) -> str | None:
    if weight.group_size < columns:
        return f"groups of {weight.group_size} columns; PyTorch's int8 operator has one scale a row"
    if columns % INT8_COLUMNS:
        return f"{columns} columns are no multiple of {INT8_COLUMNS}"
    return None if weight.symmetric else "zero points; PyTorch's int8 operator has none"


def _int4_group(group_size: int) -> int | None:
    """The largest group of the operator that divides a group of the weight, whose scale is then repeated."""
    return next((size for size in INT4_GROUPS if group_size % size == 0), None)


def prepack(weight: Any) -> nn.Module:
    """The packed weight of a weight for which ``unsupported_reason`` is None.

    Raises ``ValueError`` when bfloat16 scales and zero points do not represent the weight well enough, or float32
    values do not tell its codes apart (scales of 0 or beyond any range).
    """
    bias = None if weight.bias is None else weight.bias.detach()
    if weight.dtype == torch.float32:
        return DenseLinear(weight.codes(), weight.bits, weight.group_size, bias)
    kind = Int4Linear if weight.bits <= 4 else Int8Linear
    return kind(weight.codes(), weight.bits, weight.group_size, weight.dtype, bias)


class CpuPackedWeight(nn.Module):
    """``x W^T + bias`` on a packed operator of PyTorch.

    Attributes:
        packed: the codes, in the operator's layout.
        scale: [out, groups], as the checkpoint has it; zero: uint8 [out, groups], or None.
        bias: [out], or None.
    """

    packed: Tensor
    scale: Tensor
    zero: Tensor | None
    bias: Tensor | None

    def __init__(
        self, found: Any, bits: int, group_size: int, dtype: torch.dtype, bias: Tensor | None, label: str
    ) -> None:
        super().__init__()
        self.bits, self.group_size, self.dtype, self.label = bits, group_size, dtype, label
        self.dense_rows = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        self.register_buffer("scale", found.scale)
        self.register_buffer("zero", found.zero)
        self.register_buffer("bias", bias)

    def accepts(self, x: Tensor) -> bool:
        """Whether the operator has this input's type and device."""
        return x.dtype == self.dtype and x.device == self.packed.device

    def forward(self, x: Tensor) -> Tensor:
        """``x`` [..., in] -> [..., out]."""
        if x.requires_grad and torch.is_grad_enabled():
            return _Differentiable.apply(x, self)
        return self.apply_to(x)

    def apply_to(self, x: Tensor) -> Tensor:
        """``forward`` without a gradient."""
        flat = x.reshape(-1, x.shape[-1])
        if not len(flat) or (self.dense_rows and len(flat) > MOST_ROWS):
            return F.linear(x, self.decoded(x.dtype), self.bias)
        y = self.multiply(flat.to(torch.bfloat16).contiguous()).to(x.dtype)
        return (y if self.bias is None else y.add_(self.bias)).view(*x.shape[:-1], y.shape[-1])

    def multiply(self, x: Tensor) -> Tensor:
        """``x`` [rows, in] in bfloat16 -> [rows, out]."""
        raise NotImplementedError

    def codes(self) -> Codes:
        """The codes, scales and zero points it was made of, bit for bit."""
        raise NotImplementedError

    def decoded(self, dtype: torch.dtype) -> Tensor:
        """The weight [out, in]."""
        return _decode(self.codes(), self.bits, self.group_size).to(dtype)


class Int4Linear(CpuPackedWeight):
    """``aten::_weight_int4pack_mm_for_cpu``: ``(code - 8) * scale + shift``, scale and shift in bfloat16.

    Codes of fewer bits are moved to the middle of its grid, which keeps the shift, and its rounding, small.

    Attributes:
        pair: bfloat16 [groups, out, 2], scale and shift; the groups are the operator's.
    """

    pair: Tensor

    def __init__(self, found: Any, bits: int, group_size: int, dtype: torch.dtype, bias: Tensor | None) -> None:
        super().__init__(found, bits, group_size, dtype, bias, f"PyTorch int4 (CPU), {bits}-bit codes")
        group = _int4_group(group_size)
        assert group is not None
        self.group = group
        scale, middle = found.scale.float(), 2 ** (bits - 1)
        shift = torch.zeros_like(scale) if found.zero is None else (middle - found.zero.float()) * scale
        pair = torch.stack((scale, shift), dim=-1).to(torch.bfloat16)
        _check(found, bits, group_size, pair.float())
        self.register_buffer(
            "packed", torch.ops.aten._convert_weight_to_int4pack_for_cpu(found.codes.int() + (8 - middle), 1)
        )
        self.register_buffer("pair", pair.repeat_interleave(group_size // group, 1).transpose(0, 1).contiguous())

    def multiply(self, x: Tensor) -> Tensor:
        return torch.ops.aten._weight_int4pack_mm_for_cpu(x, self.packed, self.group, self.pair)

    def codes(self) -> Codes:
        return Codes(_unpack_int4(self.packed) - (8 - 2 ** (self.bits - 1)), self.scale, self.zero, None)


class Int8Linear(CpuPackedWeight):
    """``aten::_weight_int8pack_mm`` on codes less their middle."""

    def __init__(self, found: Any, bits: int, group_size: int, dtype: torch.dtype, bias: Tensor | None) -> None:
        super().__init__(found, bits, group_size, dtype, bias, f"PyTorch int8 (CPU), {bits}-bit codes")
        self.register_buffer("packed", (found.codes.to(torch.int16) - 2 ** (bits - 1)).to(torch.int8))
        # The operator multiplies by one, and the scale comes after it in float32: no rounding of scales.
        self.register_buffer("ones", torch.ones(self.packed.shape[0], dtype=torch.bfloat16))
        self.register_buffer("factor", found.scale.flatten().float())

    def multiply(self, x: Tensor) -> Tensor:
        return torch.ops.aten._weight_int8pack_mm(x, self.packed, self.ones) * self.factor

    def codes(self) -> Codes:
        codes = (self.packed.to(torch.int16) + 2 ** (self.bits - 1)).to(torch.uint8)
        return Codes(codes, self.scale, self.zero, None)


class DenseLinear(nn.Module):
    """``x W^T + bias`` in float32 with the decoded weight, which no packed operator of PyTorch has the precision for.

    Attributes:
        dense: float32 [out, in], columns in the order of the input.
        scale: [out, groups], as the checkpoint has it; zero: uint8 [out, groups], or None.
        order: int64 [in]: stored column ``j`` is column ``order[j]`` of the input; None for the identity.
        bias: [out], or None.
    """

    dense: Tensor
    scale: Tensor
    zero: Tensor | None
    order: Tensor | None
    bias: Tensor | None

    def __init__(self, found: Any, bits: int, group_size: int, bias: Tensor | None) -> None:
        super().__init__()
        self.bits, self.group_size = bits, group_size
        self.label = "dense float32 (PyTorch's packed operators round to bfloat16)"
        decoded = _decode(found, bits, group_size)
        if found.order is not None:
            decoded = torch.empty_like(decoded).index_copy_(1, found.order, decoded)
        for name, value in (("dense", decoded), ("scale", found.scale), ("zero", found.zero), ("order", found.order)):
            self.register_buffer(name, value)
        self.register_buffer("bias", bias)
        if not torch.equal(self.codes().codes, found.codes):
            raise ValueError("float32 does not tell its codes apart")

    def accepts(self, x: Tensor) -> bool:
        """Whether the input is of the weight's type and device."""
        return x.dtype == torch.float32 and x.device == self.dense.device

    def forward(self, x: Tensor) -> Tensor:
        """``x`` [..., in] -> [..., out]."""
        return F.linear(x, self.dense, self.bias)

    def codes(self) -> Codes:
        """The codes, scales and zero points it was made of, bit for bit."""
        stored = self.dense if self.order is None else self.dense[:, self.order]
        grouped = stored.view(len(stored), -1, self.group_size)
        zero = 2.0 ** (self.bits - 1) if self.zero is None else self.zero.float()[..., None]
        steps = (grouped / self.scale.float()[..., None]).round_().add_(zero)
        return Codes(steps.to(torch.uint8).view(stored.shape), self.scale, self.zero, self.order)


class _Differentiable(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, packed_weight: CpuPackedWeight) -> Tensor:
        ctx.packed_weight = packed_weight
        return packed_weight.apply_to(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return grad @ ctx.packed_weight.decoded(grad.dtype), None


def _decode(found: Any, bits: int, group_size: int) -> Tensor:
    zero = 2.0 ** (bits - 1) if found.zero is None else found.zero.float()[..., None]
    grouped = found.codes.view(len(found.codes), -1, group_size).float()
    return ((grouped - zero) * found.scale.float()[..., None]).view(found.codes.shape)


def _check(found: Any, bits: int, group_size: int, pair: Tensor) -> None:
    """``pair`` [out, groups, 2]: scale and shift as the operator will have them."""
    wanted = _decode(found, bits, group_size)
    grouped = found.codes.view(len(found.codes), -1, group_size).float() - 2 ** (bits - 1)
    made = (grouped * pair[..., :1] + pair[..., 1:]).view(wanted.shape)
    error = (made - wanted).norm() / wanted.norm().clamp_min(torch.finfo(torch.float32).tiny)
    if not float(error) <= MOST_ERROR:
        raise ValueError(f"bfloat16 scales would move its weight by {float(error):.1e}")


def _unpack_int4(packed: Tensor) -> Tensor:
    """The codes uint8 [out, in] of an int4 weight [out, in / 2].

    The layout differs by CPU, and PyTorch has no inverse. But packing only moves codes: weights whose codes are the
    digits (base 16) of each place's number, packed alike, tell where every code came from.
    """
    rows, columns = packed.shape[0], packed.shape[1] * 2
    numbers = torch.arange(rows * columns).view(rows, columns)
    origin = torch.zeros(rows * columns, dtype=torch.int64)
    for shift in range(0, max((rows * columns - 1).bit_length(), 1), 4):
        digits = ((numbers >> shift) & 15).int()
        origin |= _nibbles(torch.ops.aten._convert_weight_to_int4pack_for_cpu(digits, 1)).long() << shift
    codes = torch.empty(rows * columns, dtype=torch.uint8)
    codes[origin] = _nibbles(packed)
    return codes.view(rows, columns)


def _nibbles(packed: Tensor) -> Tensor:
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten()


def join(packed_weights: list[Any]) -> CpuPackedWeight | None:
    """One packed weight whose output is those of ``packed_weights`` side by side; None where they differ in more than
    rows.

    Dense packed weights do not join: a wider product has another order of summation.
    """
    first = packed_weights[0]
    if isinstance(first, DenseLinear) or any(_kind(o) != _kind(first) for o in packed_weights):
        return None
    parts = [o.codes() for o in packed_weights]
    if any(part.order is not None for part in parts):
        return None
    zero = None if first.zero is None else torch.cat([p.zero for p in parts if p.zero is not None])
    found = Codes(torch.cat([p.codes for p in parts]), torch.cat([p.scale for p in parts]), zero, None)
    bias = None if first.bias is None else torch.cat([o.bias for o in packed_weights if o.bias is not None])
    return type(first)(found, first.bits, first.group_size, first.dtype, bias)  # type: ignore[call-arg]


def _kind(packed_weight: Any) -> tuple[Any, ...]:
    if not isinstance(packed_weight, CpuPackedWeight):
        return (type(packed_weight),)
    shape = packed_weight.packed.shape[1]
    absent = packed_weight.zero is None, packed_weight.bias is None
    return (
        type(packed_weight),
        packed_weight.bits,
        packed_weight.group_size,
        packed_weight.dtype,
        packed_weight.scale.dtype,
        shape,
        absent,
    )
