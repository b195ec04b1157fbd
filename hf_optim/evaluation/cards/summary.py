"""The figures of a card that an index shows, and the points of the plots that compare cards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ...errors import CheckpointError
from ...runs.record import FILE_NAME, Record
from ...trust.text import one_line
from ..reported import QUALITY_METRICS, ReportedMetric, is_number, recipe_label, relative_change, short_id
from .front_matter import technique_spec
from .points import ORIGINAL, OTHER, SEVERAL, Point, is_drawable, models_differ
from .sections import evaluation_label


@dataclass(frozen=True)
class CardSummary:
    """What the index of a folder shows of one card.

    Attributes:
        number: its place in the index, from 1.
        folder: the name of its folder.
        record: its record.
    """

    number: int
    folder: str
    record: Record

    @cached_property
    def base(self) -> str:
        """The base model, without its owner."""
        return one_line(short_id(str(self.record.base_model.get("id") or "-")), 200)

    @cached_property
    def recipe(self) -> str:
        """The steps of the recipe in a few words."""
        return one_line(recipe_label(self.record.recipe), 300)

    @cached_property
    def families(self) -> tuple[str, ...]:
        """The families of its techniques, in the order of the steps; ``other`` for one that is not installed here."""
        specs = [technique_spec(step) for step in self.record.recipe.get("steps", ())]
        return tuple(dict.fromkeys(spec.family if spec else OTHER for spec in specs)) or (OTHER,)

    @property
    def family(self) -> str:
        """Its family; one name for all that have several."""
        return self.families[0] if len(self.families) == 1 else SEVERAL

    @cached_property
    def series(self) -> str:
        """The base model and the evaluation data: cards of one series can be compared."""
        return one_line(evaluation_label(self.record), 200)

    @property
    def metric(self) -> ReportedMetric | None:
        """The quality metric that its result has, or None."""
        return next((m for m in QUALITY_METRICS if self.figure("after", m.key) is not None), None)

    def figure(self, side: str, key: str) -> float | None:
        """Return a number that was measured on a side, such as ``before`` or ``after``; None if there is none."""
        values = self.record.measured.get(side)
        value = values.get(key) if isinstance(values, Mapping) else None
        return value if is_number(value) else None

    @property
    def quality(self) -> tuple[float | None, float | None]:
        """The quality metric of the original and of the result."""
        key = self.metric.key if self.metric else ""
        return self.figure("before", key), self.figure("after", key)

    @property
    def change(self) -> float | None:
        """The change of the quality metric in percent, or None."""
        before, after = self.quality
        if self.metric is None or before is None or after is None:
            return None
        return 100 * (after / before - 1) if relative_change(self.metric, before, after) else None

    @property
    def size(self) -> tuple[float | None, float | None]:
        """The bytes of the weights on disk, of the original and of the result."""
        return self.figure("before", "bytes_on_disk"), self.figure("after", "bytes_on_disk")

    @property
    def ratio(self) -> float | None:
        """How many times smaller the weights on disk are, or None."""
        before, after = self.size
        return before / after if before and after and before > 0 and after > 0 else None

    @property
    def bits(self) -> float | None:
        """The bits on disk for each parameter of the original, scales and what was left alone included, or None."""
        parameters: Any = self.record.base_model.get("parameters")
        after = self.size[1]
        return 8 * after / parameters if is_number(parameters) and parameters > 0 and after is not None else None


def read_cards(folder: Path) -> list[CardSummary]:
    """Return the cards of a folder, in the order of their names.

    Raises ``CheckpointError`` if no sub-folder has a record, or if one cannot be read.
    """
    places = sorted(folder.glob(f"*/{FILE_NAME}"))
    if not places:
        raise CheckpointError(f"no folder in {folder} has a {FILE_NAME}")
    return [CardSummary(i, path.parent.name, Record.read(path.parent)) for i, path in enumerate(places, 1)]


def comparable_points(cards: Sequence[CardSummary], quality: ReportedMetric) -> dict[str, list[Point]]:
    """Return the points of each series in which models differ: results, and originals, which cards share."""
    series: dict[str, dict[Any, Point]] = {}
    for card in cards:
        for side in ("before", "after"):
            size, value = card.figure(side, "bytes_on_disk"), card.figure(side, quality.key)
            if size is None or value is None or not (is_drawable(size) and is_drawable(value, signed=True)):
                continue
            made = (card.recipe, card.family, card.number) if side == "after" else (ORIGINAL, "", None)
            point = Point(size, value, *made)
            key = (point.number, point.bytes, round(value, 4))
            series.setdefault(card.series, {}).setdefault(key, point)
    listed = {name: list(points.values()) for name, points in series.items()}
    return {name: points for name, points in listed.items() if models_differ(points, quality)}
