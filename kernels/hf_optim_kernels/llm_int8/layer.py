"""Linear layers of LLM.int8() on ``hf_optim::llm_int8``: supported weights, and their packed form.

This module is an entry point of the group ``hf_optim.kernels``. ``supports`` and ``prepack`` read the attributes of an
``hf_optim.compressed.weights.QuantizedWeight``.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import util
from typing import Any

import torch
from torch import Tensor, nn

from ..common.codes import Codes
from ..w8a8.op import KERNEL_TYPES
from ..w8a8.plans import Planned
from . import cpu, naive, op, tiles

NAME = "llm_int8"
OUTLIERS = True
LEAST_CAPABILITY = (8, 0)


def supports(weight: Any) -> str | None:
    """Return None if the kernel runs a weight faster, otherwise the reason; ``""`` without outlier decomposition."""
    if weight.outliers is None:
        return ""
    return cpu.unsupported_reason(weight) if weight.device.type == "cpu" else _unsupported_device(weight)


def supports_everywhere(weight: Any) -> str | None:
    """Return ``supports`` regardless of speed, to reproduce on a CPU what a GPU computes."""
    if weight.outliers is None or weight.device.type != "cpu":
        return supports(weight)
    return None if weight.dtype.is_floating_point else f"{str(weight.dtype).removeprefix('torch.')} inputs"


def _unsupported_device(weight: Any) -> str | None:
    if weight.device.type != "cuda":
        return f"no kernel for {weight.device.type} devices"
    if weight.dtype not in KERNEL_TYPES:
        return f"{str(weight.dtype).removeprefix('torch.')} inputs"
    if util.find_spec("triton") is None:
        return "Triton is not installed"
    held = torch.cuda.get_device_capability(weight.device)
    if held < LEAST_CAPABILITY:
        return f"int8 needs compute capability 8.0, this GPU has {held[0]}.{held[1]}"
    return None


def prepack(weight: Any) -> LLMInt8Linear:
    """Return the packed form of a supported weight."""
    found = weight.codes()
    codes = (found.codes ^ 128).view(torch.int8).contiguous()
    return LLMInt8Linear(codes, found.scale.detach(), weight.bias, weight.outliers, weight.dtype)


class LLMInt8Linear(Planned):
    """``x W^T + bias`` on ``hf_optim::llm_int8``, the weight quantized by rows.

    Attributes:
        weight: int8 codes [out, in].
        w_scale: float32 [out]; ``stored_scale`` [out, 1] as the checkpoint has it.
        bias: [out], or None.
        threshold: columns of the input with a larger magnitude are multiplied in its own type: with 0 all of them, with
            infinity none.
        counters: int32, zero between calls. Two calls must not overlap on different streams.
    """

    weight: Tensor
    w_scale: Tensor
    stored_scale: Tensor
    bias: Tensor | None
    counters: Tensor

    def __init__(
        self, weight: Tensor, w_scale: Tensor, bias: Tensor | None, threshold: float, dtype: torch.dtype
    ) -> None:  # fmt: skip
        super().__init__()
        if not threshold >= 0:
            raise ValueError(f"threshold {threshold}; it must not be negative")
        self.threshold, self.dtype = float(threshold), dtype
        runs = "int8 product of PyTorch" if weight.device.type == "cpu" else "Triton"
        self.label = f"llm_int8 {runs} (outliers above {threshold:g})"
        self.register_buffer("weight", weight)
        self.register_buffer("stored_scale", w_scale.reshape(-1, 1).clone())
        self.register_buffer("w_scale", w_scale.flatten().float())
        self.register_buffer("bias", None if bias is None else bias.detach())
        size = tiles.counters_size(*weight.shape)
        self.register_buffer("counters", torch.zeros(size, dtype=torch.int32, device=weight.device))

    @classmethod
    def from_linear(cls, linear: nn.Linear, threshold: float = 6.0) -> LLMInt8Linear:
        """Quantize a dense layer. Raises ``ValueError`` for a weight that is not finite."""
        if not bool(linear.weight.isfinite().all()):
            raise ValueError("its weight is not finite")
        codes, scale = naive.quantize_weight(linear.weight)
        return cls(codes, scale, linear.bias, threshold, linear.weight.dtype)

    def accepts(self, x: Tensor) -> bool:
        """Whether the input is of the layer's type, and on its device."""
        same = x.dtype == self.dtype and x.device == self.weight.device
        return same and not torch.is_autocast_enabled(x.device.type)

    def forward(self, x: Tensor) -> Tensor:
        """``x`` [..., in] -> [..., out]."""
        if torch.compiler.is_compiling() or (x.requires_grad and torch.is_grad_enabled()):
            return self._call(torch.ops.hf_optim.llm_int8, x)
        if not x.is_cuda or x.dtype != self.dtype:
            return self._call(op.linear, x)
        return self.planned(x, lambda: self._call(op.linear, x))

    def _call(self, call: Callable[..., Tensor], x: Tensor) -> Tensor:
        return call(x, self.weight, self.w_scale, self.bias, self.threshold, self.counters)

    def codes(self) -> Codes:
        """The codes (uint8, 128 for 0) and scales of the weight, bit for bit."""
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
