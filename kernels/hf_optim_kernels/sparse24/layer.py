"""Linear layers with 2:4 sparse weights on ``hf_optim::sparse24``: supported weights, and their packed form.

This module is an entry point of the group ``hf_optim.kernels``. ``supports`` and ``prepack`` read the attributes of an
``hf_optim.compressed.weights.QuantizedWeight``: ``kind`` is "dense" for 16-bit numbers, "int" for codes. The ``codes``
of the packed weight are bitwise identical to those it was built from.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..common.codes import Codes
from ..common.launch_plan import PlannedLinear
from ..common.support import unsupported_device, unsupported_dtype
from . import cusparselt, mma_layout, naive, op, tiles

NAME = "sparse24"
SPARSE24 = True
# Smaller layers are bound by the launch, and so is a dense product.
LEAST_WEIGHTS = 1 << 22
GROUP_MULTIPLE = 16


def supports(weight: Any) -> str | None:
    """Return None if the kernel runs a weight faster, otherwise the reason; ``""`` if it is not 2:4 sparse."""
    if not weight.sparse24:
        return ""
    if weight.inputs is not None:
        return "its inputs are quantized; this kernel is weight-only"
    return (
        _unsupported_format(weight)
        or _not_faster(weight)
        or unsupported_device(weight.device)
        or _unsupported_size(weight)
    )


def _unsupported_format(weight: Any) -> str | None:
    columns = weight.shape[1]
    if weight.kind not in ("dense", "int"):
        return f"{weight.kind} codes are not supported, only integers and unquantized weights"
    if weight.ordered:
        return "the columns of its groups are not adjacent (act-order)"
    if columns % 4:
        return f"{columns} columns are not a multiple of 4"
    if weight.kind == "int" and not 2 <= weight.bits <= 8:
        return f"{weight.bits}-bit codes are not supported, only 2 to 8 bits"
    if weight.kind == "int" and weight.group_size < columns and weight.group_size % GROUP_MULTIPLE:
        return f"group size {weight.group_size} is not a multiple of {GROUP_MULTIPLE}"
    return unsupported_dtype(weight.dtype, op.DTYPES)


def _unsupported_size(weight: Any) -> str | None:
    count = weight.shape[0] * weight.shape[1]
    if count < LEAST_WEIGHTS:
        return f"a layer of {count:,} weights is faster dense (2:4 pays from {LEAST_WEIGHTS:,})"
    return None


def _not_faster(weight: Any) -> str | None:
    # One row and 14336 x 4096 in the layout of ``naive.pack`` on an H200: int8 31.9 microseconds and int4 35.2, where
    # dense takes 32.7, codes that are not sparse 21.2 and 13.0 on their own kernel, and 16-bit 2:4 values 26.6. In the
    # layout of ``mma_layout`` on an H100: int4 12.9, where dense takes 44.7 and int4 that is not sparse 15.5.
    if weight.kind == "dense" or _for_tensor_cores(weight):
        return None
    return "integer codes run faster on a kernel that decodes all of them"


def _for_tensor_cores(weight: Any) -> bool:
    """Return True if integer codes are to be laid out for sparse tensor cores."""
    rows, columns = weight.shape
    fits = weight.bits <= 4 and mma_layout.fits(rows, columns)
    return fits and mma_layout.supports_groups(columns, weight.group_size)


@torch.no_grad()
def prepack(weight: Any) -> PackedWeight:
    """Return the packed form of a supported weight.

    Raises ``ValueError`` if a group of four columns has more than two nonzero entries. For codes, zero is the code that
    equals the zero point.
    """
    found = weight.codes()
    columns, zero_offset = weight.shape[1], 1 << (weight.bits - 1)
    bias = None if weight.bias is None else weight.bias.detach()
    if weight.kind == "dense":
        return _prepack_dense(found.codes, bias)
    width = 4 if weight.bits <= 4 else 8
    kept = found.codes != (zero_offset if found.zero is None else _spread(found.zero, columns, weight.group_size))
    if _for_tensor_cores(weight):
        values, bits = mma_layout.pack(found.codes, kept)
    else:
        values, bits = naive.pack(found.codes, kept, width)
    scale = found.scale.T.contiguous()
    zero = None if found.zero is None else found.zero.T.contiguous()
    tensors = naive.PackedTensors(values, bits, scale, zero, bias, None, width, weight.group_size, zero_offset)
    return PackedWeight(tensors, None, columns, weight.dtype)


def _prepack_dense(dense: Tensor, bias: Tensor | None) -> PackedWeight:
    values, bits = naive.pack(dense, dense != 0, 16)
    numbers, _ = naive.unpack(values, bits, 16, dense.shape[1])
    # Only zeros were dropped, and they may be negative (a mask multiplied a weight).
    lost = numbers.view(torch.int16) != dense.view(torch.int16)
    negative = _to_bits(lost) if bool(lost.any()) else None
    both = cusparselt.share(dense, values)
    columns = dense.shape[1]
    values = values if both is None else both
    tensors = naive.PackedTensors(values, bits, None, None, bias, None, 16, columns, 0)
    return PackedWeight(tensors, negative, columns, dense.dtype)


class PackedWeight(PlannedLinear):
    """``x W^T + bias`` on ``hf_optim::sparse24``.

    Attributes:
        values, bits, scale, zero, bias, width, group_size, zero_offset: see ``naive.PackedTensors``.
        negative: uint8 [out, in / 8], where a pruned weight is -0.0; None if none is. Only ``codes`` reads it.
        semaphores: int32, zeros; not saved.
    """

    values: Tensor
    bits: Tensor
    scale: Tensor | None
    zero: Tensor | None
    bias: Tensor | None
    negative: Tensor | None
    semaphores: Tensor

    def __init__(
        self, tensors: naive.PackedTensors, negative: Tensor | None, columns: int, dtype: torch.dtype
    ) -> None:  # fmt: skip
        super().__init__()
        self.columns, self.dtype = columns, dtype
        self.width, self.group_size, self.zero_offset = tensors[-3:]
        for name in ("values", "bits", "scale", "zero", "bias"):
            self.register_buffer(name, getattr(tensors, name))
        self.register_buffer("negative", negative)
        semaphores = torch.zeros(tiles.SEMAPHORES, dtype=torch.int32, device=self.bits.device)
        self.register_buffer("semaphores", semaphores, persistent=False)

    @property
    def label(self) -> str:
        """Return what reports print for a layer on this packed weight."""
        many = ", cuSPARSELt for many rows" if cusparselt.is_shared(self.values, self.bits) else ""
        if mma_layout.holds(self.values):
            return "sparse24 Triton, int4 values on sparse tensor cores"
        return f"sparse24 Triton, {'16-bit' if self.width == 16 else f'int{self.width}'} values{many}"

    def forward(self, x: Tensor) -> Tensor:
        """Return the product for ``x`` [..., in]: [..., out]."""
        if torch.compiler.is_compiling() or (x.requires_grad and torch.is_grad_enabled()):
            return torch.ops.hf_optim.sparse24(x, *self.tensors())
        return self.planned(x)

    def compute(self, x: Tensor) -> Tensor:
        """See ``PlannedLinear``."""
        return op.linear(x, self.tensors())

    def tensors(self) -> naive.PackedTensors:
        """Return the arguments of the operator after the input."""
        return naive.PackedTensors(
            self.values, self.bits, self.scale, self.zero, self.bias, self.semaphores, self.width, self.group_size,
            self.zero_offset,
        )  # fmt: skip

    @torch.no_grad()
    def codes(self) -> Codes:
        """Return the numbers, or codes, scales and zero points, bitwise identical to those it was packed from."""
        numbers, at = naive.unpack(self.values, self.bits, self.width, self.columns)
        if self.scale is None:
            if self.negative is not None:
                lost = _from_bits(self.negative, self.columns)
                numbers = torch.where(lost, torch.full((), -0.0, dtype=numbers.dtype, device=lost.device), numbers)
            return Codes(numbers, None, None)
        zero = None if self.zero is None else self.zero.T.contiguous()
        pruned = self.zero_offset if zero is None else _spread(zero, self.columns, self.group_size)
        return Codes(torch.where(at, numbers, pruned).to(torch.uint8), self.scale.T.contiguous(), zero)


def join(packed_weights: Sequence[PackedWeight]) -> PackedWeight | None:
    """Concatenate packed weights along the output; return None if they differ in more than their rows."""
    first = packed_weights[0]
    if any(_form(w) != _form(first) for w in packed_weights):
        return None
    negative = None
    if any(w.negative is not None for w in packed_weights):
        width = -(-first.columns // 8)
        negative = torch.cat([
            w.bits.new_zeros(w.bits.shape[0], width) if w.negative is None else w.negative for w in packed_weights
        ])  # fmt: skip
    bits = torch.cat([w.bits for w in packed_weights])
    values = torch.cat([_own_values(w) for w in packed_weights])
    if first.width == 16:
        both = cusparselt.share(naive.unpack(values, bits, 16, first.columns)[0], values)
        values = values if both is None else both
    scale, zero = (_joined([getattr(w, name) for w in packed_weights], 1) for name in ("scale", "zero"))
    bias = _joined([w.bias for w in packed_weights], 0)
    tensors = naive.PackedTensors(values, bits, scale, zero, bias, None, *first.tensors()[-3:])
    return PackedWeight(tensors, negative, first.columns, first.dtype)


def _form(packed_weight: PackedWeight) -> tuple:
    tensors = packed_weight.tensors()
    kinds = tuple(None if t is None else t.dtype for t in (tensors.scale, tensors.zero, tensors.bias))
    bits = tensors.bits
    return *tensors[-3:], packed_weight.columns, packed_weight.dtype, bits.device, bits.dtype, kinds


def _own_values(packed_weight: PackedWeight) -> Tensor:
    """Return the values [out, ...] without what cuSPARSELt stores behind them."""
    if mma_layout.holds(packed_weight.values):
        return packed_weight.values
    rows, count = packed_weight.bits.shape[0], 2 * packed_weight.bits.shape[1]
    flat = packed_weight.values.flatten()
    if packed_weight.width == 4:
        return flat[: rows * count].view(rows, count)
    return flat[: rows * count * 2].view(rows, count, 2)


def _joined(parts: Sequence[Tensor | None], dim: int) -> Tensor | None:
    held = [part for part in parts if part is not None]
    return torch.cat(held, dim) if held else None


def _spread(zero: Tensor, columns: int, group_size: int) -> Tensor:
    """Return zero points [out, groups] for every column."""
    return zero.repeat_interleave(min(group_size, columns), 1)[:, :columns]


def _to_bits(flags: Tensor) -> Tensor:
    """Pack bool [out, in] as uint8 [out, in / 8], the first column in the lowest bit."""
    padded = torch.nn.functional.pad(flags, (0, -flags.shape[1] % 8)).view(flags.shape[0], -1, 8)
    places = torch.arange(8, dtype=torch.uint8, device=flags.device)
    return (padded.to(torch.uint8) << places).sum(-1, dtype=torch.uint8)


def _from_bits(packed: Tensor, columns: int) -> Tensor:
    places = torch.arange(8, dtype=torch.uint8, device=packed.device)
    return (packed[..., None] >> places & 1 != 0).flatten(1)[:, :columns]
