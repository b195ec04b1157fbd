"""Linear layers with 8-bit weights and inputs on ``hf_optim::w8a8``: supported weights, and their packed form.

This module is an entry point of the group ``hf_optim.kernels``. ``supports`` and ``prepack`` read the attributes of an
``hf_optim.compressed.weights.QuantizedWeight``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import util
from typing import Any

import torch
from torch import Tensor, nn

from ..common.codes import Codes
from . import fusing, naive, op
from .plans import Planned

NAME = "w8a8"
# The lowest compute capability with tensor cores for the codes.
LEAST_CAPABILITY = {"int8": (8, 0), "float8": (8, 9)}


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
        kinds = f"{weight.bits}-bit {weight.kind} weights with {inputs.type} inputs"
        return f"{kinds}; supported are up to 8 bits, both integer or both float8"
    if not weight.symmetric:
        return "its weight has zero points"
    if weight.group_size != weight.shape[1]:
        return f"scales per group of {weight.group_size} columns; the product of codes needs one scale per row"
    if weight.ordered:
        return "its columns are stored in another order"
    if inputs.type == "float8" and not inputs.symmetric:
        return "float8 inputs with zero points"
    return _unsupported_device(weight)


def _unsupported_device(weight: Any) -> str | None:
    if weight.device.type != "cuda":
        return f"no kernel for {weight.device.type} devices"
    if weight.dtype not in op.KERNEL_TYPES:
        return f"{str(weight.dtype).removeprefix('torch.')} inputs"
    if util.find_spec("triton") is None:
        return "Triton is not installed"
    held, least = torch.cuda.get_device_capability(weight.device), LEAST_CAPABILITY[weight.inputs.type]
    if held < least:
        return f"{weight.inputs.type} needs compute capability {least[0]}.{least[1]}, this GPU has {held[0]}.{held[1]}"
    return None


def prepack(weight: Any) -> nn.Module:
    """Return the packed form of a supported weight. Raises ``ValueError`` for static inputs without a scale."""
    if weight.device.type == "cpu":
        from . import cpu

        return cpu.prepack(weight)
    return PackedWeight.of(weight)


class PackedWeight(Planned):
    """``x W^T + bias`` on ``hf_optim::w8a8``.

    Attributes:
        weight: codes [out, in], int8 or float8_e4m3fn. Integers of fewer bits take a byte each as well.
        w_scale: float32 [out]; ``stored_scale`` [out, 1] as the checkpoint has it.
        w_sum: int32 [out], sums of the rows of ``weight``.
        bias: [out], or None.
        input_scale, input_zero: [1], the static grid of inputs; None where each row has its own (or no zero points).
        counters: int32, zero between calls. Two calls must not overlap on different streams.
        float8, symmetric: the grid of inputs.
        bits: of a code.
        handoff, bit: where the norm before leaves the codes of its output, and this packed weight's place there
            (``fusing``).
    """

    weight: Tensor
    w_scale: Tensor
    stored_scale: Tensor
    w_sum: Tensor
    bias: Tensor | None
    input_scale: Tensor | None
    input_zero: Tensor | None
    counters: Tensor

    def __init__(
        self, weight: Tensor, stored_scale: Tensor, bias: Tensor | None, input_scale: Tensor | None,
        input_zero: Tensor | None, symmetric: bool, dtype: torch.dtype, bits: int = 8,
    ) -> None:  # fmt: skip
        super().__init__()
        self.dtype, self.symmetric, self.float8, self.bits = dtype, symmetric, weight.dtype == naive.FLOAT8, bits
        self.handoff: fusing.Handoff | None = None
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
        counters = torch.zeros(max(1, -(-len(weight) // 16)), dtype=torch.int32, device=weight.device)
        self.register_buffer("counters", counters)

    @classmethod
    def of(cls, weight: Any) -> PackedWeight:
        """The packed weight of a ``QuantizedWeight``. Raises ``ValueError`` for static inputs without a scale."""
        found = weight.codes()
        if not weight.inputs.dynamic and found.input_scale is None:
            raise ValueError("its inputs are static, but have no scale")
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
        """Whether the input is of the layer's type, and on its device."""
        same = x.dtype == self.dtype and x.device == self.weight.device
        return same and not torch.is_autocast_enabled(x.device.type)

    def forward(self, x: Tensor) -> Tensor:
        """``x`` [..., in] -> [..., out]."""
        if torch.compiler.is_compiling() or (x.requires_grad and torch.is_grad_enabled()):
            return self._call(torch.ops.hf_optim.w8a8, x)
        made = None if self.handoff is None else self.handoff.take(x, self.bit)
        if made is not None:
            return self.quantized_forward(*made)
        if not x.is_cuda or x.dtype != self.dtype:
            return self._call(op.linear, x)
        return self.planned(x, lambda: self._call(op.linear, x))

    def _call(self, call: Callable[..., Tensor], x: Tensor) -> Tensor:
        return call(
            x, self.weight, self.w_scale, self.w_sum, self.bias, self.input_scale, self.input_zero, self.counters,
            self.symmetric,
        )  # fmt: skip

    def quantized_forward(self, codes: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
        """Codes [..., in], scales [...] and zero points [...] (or none) of rows -> [..., out]. See ``producers``."""
        call = torch.ops.hf_optim.w8a8_codes if torch.compiler.is_compiling() else op.linear_codes
        return call(codes, scale, zero, self.weight, self.w_scale, self.w_sum, self.bias, self.counters, self.dtype)

    def fuse(self, norm: nn.Module, packed_weights: Sequence[PackedWeight]) -> fusing.NormQuantizer | None:
        """Let ``norm`` quantize for ``packed_weights``, of which this is one: see ``fusing.fuse``."""
        return fusing.fuse(norm, packed_weights)

    def codes(self) -> Codes:
        """The codes, scales and input grid this was made of, bit for bit."""
        codes = self.weight
        if not self.float8:
            codes = (codes.to(torch.int16) + (1 << (self.bits - 1))).to(torch.uint8)
        return Codes(
            codes=codes, scale=self.stored_scale, zero=None, order=None,
            input_scale=self.input_scale, input_zero=self.input_zero,
        )  # fmt: skip


def _zero_of(found: Any) -> Tensor:
    if found.input_zero is None:
        raise ValueError("its static inputs are asymmetric, but have no zero point")
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
