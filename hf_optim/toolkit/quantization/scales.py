"""Scales as a checkpoint stores them: rounded to its dtype, without underflow or overflow.

A scale is a small number, the largest value over half the number of codes, so it leaves the range of a half-precision
dtype before the values do. float16 has multiples of 2⁻²⁴ below 6.1e-5: a scale that rounds to 0 would turn a whole row
into zeros, and one that rounds to the multiple below would clip it. At the other end, the largest code times the scale
can exceed 65504 although no value does.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor


def smallest_scale(dtype: torch.dtype) -> float:
    """Return the smallest scale that is stored in ``dtype``.

    This is the smallest positive number of float16, whose arithmetic keeps subnormal numbers; of the wider exponent
    ranges (bfloat16, float32, float64) it is the smallest normal number, since accelerators may flush those below to
    zero.
    """
    info = torch.finfo(dtype)
    return float(info.smallest_normal * info.eps if dtype == torch.float16 else info.smallest_normal)


def storable_scale(scale: Tensor, dtype: torch.dtype, largest_code: Tensor | float) -> Tensor:
    """Round scales to ``dtype``, so that each is positive and ``largest_code * scale`` is finite in ``dtype``.

    Scales that are normal numbers of ``dtype`` are rounded to nearest; smaller ones are rounded up, so that the largest
    value of a row stays within half a scale of a code.

    Args:
        scale: the exact scales, not negative, float32 or float64. 0 (the range of a row of zeros) becomes the ``eps``
            of ``dtype``, as in compressed-tensors: any scale gives the code of zero.
        dtype: in which the scales will be stored.
        largest_code: the largest magnitude of ``code - zero_point``; broadcasts over ``scale``.

    Returns:
        The shape and dtype of ``scale``; every number is exact in ``dtype``.
    """
    info = torch.finfo(dtype)
    stored = scale.to(dtype).to(scale.dtype)
    if info.bits < torch.finfo(scale.dtype).bits:
        step = info.smallest_normal * info.eps  # between the subnormal numbers of the dtype; a power of two
        stored = torch.where(scale < info.smallest_normal, (scale / step).ceil() * step, stored)
    stored = stored.clamp(min=smallest_scale(dtype))
    stored = torch.where(scale == 0, info.eps, stored)
    if isinstance(largest_code, Tensor):
        return torch.minimum(stored, _largest_scale(largest_code.to(stored.device), dtype).to(stored.dtype))
    # Scales may be computed in fewer bits than they are stored in.
    return stored.clamp(max=min(_largest_number(dtype, largest_code), torch.finfo(stored.dtype).max))


def _largest_scale(codes: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the largest numbers of a dtype whose products with ``codes`` do not exceed its largest one, float64."""
    info = torch.finfo(dtype)
    # Rounded down to the mantissa of the dtype: the limit is far from its subnormal numbers.
    mantissa, exponent = torch.frexp(info.max / codes.double())
    return torch.ldexp((mantissa * 2 / info.eps).floor() * (info.eps / 2), exponent)


@cache
def _largest_number(dtype: torch.dtype, code: float) -> float:
    """Return ``_largest_scale`` of one code as a number: a scale that is learned is rounded in every step."""
    return float(_largest_scale(torch.tensor(code, dtype=torch.float64), dtype))
