"""The codes that a packed weight returns."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Codes:
    """The codes of a packed weight, bitwise identical to those it was built from.

    The same as ``hf_optim.compressed.weights.Codes``, which this package does not import.

    Attributes:
        codes: [out, in]: uint8 (numbers, or e2m1 patterns), float8, or the weight itself.
        scale: [out, groups], of e2m1 patterns float8; None for a weight that is not quantized.
        zero: uint8 [out, groups]; None for the symmetric grid.
        order: int64 [in], or None.
        input_scale, input_zero: [1], of static inputs, or None.
        global_scale: float32 [out, 1], by which scales are divided (NVFP4), or None.
    """

    codes: Tensor
    scale: Tensor | None
    zero: Tensor | None = None
    order: Tensor | None = None
    input_scale: Tensor | None = None
    input_zero: Tensor | None = None
    global_scale: Tensor | None = None
