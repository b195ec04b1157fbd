"""Experts of a float32 model on a CPU: the decoded matrices, as for linear layers (``wna16.cpu.DenseLinear``).

PyTorch's packed operators round to bfloat16, and decoding an expert for each call takes longer than its product. So
these experts save no memory; their codes are recovered from the decoded matrices, bit-exact.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..common.codes import Codes
from ..wna16.cpu import DenseLinear
from .base import DOWN, UP, ExpertsBase, describe, zeros_of
from .naive import chosen, pairs_per_row


def unsupported_reason(weight: Any) -> str | None:
    """Return why experts are not kept decoded, or None."""
    for matrix in (weight.up, weight.down):
        if matrix.dtype != torch.float32:
            return "its model is not float32"
        if matrix.kind != "int" or matrix.inputs is not None or matrix.ordered:
            return "its codes cannot be recovered from decoded integer weights alone"
    return None


def label(weight: Any) -> str:
    """Return what reports print for experts that are kept decoded."""
    return f"dense float32 experts (PyTorch's packed operators round to bfloat16), {describe(weight)}"


class DenseExperts(ExpertsBase):
    """Experts with decoded float32 matrices.

    Raises ``ValueError`` if the codes of a matrix cannot be recovered (scales of 0 or out of range).

    Attributes:
        up_packed, down_packed: float32 [E, out, in], decoded.
        up_scale, up_zero and so on: [E, out, groups], as in the checkpoint; zero points may be None.
    """

    def __init__(self, weight: Any) -> None:
        super().__init__()
        self.count, self.dtype = weight.count, torch.float32
        self.grids: dict[str, tuple[int, int]] = {}
        for side, matrix in ((UP, weight.up), (DOWN, weight.down)):
            self.grids[side] = matrix.bits, matrix.group_size
            self._stack(side, matrix, weight)
        self.label = label(weight)

    @torch.no_grad()
    def _stack(self, side: str, matrix: Any, weight: Any) -> None:
        stacks: dict[str, Tensor] = {}
        for expert in range(weight.count):
            parts = weight.codes(side, expert)
            if any(part.order is not None for part in parts):
                raise ValueError("its columns are reordered")
            zero = None if matrix.symmetric else torch.cat([zeros_of(part, matrix.bits) for part in parts])
            scale = torch.cat([part.scale for part in parts])
            found = Codes(torch.cat([part.codes for part in parts]), scale, zero)
            one = DenseLinear(found, matrix.bits, matrix.group_size, None)
            for key, value in (("packed", one.dense), ("scale", scale), ("zero", zero)):
                if value is None:
                    continue
                if key not in stacks:
                    stacks[key] = torch.empty((weight.count, *value.shape), dtype=value.dtype)
                stacks[key][expert] = value
        for key in ("packed", "scale", "zero"):
            self.register_buffer(f"{side}_{key}", stacks.get(key))

    def accepts(self, x: Tensor) -> bool:
        """Return True if ``x`` is float32, and on the device of the experts."""
        return x.dtype == torch.float32 and super().accepts(x)

    def pairs(self, x: Tensor, experts: Tensor, side: str) -> Tensor:
        """See ``ExpertsBase``."""
        dense: Any = self._buffers[f"{side}_packed"]
        if torch.compiler.is_compiling() or (x.requires_grad and torch.is_grad_enabled()):
            return torch.ops.hf_optim.dense_expert_linear_cpu(x, experts, dense)
        return _linear(x, experts, dense)

    def codes(self, side: str, expert: int) -> list[Codes]:
        """See ``ExpertsBase``."""
        dense, scale, zero = (self._buffers[f"{side}_{key}"] for key in ("packed", "scale", "zero"))
        assert dense is not None
        assert scale is not None
        bits, group = self.grids[side]
        grouped = dense[expert].view(dense.shape[1], -1, group)
        offset = 2.0 ** (bits - 1) if zero is None else zero[expert].float()[..., None]
        steps = (grouped / scale[expert].float()[..., None]).round_().add_(offset)
        codes = steps.to(torch.uint8).view(dense.shape[1:])
        return [Codes(codes, scale[expert], None if zero is None else zero[expert], None)]


def _linear(x: Tensor, experts: Tensor, dense: Tensor) -> Tensor:
    """Return the product of each pair, [T k, out]; zeros for pairs that no expert computes."""
    each = pairs_per_row(x, experts)
    out = x.new_zeros(experts.numel(), dense.shape[1])
    for number, pairs in chosen(experts, len(dense)):
        out[pairs] = F.linear(x[pairs // each], dense[number])
    return out


@torch.library.custom_op("hf_optim::dense_expert_linear_cpu", mutates_args=())
def dense_expert_linear_cpu(x: Tensor, experts: Tensor, dense: Tensor) -> Tensor:
    """Return the product of each pair, [T k, out].

    Args:
        x: [T, in] or [T k, in].
        experts: int64 [T, k].
        dense: [E, out, in].
    """
    return _linear(x, experts, dense)


@dense_expert_linear_cpu.register_fake
def _(x, experts, dense) -> Tensor:
    return x.new_empty((experts.shape[0] * experts.shape[1], dense.shape[1]))


@torch.library.custom_op("hf_optim::dense_expert_linear_cpu_grad", mutates_args=())
def dense_expert_linear_cpu_grad(grad: Tensor, experts: Tensor, dense: Tensor) -> Tensor:
    """Return the gradient of each pair's input, [T k, in]."""
    out = grad.new_zeros(len(grad), dense.shape[2])
    for number, pairs in chosen(experts, len(dense)):
        out[pairs] = grad[pairs] @ dense[number]
    return out


@dense_expert_linear_cpu_grad.register_fake
def _(grad, experts, dense) -> Tensor:
    return grad.new_empty((grad.shape[0], dense.shape[2]))


def _setup_context(ctx, inputs, output) -> None:
    x, experts, dense = inputs
    ctx.save_for_backward(experts, dense)
    ctx.rows = x.shape[0]


def _backward(ctx, grad: Tensor):
    own = torch.ops.hf_optim.dense_expert_linear_cpu_grad(grad, *ctx.saved_tensors)
    return own if ctx.rows == own.shape[0] else own.view(ctx.rows, -1, own.shape[1]).sum(1), None, None


dense_expert_linear_cpu.register_autograd(_backward, setup_context=_setup_context)
