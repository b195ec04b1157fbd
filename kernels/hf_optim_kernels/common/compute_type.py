"""The type in which a kernel multiplies, as a constant that kernels compare with."""

from __future__ import annotations

from typing import Any

import torch
import triton.language as tl

from .launch import is_interpreted

BF16, FP16, FP32 = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


def compute_constants(dtype: torch.dtype, kernel: Any) -> dict[str, Any]:
    """Return the constants ``MATH``, one of the above, and ``ASM``: whether the kernel uses inline assembly.

    The interpreter has neither assembly nor bfloat16 arithmetic: it computes the same sums in float32.
    """
    plain = is_interpreted(kernel)
    math = {torch.float16: FP16, torch.bfloat16: FP32 if plain else BF16}.get(dtype, FP32).value
    return {"MATH": math, "ASM": math != FP32.value and not plain}
