r"""4-bit floats (e2m1) and their scales: NVFP4 and MXFP4.

An e2m1 number has a sign, two bits of exponent and one of mantissa: ``0, 0.5, 1, 1.5, 2, 3, 4, 6`` and their negatives
(OCP Microscaling Formats 1.0, section 5.3.3). As a code of a grid it is doubled, so that codes are whole numbers like
those of integer grids, and the scale of a grid is half of the stored one.

- ``nvfp4``: 16 columns share an e4m3 scale, and all scales of a tensor a float32 number ``g``; a weight is
  ``number * scale / g``, with ``g = 448 * 6 / max|w|``, which maps the largest scale to the largest e4m3 number.
- ``mxfp4``: 32 columns share a power of two (e8m0). That of a group is the largest which the largest magnitude of the
  group is at least 3.5 times of: it then rounds to 4 or 6.

Numbers are rounded to nearest, half to even: to the neighbour whose mantissa bit is 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...errors import NumericalError

# Columns that share a scale, by format.
GROUPS = {"nvfp4": 16, "mxfp4": 32}
E4M3, E8M0 = torch.float8_e4m3fn, torch.float8_e8m0fnu
# Doubled, in the order of their patterns; the patterns from 8 on are the negatives.
MAGNITUDES = (0, 1, 2, 3, 4, 6, 8, 12)
LARGEST = 12.0
# The smallest positive e4m3 number, the largest, and the scale of a group of zeros (any gives code 0).
_SMALLEST_E4M3, _LARGEST_E4M3, _EMPTY_E4M3 = 2.0**-9, 448.0, 2.0**-3
_SMALLEST_EXPONENT, _LARGEST_EXPONENT = -127, 127
# The magnitude, in units of the power of two, from which a group takes the next one.
_LEAST_MXFP4 = 3.5


def step_of(codes: Tensor) -> Tensor:
    """Return the distance between the neighbours of doubled numbers in [-12, 12]: 1, 2 or 4; same shape and dtype."""
    size = codes.abs()
    return 1.0 + (size >= 4).to(codes.dtype) + 2.0 * (size >= 8).to(codes.dtype)


def round_doubled(codes: Tensor) -> Tensor:
    """Round doubled numbers in [-12, 12] to the nearest doubled e2m1 number, half to even; same shape and dtype."""
    step = step_of(codes)
    return (codes / step).round() * step


def global_scale(weight: Tensor) -> float:
    """Return ``g`` of a tensor in NVFP4, a float32 number; 1.0 for a tensor of zeros. Raises ``NumericalError``."""
    largest = weight.abs().max().float() if weight.numel() else torch.zeros(())
    if not bool(torch.isfinite(largest)):
        raise NumericalError("4-bit floats have no NaN and no infinity, and the weight has: look for the step before")
    found = float(_LARGEST_E4M3 * LARGEST / 2 / largest)
    # Of a tensor whose largest weight is below 1e-35 the quotient overflows; stock tools take 1, too.
    return found if found < torch.finfo(torch.float32).max else 1.0


def nvfp4_scale(scale: Tensor, g: float) -> Tensor:
    """Return the nearest scales of NVFP4 to half scales: the float32 values ``e4m3 / g``, halved; same shape, dtype."""
    stored = _e4m3(scale, g)
    return (stored.float() / torch.tensor(g, dtype=torch.float32, device=scale.device) / 2).to(scale.dtype)


def _e4m3(scale: Tensor, g: float) -> Tensor:
    wanted = scale.float() * 2 * g
    wanted = torch.where(scale == 0, _EMPTY_E4M3, wanted.clamp(_SMALLEST_E4M3, _LARGEST_E4M3))
    return wanted.to(E4M3)


def mxfp4_scale(scale: Tensor) -> Tensor:
    """Return the scales of MXFP4 for half scales that map the largest magnitude to 12; same shape and dtype."""
    exponent = torch.frexp(scale * (LARGEST / _LEAST_MXFP4)).exponent - 1
    exponent = torch.where(scale == 0, 0, exponent).clamp(_SMALLEST_EXPONENT + 1, _LARGEST_EXPONENT - 3)
    return torch.ldexp(torch.full_like(scale, 0.5), exponent)


def stored_scale(scale: Tensor, format: str, g: float | None) -> Tensor:
    """Return the scales of a grid as a checkpoint stores them: float8_e4m3fn, or float8_e8m0fnu. Exact.

    Args:
        scale: half scales, of ``nvfp4_scale`` or ``mxfp4_scale``.
        format: ``"nvfp4"`` or ``"mxfp4"``.
        g: the number of the tensor, for ``"nvfp4"``.
    """
    if format == "nvfp4":
        assert g is not None
        return _e4m3(scale, g)
    return (torch.frexp(scale).exponent + 127).to(torch.uint8).view(E8M0)


def to_patterns(codes: Tensor) -> Tensor:
    """Return the 4-bit patterns (uint8) of doubled numbers of any dtype; -0.0 has pattern 8."""
    size = codes.abs().to(torch.uint8)
    # 0, 1, 2, 3, 4, 6, 8, 12 -> 0 ... 7
    index = torch.where(size < 4, size, torch.where(size < 8, 2 + size // 2, 4 + size // 4))
    return index | (torch.signbit(codes).to(torch.uint8) << 3)


def to_numbers(patterns: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the e2m1 numbers (not doubled) of 4-bit patterns in a floating dtype; pattern 8 is -0.0."""
    table = torch.tensor([*MAGNITUDES, *(-size for size in MAGNITUDES)], dtype=torch.float32) / 2
    table[8] = -0.0
    return table.to(patterns.device, dtype)[patterns.long()]
