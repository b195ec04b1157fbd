"""Linear layers with 8-bit weights and inputs on ``hf_optim::w8a8``: supported weights, and their packed form.

This module is an entry point of the group ``hf_optim.kernels``. ``supports`` and ``prepack`` read the attributes of an
``hf_optim.compressed.weights.QuantizedWeight``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..common.codes import Codes
from ..common.launch_plan import PlannedLinear
from ..common.support import unsupported_device, unsupported_dtype
from ..hadamard import layer as hadamard
from . import naive, norm_fusion, op

NAME = "w8a8"
# The lowest compute capability with tensor cores for the codes.
LEAST_CAPABILITY = {"int8": (8, 0), "float8": (8, 9)}
# From how many rows on an input is rotated and quantized in one pass. On an H200, with 14336 channels, one row took
# 24.8 us in one pass and 23.8 in two, eight as long in both, 64 27.6 and 28.6.
ONE_PASS_ROWS = 16


def supports(weight: Any) -> str | None:
    """Return None if the kernel can run a weight, otherwise the reason; ``""`` if its inputs are not quantized."""
    inputs = weight.inputs
    if inputs is None or weight.kind == "dense":
        return ""
    if weight.device.type == "cpu":
        from . import cpu

        return cpu.unsupported_reason(weight)
    wanted = {"int": "int8", "float": "float8"}[weight.kind]
    if not 2 <= weight.bits <= 8 or (weight.kind == "float" and weight.bits != 8) or inputs.type != wanted:
        found = f"{weight.bits}-bit {weight.kind} weights with {inputs.type} inputs"
        return f"{found} are not supported, only up to 8 bits of one kind"
    if not weight.symmetric:
        return "its weight has zero points"
    if weight.group_size != weight.shape[1]:
        return f"group size {weight.group_size} is not supported: products of codes need one scale per row"
    if weight.ordered:
        return "its columns are stored in another order"
    if inputs.type == "float8" and not inputs.symmetric:
        return "float8 inputs with zero points are not supported"
    capability = LEAST_CAPABILITY[inputs.type]
    return unsupported_dtype(weight.dtype, op.KERNEL_TYPES) or unsupported_device(
        weight.device, capability, inputs.type
    )


def prepack(weight: Any) -> nn.Module:
    """Return the packed form of a supported weight. Raises ``ValueError`` for static inputs without a scale."""
    if weight.device.type == "cpu":
        from . import cpu

        return cpu.prepack(weight)
    return PackedWeight.of(weight)


class PackedWeight(PlannedLinear):
    """``x W^T + bias`` on ``hf_optim::w8a8``.

    Attributes:
        weight: codes [out, in], int8 or float8_e4m3fn. Integers of fewer bits take a byte each as well.
        w_scale: float32 [out]; ``stored_scale`` [out, 1] as in the checkpoint.
        w_sum: int32 [out], sums of the rows of ``weight``.
        bias: [out], or None.
        input_scale, input_zero: [1], the static grid of inputs; None where each row has its own (or no zero points).
        semaphores: int32, zero between calls. Two calls must not overlap on different streams.
        float8, symmetric: the grid of inputs.
        bits: of a code.
        handoff, bit: where the norm before leaves the codes of its output, and this packed weight's place there
            (``norm_fusion``).
    """

    weight: Tensor
    w_scale: Tensor
    stored_scale: Tensor
    w_sum: Tensor
    bias: Tensor | None
    input_scale: Tensor | None
    input_zero: Tensor | None
    semaphores: Tensor

    def __init__(
        self, weight: Tensor, stored_scale: Tensor, bias: Tensor | None, input_scale: Tensor | None,
        input_zero: Tensor | None, symmetric: bool, dtype: torch.dtype, bits: int = 8,
    ) -> None:  # fmt: skip
        super().__init__()
        self.dtype, self.symmetric, self.float8, self.bits = dtype, symmetric, weight.dtype == naive.FLOAT8, bits
        self.handoff: norm_fusion.Handoff | None = None
        self.bit = 0
        grid = "per token" if input_scale is None else "static"
        self.label = f"w8a8 Triton, {'float8' if self.float8 else 'int8'} ({grid} inputs)"
        sums = torch.zeros(len(weight), dtype=torch.int32, device=weight.device)
        if not self.float8:
            sums = weight.sum(1, dtype=torch.int32)
        self.register_buffer("weight", weight)
        self.register_buffer("stored_scale", stored_scale)
        self.register_buffer("w_scale", stored_scale.flatten().float())
        self.register_buffer("w_sum", sums)
        self.register_buffer("bias", None if bias is None else bias.detach())
        self.register_buffer("input_scale", input_scale)
        self.register_buffer("input_zero", input_zero)
        semaphores = torch.zeros(max(1, -(-len(weight) // 16)), dtype=torch.int32, device=weight.device)
        self.register_buffer("semaphores", semaphores)

    @classmethod
    def of(cls, weight: Any) -> PackedWeight:
        """Pack a ``QuantizedWeight``. Raises ``ValueError`` for static inputs without a scale."""
        found = weight.codes()
        if not weight.inputs.dynamic and found.input_scale is None:
            raise ValueError("its inputs are static but have no scale")
        codes = found.codes
        if codes.dtype != naive.FLOAT8:
            codes = (codes.to(torch.int16) - (1 << (weight.bits - 1))).to(torch.int8)
        scale = zero = None
        if not weight.inputs.dynamic:
            scale = found.input_scale.detach().reshape(1)
            zero = None if weight.inputs.symmetric else _zero_of(found)
        stored = found.scale.detach().reshape(-1, 1).contiguous()
        about = weight.inputs.symmetric, weight.dtype, weight.bits
        return cls(codes.contiguous(), stored, weight.bias, scale, zero, *about)

    def accepts(self, x: Tensor) -> bool:
        """Return True if ``x`` has the dtype and the device of the layer, outside of autocast."""
        return super().accepts(x) and not torch.is_autocast_enabled(x.device.type)

    def forward(self, x: Tensor) -> Tensor:
        """Return the product for ``x`` [..., in]: [..., out]."""
        if torch.compiler.is_compiling() or (x.requires_grad and torch.is_grad_enabled()):
            weight, grid = self.tensors(), self.grid()
            return torch.ops.hf_optim.w8a8(x, *weight[:4], *grid[:2], weight.semaphores, self.symmetric)
        made = None if self.handoff is None else self.handoff.take(x, self.bit)
        if made is not None:
            return self.quantized_forward(*made)
        return self.planned(x)

    def compute(self, x: Tensor) -> Tensor:
        """See ``PlannedLinear``."""
        return op.linear(x, self.tensors(), self.grid())

    def tensors(self) -> naive.PackedTensors:
        """Return the weight as the kernels take it."""
        return naive.PackedTensors(self.weight, self.w_scale, self.w_sum, self.bias, self.semaphores)

    def grid(self) -> naive.InputGrid:
        """Return the grid of the inputs."""
        return naive.InputGrid(self.input_scale, self.input_zero, self.symmetric)

    def quantized_forward(self, codes: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
        """Return [..., out] for codes [..., in], scales [...] and zero points [...] (or none), see ``epilogues``."""
        if torch.compiler.is_compiling():
            return torch.ops.hf_optim.w8a8_codes(codes, scale, zero, *self.tensors(), self.dtype)
        return op.linear_codes(codes, scale, zero, self.tensors(), self.dtype)

    def rotated_forward(self, x: Tensor, block: int) -> Tensor | None:
        """Return ``forward`` of the Hadamard transforms of ``x`` [..., in], block by block: [..., out].

        They are computed and quantized in one pass over ``x``. None where no kernel does that: for float8 and static
        inputs, for zero points, and where a gradient is recorded; and for few rows, where two passes are as fast.
        """
        if self.float8 or not self.symmetric or self.input_scale is not None or not self.accepts(x):
            return None
        if x.requires_grad and torch.is_grad_enabled():
            return None
        if x.numel() < ONE_PASS_ROWS * x.shape[-1]:
            return None
        found = hadamard.compute_int8(x, block)
        return None if found is None else self.quantized_forward(*found)

    def fuse(self, norm: nn.Module, packed_weights: Sequence[PackedWeight]) -> norm_fusion.NormQuantizer | None:
        """Let ``norm`` quantize for ``packed_weights``, one of which is this: see ``norm_fusion.fuse``."""
        return norm_fusion.fuse(norm, packed_weights)

    def codes(self) -> Codes:
        """Return codes, scales and input grid, bitwise identical to those it was packed from."""
        codes = self.weight
        if not self.float8:
            codes = (codes.to(torch.int16) + (1 << (self.bits - 1))).to(torch.uint8)
        return Codes(
            codes=codes, scale=self.stored_scale, zero=None, order=None,
            input_scale=self.input_scale, input_zero=self.input_zero,
        )  # fmt: skip


def _zero_of(found: Any) -> Tensor:
    if found.input_zero is None:
        raise ValueError("its static inputs are asymmetric but have no zero point")
    return found.input_zero.detach().reshape(1)


def join(packed_weights: Sequence[Any]) -> nn.Module | None:
    """Concatenate packed weights along the output; return None if their inputs or dtypes differ."""
    if not isinstance(packed_weights[0], PackedWeight):
        from . import cpu

        return cpu.join(list(packed_weights))
    parts = [part for part in packed_weights if isinstance(part, PackedWeight)]
    if not parts or len(parts) < len(packed_weights) or not all(_alike(parts[0], part) for part in parts):
        return None
    first = parts[0]
    bias = None if first.bias is None else torch.cat([part.bias for part in parts if part.bias is not None])
    # Concatenation of float8 goes through its bytes.
    weight = torch.cat([part.weight.view(torch.uint8) for part in parts]).view(first.weight.dtype)
    scale = torch.cat([part.stored_scale for part in parts])
    return PackedWeight(
        weight, scale, bias, first.input_scale, first.input_zero, first.symmetric, first.dtype, first.bits
    )


def _alike(one: PackedWeight, other: PackedWeight) -> bool:
    def kind(part: PackedWeight) -> tuple:
        columns, scale = part.weight.shape[1], part.stored_scale.dtype
        grid = part.dtype, part.symmetric, part.bits
        return *grid, part.weight.dtype, part.weight.device, columns, scale, part.bias is None

    grids = ((one.input_scale, other.input_scale), (one.input_zero, other.input_zero))
    return kind(one) == kind(other) and all(
        (a is None and b is None) or (a is not None and b is not None and torch.equal(a, b)) for a, b in grids
    )
