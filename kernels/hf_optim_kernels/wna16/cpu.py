"""Weight-only quantized linear layers on a CPU: PyTorch's own packed operators, where they are correct and faster.

Codes of up to 4 bits run on ``aten::_weight_int4pack_mm_for_cpu`` (groups of 32, 64, 128 or 256 columns, rows in
multiples of 16), codes of 5 to 8 bits on ``aten::_weight_int8pack_mm`` (one scale per row, symmetric, columns in
multiples of 16). Both read and write bfloat16; other dtypes run up to a hundred times slower than dense. They are used
for models in bfloat16, and in float16, whose inputs are rounded to it: results differ from the dense ones by about
0.3 % (norm of the difference over norm).

Models in float32 stay dense (``DenseLinear``). A sum of three bfloat16 parts would represent the input, but the
operators round their output too. The exact alternative is three int8 digits of each input through ``aten::_int_mm``,
for one scale per row only: for one row of 2048 x 2048 weights that product takes 673 us against 816 dense, for 256 x
256 15 against 11, digits not included. ``DenseLinear`` has the decoded weight and calls ``linear``: the numbers of a
stock reload, without compressed-tensors' forward around it, which alone costs a small layer more than its product.

Measured with torch 2.13, one thread of a 2.8 GHz Ice Lake (AVX512 without bfloat16 products), the best of several, in
microseconds, as packed / dense in bfloat16::

    int4, out x in    1 row        8 rows       32 rows       256 rows
    256 x 256         10 / 20      27 / 78      92 / 178      644 / 1168
    1536 x 384        49 / 117     129 / 395    465 / 1241    3912 / 9452
    2048 x 2048       288 / 563    1351 / 3697  4229 / 10416  36165 / 66799
    int8
    256 x 256         15 / 20      35 / 78      130 / 178     970 / 1168
    2048 x 2048       271 / 563    1195 / 3697  4445 / 10416  44162 / 66799

On a CPU with bfloat16 products (AVX512-BF16) dense products are faster from some tens of rows on, also if parts of the
weight are decoded for each call; no way that keeps codes alone is as fast as a dense weight there, since decoding a
weight takes as long as multiplying it by some tens of rows. 5632 x 1024 weights, one thread of a busy host,
milliseconds of CPU time, as packed operator / parts decoded / dense in bfloat16::

                      8 rows           16 rows          32 rows          64 rows          128 rows        512 rows
    int4, groups 128                   2.2 / 5.5 / 2.0  4.4 / 6.4 / 2.8  8.6 / 8.4 / 4.6  17 / 12 / 7.8   68 / 35 / 29
    int8              1.8 / 1.7 / 1.4  3.1 / 2.2 / 1.8  6.4 / 3.1 / 2.8                   22 / 8.8 / 7.7
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..common.codes import Codes
from ..common.cpu_linear import CpuLinear, cat_optional
from ..common.support import unsupported_dtype

INT4_GROUPS = (256, 128, 64, 32)
INT4_ROWS = 16
# Rows of a block of the operator's layout, with AVX512 and with AVX2.
INT4_BLOCKS = (64, 32)
# Weights that are decoded at a time: few enough for the caches.
DECODED = 1 << 20
# With other numbers of columns the int8 operator reads past the end of its operands.
INT8_COLUMNS = 16
CAPABILITIES = ("AVX2", "AVX512")
DTYPES = (torch.bfloat16, torch.float16)
# On a CPU with bfloat16 instructions, dense products with parts of the decoded weight are used for more rows than this.
INT4_MOST_ROWS, INT8_MOST_ROWS = 64, 12
DENSE = "dense float32 (PyTorch's packed operators round to bfloat16)"
# bfloat16 scales and zero points change the weight; beyond this (norm over norm) the layer stays dense.
MOST_ERROR = 2.0**-8


def unsupported_reason(weight: Any) -> str | None:
    """Return why a ``QuantizedWeight`` (of ``hf_optim.compressed.weights``) stays dense on this CPU, or None."""
    rows, columns = weight.shape
    capability = torch.backends.cpu.get_cpu_capability()
    if weight.dtype == torch.float32:
        return None
    if weight.dtype not in DTYPES:
        return unsupported_dtype(weight.dtype, (torch.float32, *DTYPES))
    if capability not in CAPABILITIES:
        return f"PyTorch's packed operators were measured with {' and '.join(CAPABILITIES)}, this CPU has {capability}"
    if weight.ordered:
        return "its columns are reordered, which PyTorch's packed operators do not support"
    return _unsupported_int4(weight, rows) if weight.bits <= 4 else _unsupported_int8(weight, columns)


def _unsupported_int4(weight: Any, rows: int) -> str | None:
    if _int4_group(weight.group_size) is None:
        groups = ", ".join(map(str, INT4_GROUPS))
        return f"group size {weight.group_size} is not a multiple of those of PyTorch's int4 operator ({groups})"
    return f"{rows} rows are not a multiple of {INT4_ROWS}" if rows % INT4_ROWS else None


def _unsupported_int8(weight: Any, columns: int) -> str | None:
    if weight.group_size < columns:
        return f"group size {weight.group_size}: PyTorch's int8 operator has one scale per row"
    if columns % INT8_COLUMNS:
        return f"{columns} columns are not a multiple of {INT8_COLUMNS}"
    return None if weight.symmetric else "it has zero points, PyTorch's int8 operator has none"


def _int4_group(group_size: int) -> int | None:
    """Return the largest group size of the operator that divides that of the weight, whose scale is then repeated."""
    return next((size for size in INT4_GROUPS if group_size % size == 0), None)


def prepack(weight: Any) -> nn.Module:
    """Return the packed form of a weight for which ``unsupported_reason`` is None.

    Raises ``ValueError`` if bfloat16 scales and zero points do not represent the weight well enough, or its codes
    cannot be recovered from float32 values (scales of 0 or out of range).
    """
    bias = None if weight.bias is None else weight.bias.detach()
    if weight.dtype == torch.float32:
        return DenseLinear(weight.codes(), weight.bits, weight.group_size, bias)
    kind = Int4Linear if weight.bits <= 4 else Int8Linear
    return kind(weight.codes(), weight.bits, weight.group_size, weight.dtype, bias)


class CpuPackedWeight(CpuLinear):
    """``x W^T + bias`` on a packed operator of PyTorch.

    Attributes:
        scale: [out, groups], as in the checkpoint; zero: uint8 [out, groups], or None.
        bias: [out], or None.
    """

    scale: Tensor
    zero: Tensor | None
    bias: Tensor | None

    def __init__(
        self, found: Any, bits: int, group_size: int, dtype: torch.dtype, bias: Tensor | None, label: str
    ) -> None:
        super().__init__()
        self.bits, self.group_size, self.dtype, self.label = bits, group_size, dtype, label
        self.register_buffer("scale", found.scale)
        self.register_buffer("zero", found.zero)
        self.register_buffer("bias", bias)

    def product(self, x: Tensor) -> Tensor:
        """See ``CpuLinear``."""
        flat = x.reshape(-1, x.shape[-1])
        if not len(flat):
            return F.linear(x, self.decoded(x.dtype), self.bias)
        narrow = flat.to(torch.bfloat16).contiguous()
        y = self.multiply(narrow).to(x.dtype)
        return (y if self.bias is None else y.add_(self.bias)).view(*x.shape[:-1], y.shape[-1])

    def multiply(self, x: Tensor) -> Tensor:
        """Return the product [rows, out] of ``x`` [rows, in] in bfloat16, without the bias."""
        raise NotImplementedError

    def codes(self) -> Codes:
        """Return codes, scales and zero points, bitwise identical to those it was packed from."""
        raise NotImplementedError

    def decoded(self, dtype: torch.dtype) -> Tensor:
        """See ``CpuLinear``."""
        return _decode(self.codes(), self.bits, self.group_size).to(dtype)


class Int4Linear(CpuPackedWeight):
    """``aten::_weight_int4pack_mm_for_cpu``: ``(code - 8) * scale + shift``, scale and shift in bfloat16.

    Codes of fewer bits are moved to the center of its grid, which keeps the shift, and its rounding, small.

    Attributes:
        pair: bfloat16 [groups, out, 2], scale and shift; the groups are the operator's.
    """

    pair: Tensor

    def __init__(self, found: Any, bits: int, group_size: int, dtype: torch.dtype, bias: Tensor | None) -> None:
        super().__init__(found, bits, group_size, dtype, bias, f"PyTorch int4 (CPU), {bits}-bit codes")
        group = _int4_group(group_size)
        assert group is not None
        self.group = group
        scale, zero_offset = found.scale.float(), 2 ** (bits - 1)
        shift = torch.zeros_like(scale) if found.zero is None else (zero_offset - found.zero.float()) * scale
        pair = torch.stack((scale, shift), dim=-1).to(torch.bfloat16)
        _check(found, bits, group_size, pair.float())
        codes = found.codes.int() + (8 - zero_offset)
        self.register_buffer("packed", torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1))
        self.register_buffer("pair", pair.repeat_interleave(group_size // group, 1).transpose(0, 1).contiguous())

    def multiply(self, x: Tensor) -> Tensor:
        return int4_product(x, self.packed, self.pair, self.group)

    def codes(self) -> Codes:
        return Codes(_unpack_int4(self.packed) - (8 - 2 ** (self.bits - 1)), self.scale, self.zero, None)


class Int8Linear(CpuPackedWeight):
    """``aten::_weight_int8pack_mm`` on codes minus their zero offset.

    Attributes:
        factor: float32 [out], the scales; ones: bfloat16 [out], what the operator multiplies by in their place.
    """

    factor: Tensor
    ones: Tensor

    def __init__(self, found: Any, bits: int, group_size: int, dtype: torch.dtype, bias: Tensor | None) -> None:
        super().__init__(found, bits, group_size, dtype, bias, f"PyTorch int8 (CPU), {bits}-bit codes")
        self.register_buffer("packed", (found.codes.to(torch.int16) - 2 ** (bits - 1)).to(torch.int8))
        # The operator multiplies by ones and the scale is applied afterwards in float32: scales are not rounded.
        self.register_buffer("ones", torch.ones(self.packed.shape[0], dtype=torch.bfloat16))
        self.register_buffer("factor", found.scale.flatten().float())

    def multiply(self, x: Tensor) -> Tensor:
        return int8_product(x, self.packed, self.factor, self.ones)

    def codes(self) -> Codes:
        codes = (self.packed.to(torch.int16) + 2 ** (self.bits - 1)).to(torch.uint8)
        return Codes(codes, self.scale, self.zero, None)


class DenseLinear(nn.Module):
    """``x W^T + bias`` in float32 with the decoded weight: PyTorch's packed operators lack the precision.

    Attributes:
        dense: float32 [out, in], columns in the order of the input.
        scale: [out, groups], as in the checkpoint; zero: uint8 [out, groups], or None.
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
        self.label = DENSE
        decoded = _decode(found, bits, group_size)
        if found.order is not None:
            decoded = torch.empty_like(decoded).index_copy_(1, found.order, decoded)
        for name, value in (("dense", decoded), ("scale", found.scale), ("zero", found.zero), ("order", found.order)):
            self.register_buffer(name, value)
        self.register_buffer("bias", bias)
        if not torch.equal(self.codes().codes, found.codes):
            raise ValueError("its codes cannot be recovered from float32 values")

    def accepts(self, x: Tensor) -> bool:
        """Return True if ``x`` is float32 and on the device of the layer."""
        return x.dtype == torch.float32 and x.device == self.dense.device

    def forward(self, x: Tensor) -> Tensor:
        """Return the product for ``x`` [..., in]: [..., out]."""
        return F.linear(x, self.dense, self.bias)

    def codes(self) -> Codes:
        """Return codes, scales and zero points, bitwise identical to those it was packed from."""
        stored = self.dense if self.order is None else self.dense[:, self.order]
        grouped = stored.view(len(stored), -1, self.group_size)
        zero = 2.0 ** (self.bits - 1) if self.zero is None else self.zero.float()[..., None]
        steps = (grouped / self.scale.float()[..., None]).round_().add_(zero)
        return Codes(steps.to(torch.uint8).view(stored.shape), self.scale, self.zero, self.order)


