"""The plots of the page of results: quality against bytes, as SVG within the page."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ...trust.html import Html, element
from ..reported import REPORTED_METRICS, ReportedMetric, format_bytes
from .label_places import edge_towards, needs_line, place_labels
from .points import ORIGINAL, Point, pareto_front, style_of
from .summary import CardSummary

METRICS = {metric.key: metric for metric in REPORTED_METRICS}
WIDTH, HEIGHT = 720, 400
LEFT, RIGHT, TOP, BOTTOM = 66, 16, 14, 52
RADIUS = 6.5
LABEL_HEIGHT, LETTER_WIDTH = 15, 7.8
# One path for each of ``points.FAMILIES``, around 0, 0: no two families share a shape.
SHAPES = (
    "M-5 0a5 5 0 1 0 10 0a5 5 0 1 0-10 0Z",
    "M-4.5-4.5h9v9h-9Z",
    "M0-5.6L5.4 4.2H-5.4Z",
    "M0-6L6 0L0 6L-6 0Z",
    "M0 5.6L5.4-4.2H-5.4Z",
    "M-2-5.6h4v3.6h3.6v4h-3.6v3.6h-4v-3.6h-3.6v-4h3.6Z",
    "M0-5.8L5.5-1.8L3.4 4.7H-3.4L-5.5-1.8Z",
    "M-2.8-5H2.8L5.6 0L2.8 5H-2.8L-5.6 0Z",
    "M-5.2-2.8L-2.8-5.2L0-2.4L2.8-5.2L5.2-2.8L2.4 0L5.2 2.8L2.8 5.2L0 2.4L-2.8 5.2L-5.2 2.8L-2.4 0Z",
    "M-5.6-2h11.2v4h-11.2Z",
)


@dataclass(frozen=True)
class Axis:
    """A linear or logarithmic axis from ``low`` to ``high``, drawn from ``start`` to ``end``."""

    low: float
    high: float
    start: float
    end: float
    log: bool

    def place(self, value: float) -> float:
        """Return where a value is drawn."""
        low, high, at = (math.log10(v) if self.log else v for v in (self.low, self.high, value))
        return self.start + (self.end - self.start) * (at - low) / (high - low)

    def ticks(self) -> list[float]:
        """Return 2 to 7 round numbers on the axis."""
        return _log_ticks(self.low, self.high) if self.log else _linear_ticks(self.low, self.high)


def mark(family: str) -> Html:
    """Return the mark of a family for a legend or the cell of a table."""
    return element("svg", _shape(family), class_="mark", viewBox="-7 -7 14 14", aria_hidden="true")


def plot(
    series: str, points: Sequence[Point], quality: ReportedMetric, cards: Mapping[int, tuple[CardSummary, str]]
) -> Html:
    """Return the figure of one series.

    Args:
        series: the base model and the data.
        points: its models; at least two of them differ.
        quality: the metric of the vertical axis.
        cards: by number, each card and the id of its place in the page.
    """
    x = _byte_axis([p.bytes for p in points])
    y = _quality_axis([p.quality for p in points])
    better = "lower" if quality.lower_is_better else "higher"
    front = [(x.place(p.bytes), y.place(p.quality)) for p in pareto_front(points, quality.lower_is_better)]
    places = [(x.place(p.bytes), y.place(p.quality)) for p in points]
    # The originals first: a result at the same place lies on top.
    order = sorted(range(len(points)), key=lambda i: points[i].number or 0)
    svg = element(
        "svg",
        _grid(x, y, f"{quality.label} ({better} is better)"),
        element("path", d=_path(front), class_="front") if len(front) > 1 else None,
        *_labels(points, places, front),
        *(_point(points[i], places[i], quality, cards) for i in order),
        viewBox=f"0 0 {WIDTH} {HEIGHT}",
        role="group",
        aria_label=f"{quality.label} against the bytes of the weights: {series}",
    )
    families = sorted({p.family for p in points if p.family}, key=style_of)
    legend = [element("li", mark(name), name or ORIGINAL) for name in ("", *families)]
    caption = f"{quality.label} against the bytes of the weights on disk (logarithmic); {better} is better."
    caption = caption[:1].upper() + caption[1:] + " The line joins the models that no other one beats in both."
    return element(
        "figure",
        element("h3", series),
        element("div", svg, class_="canvas"),
        element("ul", *legend, class_="legend"),
        element("figcaption", caption),
        class_="plot",
    )


def _shape(family: str) -> Html:
    if not family:
        return element("path", d=SHAPES[0], class_="original")
    return element("path", d=SHAPES[style_of(family)], class_=f"family-{style_of(family)}")


def _point(
    point: Point, place: tuple[float, float], quality: ReportedMetric, cards: Mapping[int, tuple[CardSummary, str]]
) -> Html:
    at = {"transform": f"translate({place[0]:.1f} {place[1]:.1f})"}
    figures = f"{quality.label} {quality.format(point.quality)}, {format_bytes(point.bytes)}"
    if point.number is None:
        title = element("title", f"{ORIGINAL} | {figures}")
        return element("g", title, _shape(""), class_="point", role="img", data_family="", **at)
    card, place_id = cards[point.number]
    lines = [f"{card.number}. {card.folder}", card.recipe, figures]
    if card.change is not None and card.ratio is not None:
        lines.append(f"{card.change:+.1f} % {quality.label}, {card.ratio:.2f} times smaller")
    agreement, kl = card.figure("after", "top1_agreement"), card.figure("after", "kl")
    if agreement is not None and kl is not None:
        lines.append(f"top-1 agreement {METRICS['top1_agreement'].format(agreement)}, KL {METRICS['kl'].format(kl)}")
    title = element("title", " | ".join(lines))
    return element("a", title, _shape(point.family), class_="point", href=f"#{place_id}", data_card=card.number, **at)


def _labels(
    points: Sequence[Point], places: Sequence[tuple[float, float]], front: Sequence[tuple[float, float]]
) -> list[Html]:
    """Return the numbers of the cards next to their points; there may be no room for some of them."""
    texts = [str(p.number) if p.number else ORIGINAL for p in points]
    sizes = [(LETTER_WIDTH * len(text) + 5.0, float(LABEL_HEIGHT)) for text in texts]
    centres = place_labels(places, sizes, (LEFT, TOP, WIDTH - RIGHT, HEIGHT - BOTTOM), RADIUS, [front])
    made = []
    for point, text, size, place, centre in zip(points, texts, sizes, places, centres, strict=True):
        if centre is None:
            continue
        if needs_line(place, centre, size, RADIUS, places):
            made.append(
                element(
                    "path", d=_path([place, edge_towards(place, centre, size)]), class_="lead", data_label=point.number
                )
            )
        where = {"x": f"{centre[0]:.1f}", "y": f"{centre[1]:.1f}"}
        made.append(element("text", text, class_="number", data_label=point.number, **where))
    return [element("g", *made, class_="labels", aria_hidden="true")]


def _grid(x: Axis, y: Axis, label: str) -> Html:
    parts = []
    for value in x.ticks():
        at = f"{x.place(value):.1f}"
        parts += [
            element("path", d=f"M{at} {TOP}V{HEIGHT - BOTTOM}", class_="grid"),
            element("text", format_bytes(value), x=at, y=HEIGHT - BOTTOM + 8, class_="tick x"),
        ]
    for value in y.ticks():
        at = f"{y.place(value):.1f}"
        parts += [
            element("path", d=f"M{LEFT} {at}H{WIDTH - RIGHT}", class_="grid"),
            element("text", f"{value:g}", x=LEFT - 8, y=at, class_="tick y"),
        ]
    parts.append(element("path", d=f"M{LEFT} {TOP}V{HEIGHT - BOTTOM}H{WIDTH - RIGHT}", class_="axis"))
    parts.append(element("text", "weights on disk", x=WIDTH - RIGHT, y=HEIGHT - 8, class_="name x"))
    turned = f"translate(14 {TOP}) rotate(-90)"
    parts.append(element("text", label, transform=turned, class_="name y"))
    return element("g", *parts, aria_hidden="true")


def _path(places: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in places)


def _byte_axis(values: Sequence[float]) -> Axis:
    low, high = min(values), max(values)
    room = max((high / low) ** 0.06, 1.15)
    return Axis(low / room, high * room, LEFT, WIDTH - RIGHT, log=True)


def _quality_axis(values: Sequence[float]) -> Axis:
    low, high = min(values), max(values)
    ends = (HEIGHT - BOTTOM, TOP)
    if low > 0 and high / low > 3:
        room = (high / low) ** 0.1
        return Axis(low / room, high * room, *ends, log=True)
    # At least 5 % of the value, so that small differences look small.
    span = max(high - low, 0.05 * abs(high), 1e-6)
    middle = (low + high) / 2
    return Axis(middle - 0.62 * span, middle + 0.62 * span, *ends, log=False)


def _linear_ticks(low: float, high: float) -> list[float]:
    rough = (high - low) / 6
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough)
    first = math.ceil(low / step)
    return [float(f"{i * step:.12g}") for i in range(first, math.floor(high / step) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for steps in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 5, 7), (1, 1.2, 1.4, 1.6, 1.8, 2, 2.5, 3, 4, 5, 6, 7, 8, 9)):
        found = [float(f"{s * 10.0**p:.12g}") for p in powers for s in steps if low <= s * 10.0**p <= high]
        if len(found) >= 4:
            break
    every = -(-len(found) // 8)
    return found[::every]
