"""Points of plots that compare models, and the rule for which plots are worth drawing."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from ..reported import ReportedMetric, is_number

OTHER, SEVERAL = "other", "several families"
# In the order of their marks and colours, which are the same in all plots.
FAMILIES = (
    "quantization", "pruning", "sparsity", "distillation", "moe", "attention", "adaptive", "runtime", SEVERAL, OTHER,
)  # fmt: skip
ORIGINAL = "original"
# Of numbers that an axis can show.
LARGEST = 1e15


@dataclass(frozen=True)
class Point:
    """One model in a plot.

    Attributes:
        bytes: of its weights on disk.
        quality: value of the quality metric.
        label: what made it, in a few words.
        family: of the techniques that made it; empty for an original.
        number: of its card in the index; None for an original.
    """

    bytes: float
    quality: float
    label: str
    family: str = ""
    number: int | None = None


def is_drawable(value: Any, signed: bool = False) -> bool:
    """Return True for a number that an axis can show; positive, unless it is ``signed``."""
    return is_number(value) and abs(value) < LARGEST and (signed or value > 0)


def layers_differ(values: Iterable[float]) -> bool:
    """Return True if a plot of a number per layer shows more than one: if two differ in three significant digits."""
    return len({f"{value:.3g}" for value in values}) > 1


def bytes_differ(points: Iterable[Point]) -> bool:
    """Return True if two models differ in their bytes: otherwise a table says all that a plot of two would."""
    return len({f"{point.bytes:.3g}" for point in points}) > 1


def models_differ(points: Iterable[Point], quality: ReportedMetric) -> bool:
    """Return True if two models differ in the bytes or the quality that a plot of them shows."""
    return len({(f"{point.bytes:.3g}", quality.format(point.quality)) for point in points}) > 1


def pareto_front(points: Sequence[Point], lower_is_better: bool = True) -> list[Point]:
    """Return the points that no other point beats in both bytes and quality, sorted by bytes."""
    best: list[Point] = []
    for point in sorted(points, key=lambda p: (p.bytes, p.quality if lower_is_better else -p.quality)):
        better = not best or (point.quality < best[-1].quality if lower_is_better else point.quality > best[-1].quality)
        if better:
            best.append(point)
    return best


def style_of(family: str) -> int:
    """Return the place of a family in ``FAMILIES``; the last for one that is not there."""
    return FAMILIES.index(family) if family in FAMILIES else len(FAMILIES) - 1
