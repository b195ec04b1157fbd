"""Packed experts on a CPU: PyTorch's own packed operators, one chosen expert after the other.

They are the operators of ``wna16.cpu``, under the same conditions: models in bfloat16 or float16, codes of up to 4 bits
in groups of 32, 64, 128 or 256 columns, codes of 5 to 8 bits with one scale per row. Other experts are decoded one at a
time (``naive``), which takes little memory and more time. Those of a model in float32 stay decoded (``dense_cpu``).

An expert with many rows is multiplied by dense products, while parts of its matrix are decoded (``wna16.cpu``).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..common.codes import Codes
from ..wna16 import cpu as linear_cpu
from .base import DOWN, UP, ExpertsBase, describe, zeros_of
from .naive import chosen, pairs_per_row


def unsupported_reason(weight: Any) -> str | None:
    """Return why experts do not run on PyTorch's packed operators on this CPU, or None."""
    for matrix in (weight.up, weight.down):
        if matrix.kind != "int" or matrix.inputs is not None:
            return "PyTorch's packed operators take integer weights and inputs that are not quantized"
        if matrix.dtype == torch.float32:
            return "PyTorch's packed operators round to bfloat16"
        if reason := linear_cpu.unsupported_reason(matrix):
            return reason
    return None


class CpuExperts(ExpertsBase):
    """Experts on ``aten::_weight_int4pack_mm_for_cpu`` or ``aten::_weight_int8pack_mm``.

    Attributes:
        up_packed, down_packed: [E, out, in / 2] uint8 or [E, out, in] int8, in the layout of the operator.
        up_grid, down_grid: bfloat16 [E, groups, out, 2], scale and shift; or float32 [E, out], scales.
        up_scale, up_zero and so on: [E, out, groups], as in the checkpoint; zero points may be None.
    """

    def __init__(self, weight: Any) -> None:
        super().__init__()
        self.count, self.dtype = weight.count, weight.up.dtype
        self.bits: dict[str, int] = {}
        self.group: dict[str, int] = {}
        for side, matrix in ((UP, weight.up), (DOWN, weight.down)):
            self._stack(side, matrix, weight)
        self.label = f"packed experts (PyTorch's CPU operators), {describe(weight)}"

    @torch.no_grad()
    def _stack(self, side: str, matrix: Any, weight: Any) -> None:
        self.bits[side] = matrix.bits
        is_int4 = matrix.bits <= 4
        kind = linear_cpu.Int4Linear if is_int4 else linear_cpu.Int8Linear
        stacks: dict[str, Tensor] = {}
        for expert in range(weight.count):
            parts = weight.codes(side, expert)
            scale = torch.cat([part.scale for part in parts])
            zero = None if matrix.symmetric else torch.cat([zeros_of(part, matrix.bits) for part in parts])
            found = Codes(torch.cat([part.codes for part in parts]), scale, zero)
            one: Any = kind(found, matrix.bits, matrix.group_size, matrix.dtype, None)
            self.group[side] = one.group if is_int4 else 0
            own = {"packed": one.packed, "grid": one.pair if is_int4 else one.factor, "scale": scale, "zero": zero}
            for key, value in own.items():
                if value is None:
                    continue
                if key not in stacks:
                    stacks[key] = torch.empty((weight.count, *value.shape), dtype=value.dtype)
                stacks[key][expert] = value
        for key in ("packed", "grid", "scale", "zero"):
            self.register_buffer(f"{side}_{key}", stacks.get(key))

    def pairs(self, x: Tensor, experts: Tensor, side: str) -> Tensor:
        """See ``ExpertsBase``."""
        own = self._buffers
        args = (x, experts, own[f"{side}_packed"], own[f"{side}_grid"], self.group[side])
        if torch.compiler.is_compiling() or (x.requires_grad and torch.is_grad_enabled()):
            return torch.ops.hf_optim.packed_expert_linear_cpu(*args)
        return _linear(*args)  # type: ignore[arg-type]

    def codes(self, side: str, expert: int) -> list[Codes]:
        """See ``ExpertsBase``."""
        own, bits = self._buffers, self.bits[side]
        packed, scale, zero = (own[f"{side}_{key}"] for key in ("packed", "scale", "zero"))
        assert packed is not None
        assert scale is not None
        if self.group[side]:
            codes = linear_cpu._unpack_int4(packed[expert]) - (8 - 2 ** (bits - 1))
        else:
            codes = (packed[expert].to(torch.int16) + 2 ** (bits - 1)).to(torch.uint8)
        return [Codes(codes, scale[expert], None if zero is None else zero[expert], None)]


