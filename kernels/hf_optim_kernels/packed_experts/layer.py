"""The packed weights of a module of experts: which are supported, and the modules that hold and multiply them.

``supports`` and ``prepack`` read the attributes of an ``hf_optim.compressed.weights.QuantizedExperts``. ``wna16.layer``
offers them with its entry point.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..common.codes import Codes
from ..common.support import can_run_triton, unsupported_device, unsupported_dtype
from ..wna16 import float4
from ..wna16 import naive as weight_only
from . import naive, op
from .base import DOWN, SEMAPHORES, UP, ExpertsBase, describe, zeros_of
from .naive import FLOAT8, INPUTS, StackedWeight

FIELDS = ("packed", "scale", "zero", "order", "input_scale", "input_zero", "divisor")


def supports(weight: Any) -> str | None:
    """Return None if the experts can run on their codes, otherwise the reason."""
    for matrix in (weight.up, weight.down):
        if matrix.kind == "float4" and matrix.group_size not in float4.GROUPS.values():
            return f"4-bit floats in groups of {matrix.group_size} are neither NVFP4 nor MXFP4"
        if matrix.kind == "int" and not 2 <= matrix.bits <= 8:
            return f"{matrix.bits}-bit codes are not supported, only 2 to 8 bits"
    return unsupported_dtype(weight.up.dtype, op.DTYPES)


def prepack(weight: Any) -> nn.Module:
    """Return the packed form of supported experts, made one expert at a time."""
    if weight.up.device.type == "cpu":
        from . import cpu, dense_cpu

        if cpu.unsupported_reason(weight) is None:
            return cpu.CpuExperts(weight)
        if dense_cpu.unsupported_reason(weight) is None:
            with contextlib.suppress(ValueError):  # codes that decoded weights do not give back
                return dense_cpu.DenseExperts(weight)
    return PackedExperts(weight)


def runs_as(weight: Any) -> str:
    """Return what reports say of supported experts that will be kept decoded; an empty string for all others."""
    if weight.up.device.type != "cpu":
        return ""
    from . import cpu, dense_cpu

    decoded = cpu.unsupported_reason(weight) is not None and dense_cpu.unsupported_reason(weight) is None
    return dense_cpu.label(weight) if decoded else ""


class PackedExperts(ExpertsBase):
    """Experts on ``hf_optim::packed_experts`` and ``hf_optim::packed_expert_linear``.

    Attributes:
        up_packed, down_packed and so on: see ``naive.StackedWeight``; absent ones are None.
        semaphores: int32, for programs that share a tile.
    """

    semaphores: Tensor

    def __init__(self, weight: Any) -> None:
        super().__init__()
        self.count, self.dtype = weight.count, weight.up.dtype
        self.numbers: dict[str, tuple[int, int, int, int, int]] = {}
        self.bits: dict[str, int] = {}
        for side, matrix in ((UP, weight.up), (DOWN, weight.down)):
            self._stack(side, matrix, weight)
        self._count_tiles()
        self.fused = weight.activation == "silu" and all(self._is_plain(side) for side in (UP, DOWN))
        self.label = self._label(weight)

    def _count_tiles(self) -> None:
        """Make the counters of programs that share a tile, as many as a device of these codes needs."""
        codes: Any = self._buffers["up_packed"]
        count = SEMAPHORES if can_run_triton(codes) else 1
        found = self._buffers.get("semaphores")
        if found is None or found.numel() != count:
            self.register_buffer("semaphores", torch.zeros(count, dtype=torch.int32, device=codes.device))

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> PackedExperts:
        super()._apply(fn, recurse)
        self._count_tiles()  # experts that were packed on a CPU may have come to a GPU
        return self

    @torch.no_grad()
    def _stack(self, side: str, matrix: Any, weight: Any) -> None:
        """Pack the matrices of all experts, one after the other, into buffers that hold all of them."""
        columns, bits = matrix.shape[1], matrix.bits
        width = 8 if matrix.kind == "float" else 4 if bits <= 4 else 8
        self.bits[side] = bits
        stacks: dict[str, Tensor] = {}
        for expert in range(weight.count):
            parts = weight.codes(side, expert)
            codes, scale = torch.cat([part.codes for part in parts]), torch.cat([part.scale for part in parts])
            zero = None if matrix.symmetric else torch.cat([zeros_of(part, bits) for part in parts])
            format = float4.format_of(scale)
            self.numbers[side] = width, matrix.group_size, columns, _inputs(matrix.inputs), format
            if format:
                codes, scale = float4.without_signs(codes, scale.view(torch.uint8), format)
                codes = weight_only.pack(codes, 4, matrix.group_size, format)
            if matrix.kind == "int":
                if zero is None and bits != width:
                    codes = codes + (2 ** (width - 1) - 2 ** (bits - 1))
                codes = weight_only.pack(codes, width, naive.storage_group(matrix.group_size, columns))
            found = {
                "packed": codes,
                "scale": float4.pack_scales(scale, format) if format else scale.T,
                "zero": None if zero is None else zero.T,
                "order": _stacked([part.order for part in parts], columns),
                "input_scale": _joined([part.input_scale for part in parts]),
                "input_zero": _joined([part.input_zero for part in parts]),
                "divisor": _joined([_divisor(part) for part in parts]),
            }
            for key, value in found.items():
                if value is None:
                    continue
                if key not in stacks:
                    stacks[key] = torch.empty((weight.count, *value.shape), dtype=value.dtype, device=value.device)
                    if key == "order":
                        stacks[key][:] = torch.arange(columns, device=value.device)
                stacks[key][expert] = value
        if bits == width and "zero" in stacks and bool((stacks["zero"] == 2 ** (bits - 1)).all()):
            del stacks["zero"]  # a symmetric grid after all
        for key in FIELDS:
            self.register_buffer(f"{side}_{key}", stacks.get(key))

    def weight(self, side: str) -> StackedWeight:
        """Return the matrices of one side."""
        own = self._buffers
        fields: Any = (*(own[f"{side}_{key}"] for key in FIELDS[:-1]), *self.numbers[side], own[f"{side}_divisor"])
        return StackedWeight(*fields)

    def _is_plain(self, side: str) -> bool:
        weight = self.weight(side)
        return weight.packed.dtype != FLOAT8 and weight.order is None and weight.inputs == 0

    def _label(self, weight: Any) -> str:
        what = describe(weight)
        device = weight.up.device
        if device.type == "cuda" and not unsupported_device(device):
            from .launch import unsupported_reason

            reasons = {unsupported_reason(matrix) for matrix in (weight.up, weight.down)} - {None}
            if not reasons:
                return f"packed experts (Triton), {what}"
        return f"packed experts (decoded one at a time), {what}"

    def pairs(self, x: Tensor, experts: Tensor, side: str) -> Tensor:
        """See ``ExpertsBase``."""
        return op.expert_linear(x, experts, self.weight(side), self.semaphores)

    def forward(
        self,
        hidden: Tensor,
        experts: Tensor,
        weights: Tensor,
        activation: Callable[[Tensor], Tensor],
        norm: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        """See ``ExpertsBase``."""
        recording = torch.is_grad_enabled() and (hidden.requires_grad or weights.requires_grad)
        if not self.fused or norm is not None or recording:
            return super().forward(hidden, experts, weights, activation, norm)
        up, down = self.weight(UP), self.weight(DOWN)
        if torch.compiler.is_compiling():
            return torch.ops.hf_optim.packed_experts(
                hidden, experts, weights, *up[:3], up.width, up.group_size, *down[:3], down.width, down.group_size,
                self.semaphores, up.format, up.divisor, down.format, down.divisor,
            )  # fmt: skip
        return op.compute(hidden, experts, weights, up, down, self.semaphores)

    def codes(self, side: str, expert: int) -> list[Codes]:
        """See ``ExpertsBase``."""
        weight, bits = self.weight(side), self.bits[side]
        codes = naive.codes(weight, expert)
        if weight.format:
            scale = float4.unpack_scales(weight.scale[expert], weight.format, -(-weight.columns // weight.group_size))
            shared = None if weight.divisor is None else weight.divisor[expert, :, None].contiguous()
            kind = float4.E4M3 if weight.format == float4.NVFP4 else float4.E8M0
            return [Codes(codes.contiguous(), scale.view(kind), None, global_scale=shared)]
        scale = weight.scale[expert].T.contiguous()
        zero = None if weight.zero is None else weight.zero[expert].T.contiguous()
        if weight.packed.dtype != FLOAT8 and zero is None and bits != weight.width:
            codes = codes - (2 ** (weight.width - 1) - 2 ** (bits - 1))
        if zero is not None and bool((zero == 2 ** (bits - 1)).all()):
            zero = None
        count = max(len(t[expert]) if t is not None else 1 for t in (weight.order, weight.input_scale))
        parts = []
        for index in range(count):
            take: Any = lambda value: None if value is None else value.chunk(count)[index]  # noqa: B023, E731
            order = None if weight.order is None else weight.order[expert, index]
            if order is not None and torch.equal(order, torch.arange(len(order), device=order.device)):
                order = None
            given = [t if t is None else t[expert, index : index + 1] for t in (weight.input_scale, weight.input_zero)]
            parts.append(Codes(take(codes), take(scale), take(zero), order, *given))
        return parts


def _divisor(part: Any) -> Tensor | None:
    shared = getattr(part, "global_scale", None)
    return None if shared is None else shared.flatten()


def _inputs(grid: Any) -> int:
    return 0 if grid is None else INPUTS.index((grid.type, grid.dynamic, grid.symmetric))


def _joined(parts: list[Tensor | None]) -> Tensor | None:
    held = [part for part in parts if part is not None]
    return torch.cat(held) if len(held) == len(parts) else None


def _stacked(orders: list[Tensor | None], columns: int) -> Tensor | None:
    if all(order is None for order in orders):
        return None
    device = next(order.device for order in orders if order is not None)
    return torch.stack([torch.arange(columns, device=device) if order is None else order for order in orders])
