"""Weight-only layers of 4-bit floats on a CPU, where PyTorch has no operator for them.

The codes stay packed, two patterns to a byte as in a checkpoint; a few rows at a time are decoded, through a table of
the two numbers of each byte, and multiplied. A decoded number is rounded to bfloat16, as stock transformers decodes it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..common.codes import Codes
from ..common.cpu_linear import CpuLinear
from . import float4

# Weights decoded at a time: few enough for the caches.
DECODED = 1 << 19
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def decode_rows(
    table: Tensor, packed: Tensor, scale: Tensor, divisor: Tensor | None, format: int, dtype: torch.dtype
) -> Tensor:
    """Return decoded rows [n, in] in ``dtype``.

    Args:
        table: float32 [256, 2], the two numbers of each byte.
        packed: uint8 [n, in / 2]; the low half of a byte is the even column.
        scale: uint8 [n, groups].
        divisor: float32 [n, 1], or None.
        format: ``float4.NVFP4`` or ``MXFP4``.
    """
    rows, groups = scale.shape
    factor = float4.scale_numbers(scale, format)
    factor = factor if divisor is None else factor / divisor
    numbers = table.index_select(0, packed.reshape(-1).int()).view(rows, groups, -1)
    return numbers.mul_(factor[..., None]).view(rows, -1).to(torch.bfloat16).to(dtype)


class Float4Linear(CpuLinear):
    """``x W^T + bias`` with a packed weight, decoded in parts for each call.

    Attributes:
        packed: uint8 [out, in / 2]; scale: uint8 [out, groups]; divisor: float32 [out, 1], or None.
        bias: [out], or None.
        table: float32 [256, 2], the two numbers of each byte.
    """

    table: Tensor
    scale: Tensor
    divisor: Tensor | None
    bias: Tensor | None

    def __init__(self, found: Any, dtype: torch.dtype, bias: Tensor | None) -> None:
        super().__init__()
        self.dtype, self.format = dtype, float4.format_of(found.scale)
        self.label = f"decoded in parts (CPU), {float4.NAMES[self.format]}"
        low, high = found.codes.view(len(found.codes), -1, 2).unbind(-1)
        self.register_buffer("packed", low | (high << 4))
        self.register_buffer("scale", found.scale.view(torch.uint8))
        self.register_buffer("divisor", found.global_scale)
        self.register_buffer("bias", bias)
        # The layer's own: what is kept for all layers may have been made while a model of fake tensors was traced.
        byte = torch.arange(256, device=low.device)
        self.register_buffer("table", float4.numbers(torch.stack((byte & 15, byte >> 4), dim=1)), persistent=False)

    def product(self, x: Tensor) -> Tensor:
        """See ``CpuLinear``."""
        flat = x.reshape(-1, x.shape[-1])
        step = max(16, DECODED // max(1, x.shape[-1]))
        out = x.new_empty(len(flat), len(self.packed))
        for begin in range(0, len(self.packed), step):
            end = min(begin + step, len(self.packed))
            out[:, begin:end] = F.linear(flat, self._rows(begin, end, x.dtype))
        return (out if self.bias is None else out.add_(self.bias)).view(*x.shape[:-1], out.shape[1])

    def _rows(self, begin: int, end: int, dtype: torch.dtype) -> Tensor:
        divisor = None if self.divisor is None else self.divisor[begin:end]
        return decode_rows(self.table, self.packed[begin:end], self.scale[begin:end], divisor, self.format, dtype)

    def decoded(self, dtype: torch.dtype) -> Tensor:
        """See ``CpuLinear``."""
        return self._rows(0, len(self.packed), dtype)

    def codes(self) -> Codes:
        """Return the codes, bitwise identical to those it was packed from."""
        patterns = torch.stack((self.packed & 15, self.packed >> 4), dim=-1).view(len(self.packed), -1)
        scale = self.scale.view(float4.E4M3 if self.format == float4.NVFP4 else float4.E8M0)
        return Codes(patterns, scale, None, global_scale=self.divisor)
