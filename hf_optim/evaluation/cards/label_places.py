"""Places for the labels of a plot: near their points, over no other label, point or line."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence

# A cell of the grid that remembers what is taken, as a part of the height of a label.
CELLS_PER_LABEL = 4
DISTANCES = (0.1, 0.5, 0.9, 1.6, 2.5, 3.6, 4.8)
DIRECTIONS = tuple((math.cos(i * math.pi / 8), math.sin(i * math.pi / 8)) for i in (0, 4, 12, 8, 2, 14, 6, 10))
MORE_DIRECTIONS = tuple((math.cos(i * math.pi / 8), math.sin(i * math.pi / 8)) for i in range(1, 16, 2))
Place = tuple[float, float]
Cell = tuple[int, int]


def place_labels(
    points: Sequence[Place],
    sizes: Sequence[Place],
    frame: tuple[float, float, float, float],
    radius: float,
    lines: Iterable[Sequence[Place]] = (),
) -> list[Place | None]:
    """Return the centre of each label, and None for one that has no room without covering another label.

    All lengths are in one unit, such as pixels.

    Args:
        points: what the labels belong to.
        sizes: width and height of each label.
        frame: left, low, right and high edge; labels stay inside.
        radius: of the marks at the points.
        lines: polylines that labels should not cover.
    """
    if not points:
        return []
    cell = max(min(height for _, height in sizes) / CELLS_PER_LABEL, 1e-6)
    marks: dict[Cell, int] = {}
    for x, y in points:
        for at in _cells(x, y, 2 * radius, 2 * radius, cell):
            marks[at] = marks.get(at, 0) + 1
    for line in lines:
        for at in set(_line_cells(line, cell)):
            marks[at] = marks.get(at, 0) + 1
    labels: set[Cell] = set()
    found: list[Place | None] = []
    for (x, y), (width, height) in zip(points, sizes, strict=True):
        best: tuple[float, Place, list[Cell]] | None = None
        for cost, centre in _candidates(x, y, width, height, radius):
            if best is not None and best[0] <= cost:
                break  # what follows is farther away
            if not _inside(centre, width, height, frame):
                continue
            covered = list(_cells(*centre, width, height, cell))
            if not labels.isdisjoint(covered):
                continue
            cost += sum(marks.get(at, 0) for at in covered)
            if best is None or cost < best[0]:
                best = (cost, centre, covered)
        if best is not None:
            labels.update(best[2])
        found.append(best[1] if best is not None else None)
    return found


def needs_line(point: Place, centre: Place, size: Place, radius: float, others: Iterable[Place]) -> bool:
    """Return True if a line should lead from a point to its label: if it is distant, or as near to another point."""
    own = _gap(point, centre, size)
    return own > radius + size[1] or any(
        other != point and _gap(other, centre, size) < own + size[1] / 4 for other in others
    )


def _gap(point: Place, centre: Place, size: Place) -> float:
    """Return the distance from a point to the edge of a label."""
    return math.hypot(*(max(0.0, abs(p - c) - s / 2) for p, c, s in zip(point, centre, size, strict=True)))


def edge_towards(point: Place, centre: Place, size: Place) -> Place:
    """Return where the line from a point to the centre of a label meets its edge."""
    dx, dy = centre[0] - point[0], centre[1] - point[1]
    inside = min((half / abs(d) for half, d in ((size[0] / 2, dx), (size[1] / 2, dy)) if d), default=0.0)
    return centre[0] - dx * min(inside, 1.0), centre[1] - dy * min(inside, 1.0)


def _candidates(x: float, y: float, width: float, height: float, radius: float) -> Iterator[tuple[float, Place]]:
    """Yield costs and centres, the nearest first."""
    for distance in DISTANCES:
        away = radius + distance * height
        for dx, dy in DIRECTIONS + (MORE_DIRECTIONS if distance > 1 else ()):
            yield distance, (x + dx * (away + width / 2), y + dy * (away + height / 2))


def _inside(centre: Place, width: float, height: float, frame: tuple[float, float, float, float]) -> bool:
    left, low, right, high = frame
    return (
        left <= centre[0] - width / 2
        and centre[0] + width / 2 <= right
        and low <= centre[1] - height / 2
        and centre[1] + height / 2 <= high
    )


def _cells(x: float, y: float, width: float, height: float, cell: float) -> Iterator[Cell]:
    for column in range(math.floor((x - width / 2) / cell), math.floor((x + width / 2) / cell) + 1):
        for row in range(math.floor((y - height / 2) / cell), math.floor((y + height / 2) / cell) + 1):
            yield column, row


def _line_cells(line: Sequence[Place], cell: float) -> Iterator[Cell]:
    for (x, y), (to_x, to_y) in itertools.pairwise(line):
        steps = max(1, math.ceil(2 * math.hypot(to_x - x, to_y - y) / cell))
        for i in range(steps + 1):
            yield math.floor((x + (to_x - x) * i / steps) / cell), math.floor((y + (to_y - y) * i / steps) / cell)