def _linear(x: Tensor, experts: Tensor, packed: Tensor, grid: Tensor, group: int) -> Tensor:
    """Return the product of each pair, [T k, out]; zeros for pairs that no expert computes."""
    each = pairs_per_row(x, experts)
    out = x.new_zeros(experts.numel(), packed.shape[1])
    for number, pairs in chosen(experts, len(packed)):
        rows = x[pairs // each]
        narrow = rows.to(torch.bfloat16).contiguous()
        if group:
            y = linear_cpu.int4_product(narrow, packed[number], grid[number], group)
        else:
            ones = torch.ones(packed.shape[1], dtype=torch.bfloat16)
            y = linear_cpu.int8_product(narrow, packed[number], grid[number], ones)
        out[pairs] = y.to(x.dtype)
    return out


def _decoded(packed: Tensor, grid: Tensor, group: int, dtype: torch.dtype) -> Tensor:
    """Return the matrix [out, in] of one expert as the operator has it."""
    if not group:
        return (packed.float() * grid[:, None]).to(dtype)
    codes = linear_cpu._unpack_int4(packed).float().view(packed.shape[0], -1, group) - 8
    scale, shift = grid.float().transpose(0, 1).unbind(-1)
    return (codes * scale[..., None] + shift[..., None]).view(packed.shape[0], -1).to(dtype)


@torch.library.custom_op("hf_optim::packed_expert_linear_cpu", mutates_args=())
def packed_expert_linear_cpu(x: Tensor, experts: Tensor, packed: Tensor, grid: Tensor, group: int) -> Tensor:
    """Return the product of each pair, [T k, out].

    Args:
        x: [T, in] or [T k, in].
        experts: int64 [T, k].
        packed, grid: see ``CpuExperts``.
        group: columns that share a scale in ``grid``; 0 for int8.
    """
    return _linear(x, experts, packed, grid, group)


@packed_expert_linear_cpu.register_fake
def _(x, experts, packed, grid, group) -> Tensor:
    return x.new_empty((experts.shape[0] * experts.shape[1], packed.shape[1]))


@torch.library.custom_op("hf_optim::packed_expert_linear_cpu_grad", mutates_args=())
def packed_expert_linear_cpu_grad(grad: Tensor, experts: Tensor, packed: Tensor, grid: Tensor, group: int) -> Tensor:
    """Return the gradient of each pair's input, [T k, in]."""
    out = grad.new_zeros(len(grad), packed.shape[2] * (2 if group else 1))
    for number, pairs in chosen(experts, len(packed)):
        out[pairs] = grad[pairs] @ _decoded(packed[number], grid[number], group, grad.dtype)
    return out


@packed_expert_linear_cpu_grad.register_fake
def _(grad, experts, packed, grid, group) -> Tensor:
    return grad.new_empty((grad.shape[0], packed.shape[2] * (2 if group else 1)))


def _setup_context(ctx, inputs, output) -> None:
    x, experts, packed, grid, group = inputs
    ctx.save_for_backward(experts, packed, grid)
    ctx.group, ctx.rows = group, x.shape[0]


def _backward(ctx, grad: Tensor):
    own = torch.ops.hf_optim.packed_expert_linear_cpu_grad(grad, *ctx.saved_tensors, ctx.group)
    if ctx.rows != own.shape[0]:
        own = own.view(ctx.rows, -1, own.shape[1]).sum(1)
    return own, None, None, None, None


packed_expert_linear_cpu.register_autograd(_backward, setup_context=_setup_context)
