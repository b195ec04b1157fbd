"""Linear layers of LLM.int8() on ``hf_optim::llm_int8``: supported weights, and their packed form.

This module is an entry point of the group ``hf_optim.kernels``. ``supports`` and ``prepack`` read the attributes of an
``hf_optim.compressed.weights.QuantizedWeight``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..common.codes import Codes
from ..common.launch_plan import PlannedLinear
from ..common.support import dtype_name, unsupported_device, unsupported_dtype
from ..w8a8.op import KERNEL_TYPES
from . import cpu, naive, op, tiles

NAME = "llm_int8"
OUTLIERS = True


def supports(weight: Any) -> str | None:
    """Return None if the kernel runs a weight faster, otherwise the reason; ``""`` without outlier decomposition."""
    if weight.outliers is None:
        return ""
    if weight.device.type == "cpu":
        return cpu.unsupported_reason(weight)
    return unsupported_dtype(weight.dtype, KERNEL_TYPES) or unsupported_device(weight.device, subject="int8")


def supports_everywhere(weight: Any) -> str | None:
    """Return ``supports`` regardless of speed, to reproduce on a CPU what a GPU computes."""
    if weight.outliers is None or weight.device.type != "cpu":
        return supports(weight)
    return None if weight.dtype.is_floating_point else f"{dtype_name(weight.dtype)} inputs are not supported"


def prepack(weight: Any) -> LLMInt8Linear:
    """Return the packed form of a supported weight."""
    found = weight.codes()
    codes = (found.codes ^ 128).view(torch.int8).contiguous()
    return LLMInt8Linear(codes, found.scale.detach(), weight.bias, weight.outliers, weight.dtype)


class LLMInt8Linear(PlannedLinear):
    """``x W^T + bias`` on ``hf_optim::llm_int8``, with a weight quantized per row.

    Attributes:
        weight: int8 codes [out, in].
        w_scale: float32 [out]; ``stored_scale`` [out, 1] as in the checkpoint.
        bias: [out], or None.
        threshold: columns of the input with a larger magnitude are multiplied in its own dtype: with 0 all of them,
            with infinity none.
        semaphores: int32, zero between calls. Two calls must not overlap on different streams.
    """

    weight: Tensor
    w_scale: Tensor
    stored_scale: Tensor
    bias: Tensor | None
    semaphores: Tensor

    def __init__(
        self, weight: Tensor, w_scale: Tensor, bias: Tensor | None, threshold: float, dtype: torch.dtype
    ) -> None:  # fmt: skip
        super().__init__()
        if not threshold >= 0:
            raise ValueError(f"threshold {threshold} must not be negative")
        self.threshold, self.dtype = float(threshold), dtype
        runs = "int8 product of PyTorch" if weight.device.type == "cpu" else "Triton"
        self.label = f"llm_int8 {runs} (outliers above {threshold:g})"
        self.register_buffer("weight", weight)
        self.register_buffer("stored_scale", w_scale.reshape(-1, 1).clone())
        self.register_buffer("w_scale", w_scale.flatten().float())
        self.register_buffer("bias", None if bias is None else bias.detach())
        size = tiles.semaphores_size(*weight.shape)
        self.register_buffer("semaphores", torch.zeros(size, dtype=torch.int32, device=weight.device))

    @classmethod
    def from_linear(cls, linear: nn.Linear, threshold: float = 6.0) -> LLMInt8Linear:
        """Quantize a dense layer. Raises ``ValueError`` for a weight that is not finite."""
        if not bool(linear.weight.isfinite().all()):
            raise ValueError("its weight is not finite")
        codes, scale = naive.quantize_weight(linear.weight)
        return cls(codes, scale, linear.bias, threshold, linear.weight.dtype)

    def accepts(self, x: Tensor) -> bool:
        """Return True if ``x`` has the dtype and the device of the layer, outside of autocast."""
        return super().accepts(x) and not torch.is_autocast_enabled(x.device.type)

    def forward(self, x: Tensor) -> Tensor:
        """Return the product for ``x`` [..., in]: [..., out]."""
        if torch.compiler.is_compiling() or (x.requires_grad and torch.is_grad_enabled()):
            weight = self.tensors()
            return torch.ops.hf_optim.llm_int8(x, *weight[:3], self.threshold, weight.semaphores)
        return self.planned(x)

    def compute(self, x: Tensor) -> Tensor:
        """See ``PlannedLinear``."""
        return op.linear(x, self.tensors(), self.threshold)

    def tensors(self) -> naive.PackedTensors:
        """Return the weight as the kernels take it."""
        return naive.PackedTensors(self.weight, self.w_scale, self.bias, self.semaphores)

    def codes(self) -> Codes:
        """Return the codes (uint8, 128 for 0) and scales of the weight, bitwise identical to those it has."""
        codes = self.weight.view(torch.uint8) ^ 128
        return Codes(codes, self.stored_scale, None)


def join(packed_weights: list[nn.Module]) -> LLMInt8Linear | None:
    """Concatenate packed weights along the output; return None if their inputs or dtypes differ."""
    parts = [part for part in packed_weights if isinstance(part, LLMInt8Linear)]
    if not parts or len(parts) < len(packed_weights):
        return None
    kinds = {(p.weight.shape[1], p.weight.device, p.dtype, p.threshold, p.bias is None) for p in parts}
    if len(kinds) > 1:
        return None
    first = parts[0]
    bias = None if first.bias is None else torch.cat([part.bias for part in parts if part.bias is not None])
    weight, scale = torch.cat([p.weight for p in parts]), torch.cat([p.stored_scale for p in parts])
    return LLMInt8Linear(weight, scale, bias, first.threshold, first.dtype)
