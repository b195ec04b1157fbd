"""Linear layers with 2:4 sparse weights on ``hf_optim::sparse24``: supported weights, and their packed form.

This module is an entry point of the group ``hf_optim.kernels``. ``supports`` and ``prepack`` read the attributes of an
``hf_optim.compressed.weights.QuantizedWeight``: ``kind`` is "dense" for 16-bit numbers, "int" for codes. The ``codes``
of the packed weight are bitwise identical to those it was built from.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import util
from typing import Any

import torch
from torch import Tensor, nn

from ..common.codes import Codes
from . import cusparselt, mma_layout, naive, op, tiles

NAME = "sparse24"
SPARSE24 = True
# Smaller layers are bound by the launch, which a dense product has too.
LEAST_WEIGHTS = 1 << 22
GROUP_MULTIPLE = 16
# Shapes of inputs whose launch is kept ready; a server's prompts have ever new ones.
MOST_PLANS = 64


def supports(weight: Any) -> str | None:
    """Return None if the kernel runs a weight faster, otherwise the reason; ``""`` if it is not 2:4 sparse."""
    if not weight.sparse24:
        return ""
    if weight.inputs is not None:
        return "its inputs are quantized; only weights may be"
    return (
        _unsupported_format(weight)
        or _not_faster(weight)
        or _unsupported_device(weight.device)
        or _unsupported_size(weight)
    )


def _unsupported_format(weight: Any) -> str | None:
    columns = weight.shape[1]
    if weight.kind not in ("dense", "int"):
        return f"{weight.kind} codes; integers and unquantized weights are supported"
    if weight.dtype not in op.DTYPES:
        return f"{str(weight.dtype).removeprefix('torch.')} inputs; bfloat16 and float16 are supported"
    if weight.ordered:
        return "the columns of its groups are not adjacent (act-order)"
    if columns % 4:
        return f"{columns} columns are not a multiple of 4"
    if weight.kind == "dense":
        return None
    if not 2 <= weight.bits <= 8:
        return f"{weight.bits}-bit codes; 2 to 8 bits are supported"
    if weight.group_size < columns and weight.group_size % GROUP_MULTIPLE:
        return f"group size {weight.group_size} is not a multiple of {GROUP_MULTIPLE}"
    return None


def _unsupported_device(device: torch.device) -> str | None:
    if device.type != "cuda":
        return f"no 2:4 kernel for {device.type} devices"
    if util.find_spec("triton") is None:
        return "Triton is not installed"
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        return f"the kernel needs compute capability 8.0, this GPU has {major}.{minor}"
    return None


def _unsupported_size(weight: Any) -> str | None:
    count = weight.shape[0] * weight.shape[1]
    if count < LEAST_WEIGHTS:
        return f"a layer of {count:,} weights is faster dense (2:4 pays from {LEAST_WEIGHTS:,})"
    return None


def _not_faster(weight: Any) -> str | None:
    # In the order of ``naive.pack``, one row and 14336 x 4096 on an H200: int8 31.9 microseconds and int4 35.2, where
    # dense takes 32.7, codes that are not sparse 21.2 and 13.0 on their own kernel, and 16-bit 2:4 values 26.6. In the
    # order of ``fragments``, on an H100: int4 12.9, where dense takes 44.7 and int4 that is not sparse 15.5.
    if weight.kind == "dense" or _for_tensor_cores(weight):
        return None
    return "integer codes run faster on a kernel that decodes all of them"


def _for_tensor_cores(weight: Any) -> bool:
    """Return True if integer codes are to be laid out for sparse tensor cores."""
    rows, columns = weight.shape
    return weight.bits <= 4 and mma_layout.fits(rows, columns) and mma_layout.takes_groups(columns, weight.group_size)


@torch.no_grad()
def prepack(weight: Any) -> PackedWeight:
    """Return the packed form of a supported weight.

    Raises ``ValueError`` if a group of four columns has more than two nonzero entries. For codes, zero is the code that
    equals the zero point.
    """
    found = weight.codes()
    columns, middle = weight.shape[1], 1 << (weight.bits - 1)
    bias = None if weight.bias is None else weight.bias.detach()
    if weight.kind == "dense":
        return _prepack_dense(found.codes, bias)
    width = 4 if weight.bits <= 4 else 8
    kept = found.codes != (middle if found.zero is None else _spread(found.zero, columns, weight.group_size))
    if _for_tensor_cores(weight):
        values, bits = mma_layout.pack(found.codes, kept)
    else:
        values, bits = naive.pack(found.codes, kept, width)
    scale = found.scale.T.contiguous()
    zero = None if found.zero is None else found.zero.T.contiguous()
    return PackedWeight(values, bits, scale, zero, bias, None, width, weight.group_size, middle, columns, weight.dtype)


def _prepack_dense(dense: Tensor, bias: Tensor | None) -> PackedWeight:
    values, bits = naive.pack(dense, dense != 0, 16)
    numbers, _ = naive.unpack(values, bits, 16, dense.shape[1])
    # Only zeros were dropped, and they may be negative (a mask multiplied a weight).
    lost = numbers.view(torch.int16) != dense.view(torch.int16)
    negative = _to_bits(lost) if bool(lost.any()) else None
    both = cusparselt.share(dense, values)
    return PackedWeight(
        values if both is None else both, bits, None, None, bias, negative, 16, dense.shape[1], 0, dense.shape[1],
        dense.dtype,
    )  # fmt: skip


class PackedWeight(nn.Module):
    """``x W^T + bias`` on ``hf_optim::sparse24``.

    Attributes:
        values, bits, scale, zero, bias: see ``op.sparse24``.
        negative: uint8 [out, in / 8], where a pruned weight is -0.0; None where none is. Only ``codes`` reads it.
        counters: int32, zeros; not saved.
        plans: launches kept ready, by the shape of the input.
    """

    values: Tensor
    bits: Tensor
    scale: Tensor | None
    zero: Tensor | None
    bias: Tensor | None
    negative: Tensor | None
    counters: Tensor

    def __init__(
        self,
        values: Tensor,
        bits: Tensor,
        scale: Tensor | None,
        zero: Tensor | None,
        bias: Tensor | None,
        negative: Tensor | None,
        width: int,
        group_size: int,
        middle: int,
        columns: int,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.width, self.group_size, self.middle, self.columns, self.dtype = width, group_size, middle, columns, dtype
        for name, tensor in (
            ("values", values), ("bits", bits), ("scale", scale), ("zero", zero), ("bias", bias), ("negative", negative)
        ):  # fmt: skip
            self.register_buffer(name, tensor)
        counters = torch.zeros(tiles.COUNTERS, dtype=torch.int32, device=bits.device)
        self.register_buffer("counters", counters, persistent=False)
        self.plans: dict[torch.Size, Any] = {}

    @property
    def label(self) -> str:
        """What reports say of a layer on this packed weight."""
        many = ", cuSPARSELt for many rows" if cusparselt.shared(self.values, self.bits) else ""
        if mma_layout.holds(self.values):
            return "sparse24 Triton, int4 values on sparse tensor cores"
        return f"sparse24 Triton, {'16-bit' if self.width == 16 else f'int{self.width}'} values{many}"

    def accepts(self, x: Tensor) -> bool:
        """Whether type and device of an input are those of the layer."""
        return x.dtype == self.dtype and x.device == self.bits.device

    def forward(self, x: Tensor) -> Tensor:
        """``x`` [..., in] -> [..., out]."""
        arguments = (
            x, self.values, self.bits, self.scale, self.zero, self.bias, self.counters, self.width, self.group_size,
            self.middle,
        )  # fmt: skip
        if torch.compiler.is_compiling() or (torch.is_grad_enabled() and self._records(x)):
            return torch.ops.hf_optim.sparse24(*arguments)
        if not x.is_cuda or not mma_layout.holds(self.values):
            return op.run(*arguments)
        plan = self.plans.get(x.shape)
        y = plan(x) if plan is not None and x.dtype == self.dtype and x.is_contiguous() else None
        return self._plan(x, arguments) if y is None else y

    def _plan(self, x: Tensor, arguments: tuple) -> Tensor:
        """As ``forward``, for a shape without a plan; makes one where one will do."""
        from . import tensor_core_launch

        if len(self.plans) < MOST_PLANS and x.shape not in self.plans and x.dtype == self.dtype:
            held = (self.values, self.bits, self.scale, self.zero, self.bias, self.counters)
            plan = tensor_core_launch.plan_for(x, *held, self.group_size, self.middle)  # type: ignore[arg-type]
            if plan is not None:
                self.plans[x.shape] = plan
        return op.run(*arguments)

    def renew(self) -> None:
        """Forget what holds addresses of the buffers: one of them is another tensor now."""
        self.plans = {}

    def _apply(self, fn: Any, recurse: bool = True) -> PackedWeight:
        self.renew()
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "plans": {}}

    def _records(self, x: Tensor) -> bool:
        return x.requires_grad or (self.bias is not None and self.bias.requires_grad)

    @torch.no_grad()
    def codes(self) -> Codes:
        """What the packed weight was bound from."""
        numbers, at = naive.unpack(self.values, self.bits, self.width, self.columns)
        if self.scale is None:
            if self.negative is not None:
                lost = _from_bits(self.negative, self.columns)
                numbers = torch.where(lost, torch.full((), -0.0, dtype=numbers.dtype, device=lost.device), numbers)
            return Codes(numbers, None, None)
        zero = None if self.zero is None else self.zero.T.contiguous()
        pruned = self.middle if zero is None else _spread(zero, self.columns, self.group_size)
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
    return PackedWeight(
        values, bits, _joined([w.scale for w in packed_weights], 1), _joined([w.zero for w in packed_weights], 1),
        _joined([w.bias for w in packed_weights], 0), negative, first.width, first.group_size, first.middle,
        first.columns, first.dtype,
    )  # fmt: skip


def _form(packed_weight: PackedWeight) -> tuple:
    optional = (packed_weight.scale, packed_weight.zero, packed_weight.bias)
    kinds = tuple(None if tensor is None else tensor.dtype for tensor in optional)
    return (
        packed_weight.width,
        packed_weight.group_size,
        packed_weight.middle,
        packed_weight.columns,
        packed_weight.dtype,
        packed_weight.bits.device,
        packed_weight.bits.dtype,
        kinds,
    )


def _own_values(packed_weight: PackedWeight) -> Tensor:
    """The values [out, ...] without what cuSPARSELt keeps behind them."""
    if mma_layout.holds(packed_weight.values):
        return packed_weight.values
    rows, fours = packed_weight.bits.shape[0], 2 * packed_weight.bits.shape[1]
    flat = packed_weight.values.flatten()
    return (
        flat[: rows * fours].view(rows, fours)
        if packed_weight.width == 4
        else flat[: rows * fours * 2].view(rows, fours, 2)
    )


def _joined(parts: Sequence[Tensor | None], dim: int) -> Tensor | None:
    held = [part for part in parts if part is not None]
    return torch.cat(held, dim) if held else None


def _spread(zero: Tensor, columns: int, group_size: int) -> Tensor:
    """Zero points [out, groups] for every column."""
    return zero.repeat_interleave(min(group_size, columns), 1)[:, :columns]


def _to_bits(flags: Tensor) -> Tensor:
    """Bool [out, in] as uint8 [out, in / 8], the first column lowest."""
    padded = torch.nn.functional.pad(flags, (0, -flags.shape[1] % 8)).view(flags.shape[0], -1, 8)
    places = torch.arange(8, dtype=torch.uint8, device=flags.device)
    return (padded.to(torch.uint8) << places).sum(-1, dtype=torch.uint8)


def _from_bits(packed: Tensor, columns: int) -> Tensor:
    places = torch.arange(8, dtype=torch.uint8, device=packed.device)
    return (packed[..., None] >> places & 1 != 0).flatten(1)[:, :columns]
