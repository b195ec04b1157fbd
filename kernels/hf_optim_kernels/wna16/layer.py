"""Weight-only quantized linear layers on ``hf_optim::wna16``: supported weights, and their packed form.

This module is an entry point of the group ``hf_optim.kernels``. ``supports`` and ``prepack`` read the attributes of an
``hf_optim.compressed.weights.QuantizedWeight``.
"""

from __future__ import annotations

from importlib import util
from typing import Any

import torch
from torch import Tensor, nn

from ..common.codes import Codes
from . import naive, op

NAME = "wna16"
DTYPES = (torch.float16, torch.bfloat16)
# Where packed beats the dense product (bench.py, H200).
LEAST_WEIGHTS = 1 << 20
# Shapes of inputs whose launch is kept ready; a server's prompts have ever new ones.
MOST_PLANS = 64


def supports(weight: Any) -> str | None:
    """Return None if the kernel can run a weight, otherwise the reason; ``""`` unless it is weight-only integer."""
    if weight.kind != "int" or weight.inputs is not None:
        return ""
    if not 2 <= weight.bits <= 8:
        return f"{weight.bits}-bit codes; 2 to 8 bits are supported"
    if weight.device.type == "cpu":
        from . import cpu

        return cpu.unsupported_reason(weight)
    return _unsupported_layout(weight) or _unsupported_device(weight)


def _unsupported_layout(weight: Any) -> str | None:
    if weight.dtype not in DTYPES:
        return f"{str(weight.dtype).removeprefix('torch.')} activations; float16 and bfloat16 are supported"
    if weight.group_size < weight.shape[1] and weight.group_size % 16:
        return f"group size {weight.group_size} is not a multiple of 16"
    if weight.shape[0] * weight.shape[1] < LEAST_WEIGHTS:
        return f"a layer of {weight.shape[0] * weight.shape[1]:,} weights is faster dense (from {LEAST_WEIGHTS:,})"
    return None


def _unsupported_device(weight: Any) -> str | None:
    if weight.device.type != "cuda":
        return f"no kernel for {weight.device.type} devices"
    if util.find_spec("triton") is None:
        return "Triton is not installed"
    major, minor = torch.cuda.get_device_capability(weight.device)
    return f"the kernel needs compute capability 8.0, this GPU has {major}.{minor}" if major < 8 else None


def prepack(weight: Any) -> nn.Module:
    """Return the packed form of a supported weight."""
    if weight.device.type == "cpu":
        from . import cpu

        return cpu.prepack(weight)
    return PackedWeight.from_codes(weight.codes(), weight.bits, weight.group_size, weight.dtype, weight.bias)


class PackedWeight(nn.Module):
    """``x W^T + bias`` on ``hf_optim::wna16``.

    Attributes:
        packed: int16 [chunks, out, plane], see ``naive.pack``.
        scale: [groups, out], as the checkpoint has it; zero: uint8 [groups, out], or None.
        order: int64 [in]: stored column ``j`` is column ``order[j]`` of the input; None for the identity.
        counters: int32, for programs that share a tile.
    """

    packed: Tensor
    scale: Tensor
    zero: Tensor | None
    order: Tensor | None
    bias: Tensor | None
    counters: Tensor

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
    ) -> None:
        super().__init__()
        from .launch import counters_for

        self.bits, self.width, self.group_size, self.columns = bits, _width(bits), group_size, columns
        self.dtype = dtype
        self.label = f"wna16 Triton, {bits}-bit" + ("" if group_size >= columns else f", groups of {group_size}")
        self.register_buffer("packed", packed)
        self.register_buffer("scale", scale)
        self.register_buffer("zero", zero)
        self.register_buffer("order", order)
        self.register_buffer("bias", bias)
        self.register_buffer("counters", counters_for(packed.shape[1], packed.device))
        self.plans: dict[torch.Size, Any] = {}

    @classmethod
    def from_codes(
        cls, found: Any, bits: int, group_size: int, dtype: torch.dtype, bias: Tensor | None
    ) -> PackedWeight:
        """Pack ``hf_optim.compressed.weights.Codes``."""
        width, columns = _width(bits), found.codes.shape[1]
        zero = found.zero
        codes = found.codes
        if zero is None and bits != width:
            # Stored wider than it is: the middle of the grid moves.
            codes = codes + (2 ** (width - 1) - 2 ** (bits - 1))
        return cls(
            naive.pack(codes, width, group_size),
            found.scale.T.contiguous(),
            None if zero is None else zero.to(torch.uint8).T.contiguous(),
            found.order,
            None if bias is None else bias.detach(),
            bits=bits,
            group_size=group_size,
            columns=columns,
            dtype=dtype,
        )

    def codes(self) -> Codes:
        """The weight's codes, scales and zero points again, bit for bit."""
        codes = naive.unpack(self.packed, self.width, self.columns)
        if self.zero is None and self.bits != self.width:
            codes = codes - (2 ** (self.width - 1) - 2 ** (self.bits - 1))
        zero = None if self.zero is None else self.zero.T.contiguous()
        return Codes(codes.contiguous(), self.scale.T.contiguous(), zero, self.order)

    def accepts(self, x: Tensor) -> bool:
        """Whether the kernel is right for this input."""
        return x.dtype == self.dtype and x.device == self.packed.device

    def forward(self, x: Tensor) -> Tensor:
        """``x`` [..., in] -> [..., out]."""
        order = self._buffers["order"]
        if order is not None:
            x = x.index_select(-1, order)
        if torch.compiler.is_compiling() or not x.is_cuda or (x.requires_grad and torch.is_grad_enabled()):
            return op.wna16(
                x, self.packed, self.scale, self.zero, self.bias, self.counters, self.width, self.group_size
            )
        plan = self.plans.get(x.shape)
        y = plan(x) if plan is not None and x.dtype == self.dtype and x.is_contiguous() else None
        return self._plan(x) if y is None else y

    def _plan(self, x: Tensor) -> Tensor:
        """As ``forward``, for a shape without a plan; makes one where one will do."""
        from . import launch

        held = (self.packed, self.scale, self.zero, self.bias, self.counters, self.width, self.group_size)
        if len(self.plans) < MOST_PLANS and x.shape not in self.plans:
            plan = launch.plan_for(x, *held)
            if plan is not None:
                self.plans[x.shape] = plan
        return launch.wna16(x, *held)

    def renew(self) -> None:
        """Forget what holds addresses of the buffers: one of them is another tensor now."""
        self.plans = {}

    def _apply(self, fn: Any, recurse: bool = True) -> PackedWeight:
        self.renew()
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "plans": {}}


def join(packed_weights: list[Any]) -> nn.Module | None:
    """Concatenate packed weights along the output; return None if their layouts differ."""
    first = packed_weights[0]
    if not isinstance(first, PackedWeight):
        from . import cpu

        return cpu.join(packed_weights)
    alike = all(
        (o.bits, o.group_size, o.columns, o.dtype, o.zero is None, o.bias is None, o.scale.dtype)
        == (first.bits, first.group_size, first.columns, first.dtype, first.zero is None, first.bias is None,
            first.scale.dtype)
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
    )


def _width(bits: int) -> int:
    return 4 if bits <= 4 else 8