def _decode(found: Any, bits: int, group_size: int) -> Tensor:
    zero = 2.0 ** (bits - 1) if found.zero is None else found.zero.float()[..., None]
    grouped = found.codes.view(len(found.codes), -1, group_size).float()
    return ((grouped - zero) * found.scale.float()[..., None]).view(found.codes.shape)


def _check(found: Any, bits: int, group_size: int, pair: Tensor) -> None:
    """Raise ``ValueError`` if the operator's scale and shift, ``pair`` [out, groups, 2], change the weight too much."""
    wanted = _decode(found, bits, group_size)
    grouped = found.codes.view(len(found.codes), -1, group_size).float() - 2 ** (bits - 1)
    made = (grouped * pair[..., :1] + pair[..., 1:]).view(wanted.shape)
    error = (made - wanted).norm() / wanted.norm().clamp_min(torch.finfo(torch.float32).tiny)
    if not float(error) <= MOST_ERROR:
        raise ValueError(f"bfloat16 scales would change its weight by {float(error):.1e}")


def int4_product(x: Tensor, packed: Tensor, pair: Tensor, group: int) -> Tensor:
    """Return ``x`` [rows, in] times a packed int4 weight.

    Many rows are multiplied by dense products, with some rows of the weight decoded at a time.

    Args:
        x: bfloat16.
        packed, pair, group: see ``Int4Linear``.
    """
    out, columns = packed.shape[0], packed.shape[1] * 2
    block = _block_rows(out) if len(x) > INT4_MOST_ROWS and _multiplies_bfloat16() else 0
    if not block:
        return torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, group, pair)
    blocks, groups, half = out // block, columns // group, block // 2
    # Contiguous: products with strided operands are ten times slower.
    scale, shift = pair.view(groups, blocks, block, 2).permute(3, 0, 1, 2).contiguous()
    bytes_of = packed.view(blocks, columns, half)
    step = min(blocks, max(1, DECODED // (columns * block)))
    found = x.new_empty(len(x), out)
    codes = torch.empty(step, columns, half, dtype=torch.int8)
    values = torch.empty(columns, step, block, dtype=torch.bfloat16)
    for begin in range(0, blocks, step):
        count = min(step, blocks - begin)
        own, signed = bytes_of[begin : begin + count], codes[:count]
        values = values if count == step else values.new_empty(columns, count, block)
        for part, nibbles in ((values[..., :half], torch.bitwise_and), (values[..., half:], torch.bitwise_right_shift)):
            # Subtracted while they are bytes, of which an instruction takes twice as many.
            nibbles(own, 15 if nibbles is torch.bitwise_and else 4, out=signed.view(torch.uint8))
            part.copy_(signed.sub_(8).transpose(0, 1))
        values.view(groups, group, count, block).mul_(scale[:, None, begin : begin + count])
        rows = slice(begin * block, (begin + count) * block)
        found[:, rows] = x @ values.view(columns, -1)
    if bool(shift.any()):
        sums = x.view(len(x), groups, group).sum(-1, dtype=torch.float32)
        found += (sums @ shift.view(groups, out).float()).to(x.dtype)
    return found


def int8_product(x: Tensor, packed: Tensor, factor: Tensor, ones: Tensor) -> Tensor:
    """Return ``x`` [rows, in] times an int8 weight, in float32; many rows as in ``int4_product``.

    Args:
        x: bfloat16.
        packed, factor, ones: see ``Int8Linear``.
    """
    if len(x) <= INT8_MOST_ROWS or not _multiplies_bfloat16():
        return torch.ops.aten._weight_int8pack_mm(x, packed, ones) * factor
    found = x.new_empty(len(x), len(packed))
    step = min(len(packed), max(1, DECODED // packed.shape[1]))
    values = torch.empty(step, packed.shape[1], dtype=torch.bfloat16)
    for begin in range(0, len(packed), step):
        own = packed[begin : begin + step]
        found[:, begin : begin + step] = x @ values[: len(own)].copy_(own).T
    return found * factor


@functools.cache
def _multiplies_bfloat16() -> bool:
    """Return True if this CPU has instructions for products in bfloat16."""
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


@functools.cache
def _block_rows(rows: int) -> int:
    """Return the rows of a block of this CPU's int4 layout, if a weight with ``rows`` consists of whole blocks; or 0.

    In a block of n rows, byte j of column c holds rows j and j + n / 2 of that column, in its low and its high half.
    """
    for block in INT4_BLOCKS:
        if rows % block == 0:
            # Three blocks, since this may be half of a block of the CPU.
            drawn = torch.Generator().manual_seed(0)
            codes = torch.randint(0, 16, (3 * block, 32), generator=drawn, dtype=torch.int32)
            packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
            if torch.equal(_unpack_blocks(packed, block).int(), codes):
                return block
    return 0


def _unpack_blocks(packed: Tensor, block: int) -> Tensor:
    rows, columns = packed.shape[0], packed.shape[1] * 2
    bytes_of = packed.view(rows // block, columns, block // 2)
    codes = torch.cat((bytes_of & 15, bytes_of >> 4), dim=-1)
    return codes.transpose(1, 2).reshape(rows, columns)


def _unpack_int4(packed: Tensor) -> Tensor:
    """Return the codes uint8 [out, in] of an int4 weight [out, in / 2], on its device: it may have left the CPU.

    The layout depends on the CPU, and PyTorch has no inverse. But packing only moves codes: packing the digits (base
    16) of each position's number shows where every code came from. That takes seconds for a large weight, so the layout
    of whole blocks is inverted directly.
    """
    rows, columns = packed.shape[0], packed.shape[1] * 2
    if block := _block_rows(rows):
        return _unpack_blocks(packed, block)
    numbers = torch.arange(rows * columns).view(rows, columns)
    origin = torch.zeros(rows * columns, dtype=torch.int64)
    for shift in range(0, max((rows * columns - 1).bit_length(), 1), 4):
        digits = ((numbers >> shift) & 15).int()
        origin |= _nibbles(torch.ops.aten._convert_weight_to_int4pack_for_cpu(digits, 1)).long() << shift
    codes = torch.empty(rows * columns, dtype=torch.uint8, device=packed.device)
    codes[origin.to(packed.device)] = _nibbles(packed)
    return codes.view(rows, columns)


def _nibbles(packed: Tensor) -> Tensor:
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten()


def join(packed_weights: list[Any]) -> CpuPackedWeight | None:
    """Concatenate packed weights along the output; return None if they differ in more than their rows.

    Dense weights are not joined: a wider product has another order of summation.
    """
    first = packed_weights[0]
    if not isinstance(first, CpuPackedWeight) or any(_kind(o) != _kind(first) for o in packed_weights):
        return None
    parts = [o.codes() for o in packed_weights]
    if any(part.order is not None for part in parts):
        return None
    zero = None if first.zero is None else torch.cat([p.zero for p in parts if p.zero is not None])
    found = Codes(torch.cat([p.codes for p in parts]), torch.cat([p.scale for p in parts]), zero, None)
    bias = cat_optional(packed_weights, "bias")
    return type(first)(found, first.bits, first.group_size, first.dtype, bias)  # type: ignore[call-arg]


def _kind(packed_weight: Any) -> tuple[Any, ...]:
    if not isinstance(packed_weight, CpuPackedWeight):
        return (type(packed_weight),)
    buffers = packed_weight.zero is None, packed_weight.bias is None, packed_weight.scale.dtype
    numbers = packed_weight.bits, packed_weight.group_size, packed_weight.packed.shape[1]
    return type(packed_weight), packed_weight.dtype, *numbers, *buffers
