"""Groups that do not fit a layer: the size they get, what a weight then takes, and what to do about it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from .grids import fit_group_size

NAMED = 3
LARGE = 8.0
"""Bits of a weight from which a layer of few bits is no smaller than one of 8 bits."""


def stored_bits(
    bits: float, width: int, group_size: int, scale_bits: int, *, packed: bool = True, zero_point: bool = False
) -> float:
    """Return the bits of a weight in a checkpoint, with its share of the scale and of the zero point of its group.

    Args:
        bits: of a code; a fraction is a mean over layers.
        width: number of inputs of the layer.
        group_size: weights that share a scale.
        scale_bits: of a scale: 32 for a model in float32, 16 in bfloat16 and float16.
        packed: the codes of a row lie without gaps in 32-bit words; otherwise a code takes a byte.
        zero_point: each group has a zero point of a byte.
    """
    code = 32 * math.ceil(width * bits / 32) / width if packed else 8.0
    return code + (scale_bits + 8 * zero_point) / group_size


def adjusted_groups(widths: Mapping[str, int], group_size: int) -> dict[tuple[int, int], list[str]]:
    """Return the layers whose width the group size does not divide: ``(width, size of a group) -> names``."""
    found: dict[tuple[int, int], list[str]] = {}
    for name, width in widths.items():
        size = fit_group_size(width, group_size)
        if size != min(group_size, width):
            found.setdefault((width, size), []).append(name)
    return dict(sorted(found.items()))


def adjusted_message(names: Iterable[str], width: int, size: int, group_size: int, bits: int, stored: float) -> str:
    """Say which groups a group size gives, and how many bits a weight takes; with a remedy if these are many.

    Args:
        names: the layers.
        width: number of their inputs.
        size, group_size: inputs of a group, and those that were asked for.
        bits: of a code.
        stored: bits of a weight (``stored_bits``).
    """
    names = list(names)
    few = ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")
    text = (
        f"group_size {group_size} does not divide the {width} inputs of {few}: groups of {size}: {stored:.1f} bits a "
        "weight with scales"
    )
    if bits > 4 or stored <= LARGE:
        return text
    fitting = [each for each in range(16, width) if width % each == 0]
    near = sorted(sorted(fitting, key=lambda each: abs(each - group_size))[:2])
    sizes = f"group_size {' or '.join(map(str, near))} ({'they divide' if len(near) > 1 else 'it divides'} {width}), "
    return (
        f"{text}, more than int8 takes: use {sizes if near else ''}one scale per output channel (group_size: null), or "
        "skip these layers"
    )
