"""Weight-only quantized linear layers on a CPU: PyTorch's own packed operators, where they are right and faster.

Codes of up to 4 bits run on ``aten::_weight_int4pack_mm_for_cpu`` (groups of 32, 64, 128 or 256 columns, rows in
sixteens), codes of 5 to 8 bits on ``aten::_weight_int8pack_mm`` (one scale a row, symmetric). Both have a fast path for
bfloat16 alone: other types run up to a hundred times slower than dense. So the input is rounded to bfloat16 whatever
the model's type: the result differs from the dense one by about 0.3 % (norm of the difference over norm), a small part
of what 4-bit codes cost. Neither operator knows a gradient; they are asked only where none is recorded.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

INT4_GROUPS = (256, 128, 64, 32)
INT4_ROWS = 16
CAPABILITIES = ("AVX2", "AVX512")
# Measured (torch 2.13, one thread of a 2.8 GHz Ice Lake): smaller layers, or more rows, are faster dense.
LEAST_WEIGHTS_INT4 = {torch.float32: 1 << 19, torch.bfloat16: 1 << 18, torch.float16: 1 << 18}
LEAST_WEIGHTS_INT8 = 1 << 20
MOST_ROWS = 8
# bfloat16 scales and zero points move the weight; more than this (norm over norm) and the layer stays dense.
MOST_ERROR = 2.0**-8


def refusal(weight: Tensor, bits: int, group_size: int, symmetric: bool) -> str | None:
    """Why a weight [out, in] on such a grid stays dense on this CPU; None where it need not."""
    rows, columns = weight.shape
    capability = torch.backends.cpu.get_cpu_capability()
    if capability not in CAPABILITIES:
        return f"PyTorch's packed operators were measured with {' and '.join(CAPABILITIES)}, this CPU has {capability}"
    if bits <= 4 and _int4_group(group_size) is None:
        return f"groups of {group_size} columns; PyTorch's int4 operator has {', '.join(map(str, INT4_GROUPS))}"
    if bits <= 4 and rows % INT4_ROWS:
        return f"{rows} rows are no multiple of {INT4_ROWS}"
    if bits > 4 and group_size < columns:
        return f"groups of {group_size} columns; PyTorch's int8 operator has one scale a row"
    if bits > 4 and not symmetric:
        return "zero points; PyTorch's int8 operator has none"
    least = LEAST_WEIGHTS_INT4[weight.dtype] if bits <= 4 else LEAST_WEIGHTS_INT8
    if weight.numel() < least:
        return f"a layer of {weight.numel():,} weights is faster dense (packed pays from {least:,})"
    return None


def _int4_group(group_size: int) -> int | None:
    """The largest group of the operator that divides a group of the weight, whose scale is then repeated."""
    return next((size for size in INT4_GROUPS if group_size % size == 0), None)


class PackedLinear(nn.Module):
    """``x W^T + bias`` on a packed operator of PyTorch.

    Args:
        codes: uint8 [out, in].
        scale, zero: float32 [out, groups]; ``zero`` None for the symmetric grid.
        bias: [out], or None.
        width: 4 or 8.
        weight: the dequantized weight [out, in], to check against.

    Raises ``ValueError`` when bfloat16 scales do not represent the weight well enough.
    """

    def __init__(
        self, codes: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, width: int, weight: Tensor
    ) -> None:
        super().__init__()
        self.width, self.dtype = width, weight.dtype
        self.label = f"wna16 int{width} of PyTorch (bfloat16 inputs, up to {MOST_ROWS} rows)"
        self.register_buffer("bias", None if bias is None else bias.detach())
        if width == 4:
            self._pack_int4(codes, scale, zero, weight)
        else:
            self.register_buffer("packed", (codes.to(torch.int16) - 128).to(torch.int8))
            # The operator multiplies by one, and the scale comes after it in float32: no rounding of scales.
            self.register_buffer("ones", torch.ones(codes.shape[0], dtype=torch.bfloat16))
            self.register_buffer("scale", scale.flatten().contiguous())

    def _pack_int4(self, codes: Tensor, scale: Tensor, zero: Tensor | None, weight: Tensor) -> None:
        rows, columns = codes.shape
        held = columns // scale.shape[1]
        self.group = _int4_group(held)
        assert self.group is not None
        # The operator computes (code - 8) * scale + shift.
        shift = torch.zeros_like(scale) if zero is None else (8 - zero) * scale
        pair = torch.stack((scale, shift), dim=-1).to(torch.bfloat16)
        grouped = (codes.view(rows, -1, held).float() - 8) * pair[..., :1].float() + pair[..., 1:].float()
        wanted = weight.detach().float()
        error = (grouped.view(rows, columns) - wanted).norm() / wanted.norm().clamp_min(torch.finfo(torch.float32).tiny)
        if not float(error) <= MOST_ERROR:
            raise ValueError(f"bfloat16 scales would move its weight by {float(error):.1e}")
        pair = pair.repeat_interleave(held // self.group, dim=1)
        self.register_buffer("packed", torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int(), 1))
        self.register_buffer("pair", pair.transpose(0, 1).contiguous())

    def takes(self, x: Tensor) -> bool:
        """Whether the operator is right for this input, and faster than the dense product."""
        rows = x.numel() // x.shape[-1] if x.numel() else 0
        same = x.dtype == self.dtype and x.device == self.packed.device
        return same and 0 < rows <= MOST_ROWS and not torch.is_autocast_enabled("cpu")

    def forward(self, x: Tensor) -> Tensor:
        """``x`` [..., in] -> [..., out]."""
        flat = x.reshape(-1, x.shape[-1]).to(torch.bfloat16).contiguous()
        if self.width == 4:
            y = torch.ops.aten._weight_int4pack_mm_for_cpu(flat, self.packed, self.group, self.pair).to(self.dtype)
        else:
            y = torch.ops.aten._weight_int8pack_mm(flat, self.packed, self.ones)
            y = (y.float() * self.scale).to(self.dtype)
        y = y if self.bias is None else y + self.bias
        return y.view(*x.shape[:-1], -1)
