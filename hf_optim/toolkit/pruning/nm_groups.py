"""N:M patterns: the layers that can have one, and the record of the patterns of parameters."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from typing import Any

from ..topology.experts import ExpertLinear
from ..topology.linear_layers import features

Pattern = tuple[int, int]


def select_divisible(layers: Mapping[str, Any], group: int) -> tuple[dict[str, Any], dict[str, list[str]]]:
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


def record_patterns(patterns: MutableMapping[str, Pattern], layers: Mapping[str, Any], keep: int, group: int) -> None:
    """Record the pattern ``keep:group`` of linear layers and matrices of experts, by parameter.

    A stack of experts has a pattern if all its matrices are among ``layers``.
    """
    left: dict[str, int] = {}
    for name, layer in layers.items():
        if not isinstance(layer, ExpertLinear):
            record_pattern(patterns, f"{name}.weight", keep, group)
            continue
        stack = layer.parameter_name
        left[stack] = left.get(stack, len(layer.experts.get_parameter(layer.parameter))) - 1
        if not left[stack]:
            record_pattern(patterns, stack, keep, group)
