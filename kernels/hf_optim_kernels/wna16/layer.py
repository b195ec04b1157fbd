"""Weight-only quantized linear layers on ``hf_optim::wna16``: supported weights, and their packed form.

This module is an entry point of the group ``hf_optim.kernels``. ``supports`` and ``prepack`` read the attributes of an
``hf_optim.compressed.weights.QuantizedWeight``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..common.codes import Codes
from ..common.launch_plan import PlannedLinear
from ..common.support import unsupported_device, unsupported_dtype
from . import float4, naive, op

NAME = "wna16"
DTYPES = (torch.float16, torch.bfloat16)
# Where packed beats the dense product (bench.py, H200).
LEAST_WEIGHTS = 1 << 20


def supports(weight: Any) -> str | None:
    """Return None if the kernel can run a weight, otherwise the reason; ``""`` unless it is weight-only.

    Its numbers are integers or 4-bit floats.
    """
    if weight.inputs is not None:
        return ""
    if weight.kind == "float4":
        return _unsupported_float4(weight)
    if weight.kind != "int":
        return ""
    if not 2 <= weight.bits <= 8:
        return f"{weight.bits}-bit codes are not supported, only 2 to 8 bits"
    if weight.device.type == "cpu":
        from . import cpu

        return cpu.unsupported_reason(weight)
    return _unsupported_layout(weight) or unsupported_device(weight.device)


def _unsupported_float4(weight: Any) -> str | None:
    if weight.group_size not in float4.GROUPS.values() or weight.ordered:
        return f"4-bit floats in groups of {weight.group_size} are neither NVFP4 nor MXFP4"
    if weight.device.type == "cpu":
        from . import float4_cpu

        return unsupported_dtype(weight.dtype, float4_cpu.DTYPES)
    return _unsupported_layout(weight) or unsupported_device(weight.device)


def _unsupported_layout(weight: Any) -> str | None:
    rows, columns = weight.shape
    if weight.group_size < columns and weight.group_size % 16:
        return f"group size {weight.group_size} is not a multiple of 16"
    if rows * columns < LEAST_WEIGHTS:
        return f"a layer of {rows * columns:,} weights is faster dense (packed from {LEAST_WEIGHTS:,})"
    return unsupported_dtype(weight.dtype, DTYPES)


def prepack(weight: Any) -> nn.Module:
    """Return the packed form of a supported weight."""
    if weight.device.type == "cpu" and weight.kind == "float4":
        from . import float4_cpu

        bias = None if weight.bias is None else weight.bias.detach()
        return float4_cpu.Float4Linear(weight.codes(), weight.dtype, bias)
    if weight.device.type == "cpu":
        from . import cpu

        return cpu.prepack(weight)
    return PackedWeight.from_codes(weight.codes(), weight.bits, weight.group_size, weight.dtype, weight.bias)


def runs_as(weight: Any) -> str:
    """Return what reports say before a supported weight, or supported experts, is packed: its own name or "dense"."""
    if hasattr(weight, "up"):
        from ..packed_experts import layer

        return layer.runs_as(weight) or NAME
    if weight.device.type == "cpu" and weight.kind == "int" and weight.dtype == torch.float32:
        from . import cpu

        return cpu.DENSE
    return NAME


class PackedWeight(PlannedLinear):
    """``x W^T + bias`` on ``hf_optim::wna16``.

    Attributes:
        packed: int16 [k-tiles, out, slice], see ``naive.pack``.
        scale: [groups, out], as in the checkpoint, or words of bytes (``float4``); zero: uint8 [groups, out], or None.
        divisor: float32 [out], of NVFP4, or None.
        order: int64 [in]: stored column ``j`` is column ``order[j]`` of the input; None for the identity.
        semaphores: int32, for programs that share a tile.
    """

    packed: Tensor
    scale: Tensor
    zero: Tensor | None
    order: Tensor | None
    bias: Tensor | None
    divisor: Tensor | None
    semaphores: Tensor

    def __init__(
        self,
        packed: Tensor,
        scale: Tensor,
        zero: Tensor | None,
        order: Tensor | None,
        bias: Tensor | None,
        *,
        bits: int,
        group_size: int,
        columns: int,
        dtype: torch.dtype,
        format: int = float4.INTEGER,
        divisor: Tensor | None = None,
    ) -> None:
        super().__init__()
        from .launch import semaphores_for

        self.bits, self.width, self.group_size, self.columns = bits, _width(bits), group_size, columns
        self.dtype, self.format = dtype, format
        what = float4.NAMES[format] if format else f"{bits}-bit"
        self.label = f"wna16 Triton, {what}" + ("" if group_size >= columns else f", groups of {group_size}")
        self.register_buffer("packed", packed)
        self.register_buffer("scale", scale)
        self.register_buffer("zero", zero)
        self.register_buffer("order", order)
        self.register_buffer("bias", bias)
        self.register_buffer("divisor", divisor)
        self.register_buffer("semaphores", semaphores_for(packed.shape[1], packed.device))

    @classmethod
    def from_codes(
        cls, found: Any, bits: int, group_size: int, dtype: torch.dtype, bias: Tensor | None
    ) -> PackedWeight:
        """Pack ``hf_optim.compressed.weights.Codes``."""
        width, columns = _width(bits), found.codes.shape[1]
        zero = found.zero
        codes, scale = found.codes, found.scale
        format, shared = float4.format_of(scale), getattr(found, "global_scale", None)
        if format:
            codes, scale = float4.without_signs(codes, scale.view(torch.uint8), format)
        if zero is None and bits != width:
            # Stored with more bits than it has: the zero offset moves.
            codes = codes + (2 ** (width - 1) - 2 ** (bits - 1))
        return cls(
            naive.pack(codes, width, group_size, format),
            float4.pack_scales(scale, format) if format else scale.T.contiguous(),
            None if zero is None else zero.to(torch.uint8).T.contiguous(),
            found.order,
            None if bias is None else bias.detach(),
            bits=bits,
            group_size=group_size,
            columns=columns,
            dtype=dtype,
            format=format,
            divisor=None if shared is None else shared.flatten().contiguous(),
        )

    def codes(self) -> Codes:
        """Return the codes, scales and zero points of the weight, bitwise identical to those it was packed from.

        The sign of an e4m3 scale has moved to its codes.
        """
        codes = naive.unpack(self.packed, self.width, self.columns, self.format)
        if self.format:
            scale = float4.unpack_scales(self.scale, self.format, -(-self.columns // self.group_size))
            scale = scale.view(float4.E4M3 if self.format == float4.NVFP4 else float4.E8M0)
            shared = None if self.divisor is None else self.divisor[:, None].contiguous()
            return Codes(codes.contiguous(), scale, None, global_scale=shared)
        if self.zero is None and self.bits != self.width:
            codes = codes - (2 ** (self.width - 1) - 2 ** (self.bits - 1))
        zero = None if self.zero is None else self.zero.T.contiguous()
        return Codes(codes.contiguous(), self.scale.T.contiguous(), zero, self.order)

    def forward(self, x: Tensor) -> Tensor:
        """Return the product for ``x`` [..., in]: [..., out]."""
        order = self._buffers["order"]
        if order is not None:
            x = x.index_select(-1, order)
        if torch.compiler.is_compiling() or (x.requires_grad and torch.is_grad_enabled()):
            return op.wna16(x, *self.tensors())
        return self.planned(x)

    def compute(self, x: Tensor) -> Tensor:
        """See ``PlannedLinear``; the columns of ``x`` are in the stored order."""
        return op.linear(x, self.tensors())

    def tensors(self) -> naive.PackedTensors:
        """Return the arguments of the operator after the input."""
        return naive.PackedTensors(
            self.packed, self.scale, self.zero, self.bias, self.semaphores, self.width, self.group_size, self.format,
            self.divisor,
        )  # fmt: skip


def join(packed_weights: list[Any]) -> nn.Module | None:
    """Concatenate packed weights along the output; return None if their layouts differ."""
    first = packed_weights[0]
    if not isinstance(first, PackedWeight):
        from . import cpu

        return cpu.join(packed_weights)
    alike = all(
        (o.bits, o.group_size, o.columns, o.dtype, o.zero is None, o.bias is None, o.scale.dtype, o.format)
        == (first.bits, first.group_size, first.columns, first.dtype, first.zero is None, first.bias is None,
            first.scale.dtype, first.format)
        and o.order is None
        for o in packed_weights
    )  # fmt: skip
    if not alike:
        return None
    return PackedWeight(
        torch.cat([o.packed for o in packed_weights], 1),
        torch.cat([o.scale for o in packed_weights], 1),
        None if first.zero is None else torch.cat([o.zero for o in packed_weights], 1),
        None,
        None if first.bias is None else torch.cat([o.bias for o in packed_weights]),
        bits=first.bits,
        group_size=first.group_size,
        columns=first.columns,
        dtype=first.dtype,
        format=first.format,
        divisor=None if first.divisor is None else torch.cat([o.divisor for o in packed_weights]),
    )


def _width(bits: int) -> int:
    return 4 if bits <= 4 else 8


def supports_experts(weight: Any) -> str | None:
    """Return None if experts, a ``QuantizedExperts``, can run on their codes; otherwise the reason."""
    from ..packed_experts import layer

    return layer.supports(weight)


def prepack_experts(weight: Any) -> nn.Module:
    """Return the packed form of supported experts."""
    from ..packed_experts import layer

    return layer.prepack(weight)
