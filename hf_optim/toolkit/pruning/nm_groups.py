"""N:M patterns: the layers that can have one, and the record of the patterns of parameters."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping

from torch import nn

from ..topology.linear_layers import features

Pattern = tuple[int, int]


def select_divisible(layers: Mapping[str, nn.Module], group: int) -> tuple[dict[str, nn.Module], dict[str, list[str]]]:
    """Return the layers whose input width is a multiple of ``group``, and the names of the others by reason."""
    odd = {name: features(layer)[1] for name, layer in layers.items() if features(layer)[1] % group}
    skipped: dict[str, list[str]] = {}
    for name, width in odd.items():
        skipped.setdefault(f"input width {width} is not a multiple of {group}", []).append(name)
    return {name: layer for name, layer in layers.items() if name not in odd}, skipped


def record_pattern(patterns: MutableMapping[str, Pattern], parameter: str, keep: int, group: int) -> None:
    """Record the pattern ``keep:group`` of a parameter, unless a sparser one is already recorded."""
    known = patterns.get(parameter, (keep, group))
    patterns[parameter] = min((keep, group), known, key=lambda pattern: pattern[0] / pattern[1])
