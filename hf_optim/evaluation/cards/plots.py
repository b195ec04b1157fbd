"""Plots of a model card: PNG files of 1000 x 600 pixels, readable in colour, in grey and by colour-blind readers."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import CheckpointError
from ...trust.text import plot_label
from ..reported import ReportedMetric, format_bytes
from .label_places import edge_towards, needs_line, place_labels
from .points import ORIGINAL, Point, is_drawable, pareto_front, style_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas

DPI = 150
SIZE = (1000 / DPI, 600 / DPI)
# The palette of Okabe and Ito, without its yellow, which is too faint on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
GREY = "#555555"
MAX_BARS = 18
# By family, in the order of ``points.FAMILIES``.
FAMILY_COLOURS = (
    "#0072B2", "#D55E00", "#007A5A", "#A6518A", "#8A6D00", "#5B4BB5", "#B0174A", "#8C4A2F", "#000000", "#555555",
)  # fmt: skip
FAMILY_MARKERS = ("o", "s", "^", "D", "v", "P", "p", "h", "X", "*")
LEGEND = {"fontsize": 8, "frameon": False, "handletextpad": 0.1, "columnspacing": 1.2}
# Of what one plot shows.
MAX_LAYERS, MAX_PANELS, MAX_POINTS, MAX_PLOTS = 20_000, 12, 120, 40


def require_own_folder(folder: Path) -> None:
    """Raise ``CheckpointError`` if the folder of the plots is a link, or not a folder."""
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise CheckpointError(f"{folder} is not a folder of its own: remove it")


def _canvas() -> tuple[Canvas, Axes]:
    figure, panels = _panels(1)
    return figure, panels[0]


def _panels(count: int, height: float = 1.0) -> tuple[Canvas, list[Axes]]:
    """Create a canvas with panels one below the other; ``height`` is that of two, in the usual height of a plot."""
    # Not pyplot: it keeps figures in a global list and may need a display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Canvas

    figure = Canvas(figsize=(SIZE[0], SIZE[1] * max(1, height * count / 2)), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    panels = list(figure.subplots(count, 1, squeeze=False)[:, 0])
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(True, color="#dddddd", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.tick_params(labelsize=8)
    return figure, panels


def save(figure: Canvas, path: Path) -> Path:
    """Draw the figure and write it as a PNG file; return the file."""
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)  # a link would be followed
    figure.draw_without_rendering()
    drawn = figure.canvas
    drawn.draw()
    pixels = Image.frombuffer("RGBA", drawn.get_width_height(), drawn.buffer_rgba())  # type: ignore[attr-defined]
    # A palette instead of true colour: a third of the bytes, and no visible difference.
    pixels.convert("RGB").quantize(128, dither=Image.Dither.NONE).save(path, optimize=True, dpi=(DPI, DPI))
    return path


def _axis_label(quality: ReportedMetric) -> str:
    return f"{quality.label} ({'lower' if quality.lower_is_better else 'higher'} is better)"


def plot_quality_against_bytes(
    before: Point, after: Point, quality: ReportedMetric, path: Path, title: str = ""
) -> Path:
    """Draw original and result as two points, with an arrow between them. x: bytes from zero; y: the quality."""
    figure, axes = _canvas()
    scale, unit = _byte_unit(max(before.bytes, after.bytes))
    points = [(p.bytes / scale, p.quality) for p in (before, after)]
    axes.annotate(
        "",
        xy=points[1],
        xytext=points[0],
        arrowprops={"arrowstyle": "-|>", "color": GREY, "linewidth": 1.2, "shrinkA": 8, "shrinkB": 8},
    )
    for (x, y), colour, marker in zip(points, COLOURS, MARKERS, strict=False):
        axes.scatter([x], [y], s=70, color=colour, marker=marker, zorder=3)
    axes.set_xlim(0, max(x for x, _ in points) * 1.18)
    axes.set_ylim(*_axis_limits([y for _, y in points]))
    axes.set_xlabel(f"weights on disk ({unit})", fontsize=9)
    axes.set_ylabel(_axis_label(quality), fontsize=9)
    axes.set_title(plot_label(title, 120), fontsize=10, loc="left")
    _plain_ticks(axes)
    texts = [f"{plot_label(p.label)}\n{format_bytes(p.bytes)}, {quality.format(p.quality)}" for p in (before, after)]
    figure.draw_without_rendering()
    _write_labels(figure, axes, points, texts, COLOURS[:2], [points])
    return save(figure, path)


def plot_pareto(
    series: Mapping[str, Sequence[Point]],
    quality: ReportedMetric,
    path: Path,
    title: str = "",
    legend: Mapping[str, str] | None = None,
) -> Path:
    """Draw bytes (log) against quality for many models, with one panel per series and its Pareto front as a line.

    Each series has its own panel because perplexities of models with different tokenizers cannot be compared. Points
    have the numbers of their cards; mark and colour are those of the family. ``legend`` renames families in the legend.
    """
    shown = dict(list(series.items())[:MAX_PANELS])
    figure, panels = _panels(len(shown), 1.5)
    families: dict[str, None] = {}
    for axes, (name, listed) in zip(panels, shown.items(), strict=True):
        points = listed[:MAX_POINTS]
        families.update(dict.fromkeys(p.family for p in points if p.family))
        _pareto_panel(axes, points, quality)
        axes.set_title(plot_label(name), fontsize=9, loc="left")
    panels[-1].set_xlabel("weights on disk (logarithmic)", fontsize=9)
    figure.supylabel(_axis_label(quality), fontsize=9)
    figure.suptitle(plot_label(title), fontsize=10)
    marks = [_mark(name) for name in ("", *sorted(families, key=style_of))]
    for mark in marks:
        mark.set_label((legend or {}).get(mark.get_label(), mark.get_label()))
    figure.legend(handles=marks, loc="outside lower center", ncols=6, **LEGEND)
    # The legend takes room: labels are placed in the panels as they are in the end.
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    for axes, listed in zip(panels, shown.values(), strict=True):
        points = listed[:MAX_POINTS]
        front = [(p.bytes, p.quality) for p in pareto_front(points, quality.lower_is_better)]
        texts = [str(p.number) if p.number else plot_label(p.label) for p in points]
        colours = [_colour(p.family) for p in points]
        _write_labels(figure, axes, [(p.bytes, p.quality) for p in points], texts, colours, [front])
    return save(figure, path)


def _colour(family: str) -> str:
    return FAMILY_COLOURS[style_of(family)] if family else GREY


def _mark(family: str) -> Any:
    from matplotlib.lines import Line2D

    marker = FAMILY_MARKERS[style_of(family)] if family else "o"
    fill = _colour(family) if family else "white"
    return Line2D(
        [], [], linestyle="", marker=marker, color=_colour(family), markerfacecolor=fill, label=family or ORIGINAL
    )


def _pareto_panel(axes: Axes, points: Sequence[Point], quality: ReportedMetric) -> None:
    values = [p.quality for p in points]
    axes.set_xscale("log")
    front = pareto_front(points, quality.lower_is_better)
    axes.plot([p.bytes for p in front], [p.quality for p in front], color=GREY, linewidth=1, alpha=0.6, zorder=2)
    for family in dict.fromkeys(p.family for p in points):
        own = [p for p in points if p.family == family]
        mark = _mark(family)
        mark.set_data([p.bytes for p in own], [p.quality for p in own])
        mark.set(markersize=5.5, zorder=3)
        axes.add_line(mark)
    sizes = [p.bytes for p in points]
    room = max((max(sizes) / min(sizes)) ** 0.1, 1.2)
    axes.set_xlim(min(sizes) / room, max(sizes) * room)
    _byte_ticks(axes)
    if min(values) > 0 and max(values) / min(values) > 3:
        axes.set_yscale("log")
        room = (max(values) / min(values)) ** 0.2
        axes.set_ylim(min(values) / room, max(values) * room)
        _value_ticks(axes)
    else:
        axes.set_ylim(*_axis_limits(values))
        _plain_ticks(axes, "y")


def plot_layers(values: Mapping[str, float], metric: str, path: Path, title: str = "") -> Path:
    """Draw a number per layer: as bars for few layers, else over the blocks with one line per kind of layer."""
    ordered = {name: values[name] for name in sorted(values, key=_natural_order)}
    return _bars(ordered, metric, path, title) if len(ordered) <= MAX_BARS else _lines(ordered, metric, path, title)


def _natural_order(name: str) -> list[tuple[int, str]]:
    """Sort key that puts block 2 before block 10."""
    return [(int(part), "") if part.isdecimal() and len(part) < 19 else (-1, part) for part in re.split(r"(\d+)", name)]


def _bars(values: Mapping[str, float], metric: str, path: Path, title: str) -> Path:
    figure, axes = _canvas()
    names = [plot_label(name, 60) for name in short_names(list(values))]
    size = 8 if len(names) <= 12 else 6.5
    bars = axes.barh(range(len(names)), list(values.values()), color=COLOURS[0], height=0.7)
    axes.set_yticks(range(len(names)), names, fontsize=size)
    axes.invert_yaxis()
    axes.bar_label(bars, [f"{value:.3g}" for value in values.values()], padding=3, fontsize=size)
    axes.margins(x=0.12)
    axes.grid(False, axis="y")
    axes.set_xlabel(plot_label(metric), fontsize=9)
    axes.set_title(plot_label(title, 120), fontsize=10, loc="left")
    return save(figure, path)


def _lines(values: Mapping[str, float], metric: str, path: Path, title: str) -> Path:
    from matplotlib.ticker import MaxNLocator

    figure, axes = _canvas()
    series: dict[str, dict[int, float]] = {}
    for position, (name, value) in enumerate(values.items()):
        number = re.search(r"\.([0-9]{1,9})\.", name + ".")
        block = int(number.group(1)) if number else position
        kind = name[number.end() :] if number and name[number.end() :] else re.sub(r"\.?\d+", "", name)
        series.setdefault(kind or "layer", {})[block] = value
    for i, (kind, points) in enumerate(series.items()):
        blocks = sorted(points)
        axes.plot(
            blocks,
            [points[b] for b in blocks],
            color=COLOURS[i % len(COLOURS)],
            linestyle=("-", "--", ":")[i // len(COLOURS) % 3],
            marker=MARKERS[i % len(MARKERS)],
            markersize=4.5,
            linewidth=1.1,
            label=plot_label(kind, 40).lstrip("_") or "layer",
        )
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("block", fontsize=9)
    axes.set_ylabel(plot_label(metric), fontsize=9)
    axes.set_title(plot_label(title, 120), fontsize=10, loc="left")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper", fontsize=7.5, frameon=False)
    return save(figure, path)


def short_names(names: Sequence[str]) -> list[str]:
    """Return the names without the dotted prefix that all share."""
    parts = [name.split(".") for name in names]
    shared = 0
    while all(len(p) > shared + 1 for p in parts) and len({p[shared] for p in parts}) == 1:
        shared += 1
    return [".".join(p[shared:]) for p in parts]


def find_layer_values(steps: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, str, dict[str, float], str]]:
    """Return the numbers per layer that steps report: ``(index, technique, {layer: number}, metric)``.

    A step reports ``layers={name: number}``, and the name of the metric as ``layer_metric``. Any other mapping of at
    least two layer names to numbers is a metric named by its key.
    """
    found = []
    for index, reported in sorted(steps.items()):
        for key, value in reported.items():
            if not isinstance(value, Mapping) or not 2 <= len(value) <= MAX_LAYERS or not all("." in n for n in value):
                continue
            if all(is_drawable(v, signed=True) for v in value.values()):
                metric = reported.get("layer_metric") if key == "layers" else key
                metric = metric or ("sparsity" if "sparsity" in reported else "value")
                found.append((index, str(reported.get("technique", "")), dict(value), str(metric).replace("_", " ")))
    return found[:MAX_PLOTS]


def _byte_unit(largest: float) -> tuple[float, str]:
    return next(
        ((size, unit) for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)) if largest >= size), (1.0, "bytes")
    )


def _axis_limits(values: Sequence[float]) -> tuple[float, float]:
    """Return y limits with room for labels, at least 5 % of the value, so that small differences look small."""
    low, high = min(values), max(values)
    room = max(high - low, 0.05 * abs(high), 1e-6)
    return low - 0.45 * room, high + 0.45 * room


def _plain_ticks(axes: Axes, axis: Any = "both") -> None:
    axes.ticklabel_format(axis=axis, useOffset=False, style="plain")


def _byte_ticks(axes: Axes) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = axes.get_xlim()
    subs = (1.0,) if high / low > 1000 else (1.0, 2.0, 5.0) if high / low > 8 else (1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 7.0)
    axes.xaxis.set_major_locator(LogLocator(subs=subs))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: format_bytes(x)))
    axes.xaxis.set_minor_formatter(NullFormatter())


def _value_ticks(axes: Axes) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = axes.get_ylim()
    subs = (1.0, 2.0, 5.0) if high / low > 30 else (1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 7.0)
    axes.yaxis.set_major_locator(LogLocator(subs=subs))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _write_labels(
    figure: Canvas,
    axes: Axes,
    places: Sequence[tuple[float, float]],
    texts: Sequence[str],
    colours: Sequence[str],
    lines: Sequence[Sequence[tuple[float, float]]] = (),
) -> None:
    """Write each text near its point, where it covers no other text, point or line; thin lines join distant ones.

    The figure has its final layout: it was drawn before.
    """
    renderer = figure.canvas.get_renderer()  # type: ignore[attr-defined]
    frame = axes.get_window_extent(renderer)
    dots = [(float(x), float(y)) for x, y in axes.transData.transform(places)]
    tracks = [[(float(x), float(y)) for x, y in axes.transData.transform(line)] for line in lines if len(line) > 1]
    notes = [
        axes.annotate(
            text, place, xytext=(0, 0), textcoords="offset pixels", ha="center", va="center", fontsize=8, color=colour,
            annotation_clip=False, zorder=4,
        )
        for place, text, colour in zip(places, texts, colours, strict=True)
    ]  # fmt: skip
    boxes = [note.get_window_extent(renderer) for note in notes]
    radius = DPI / 72 * 5
    sizes = [(float(box.width) + 4, float(box.height) + 2) for box in boxes]
    centres = place_labels(dots, sizes, (frame.x0, frame.y0, frame.x1, frame.y1), radius, tracks)
    for note, dot, size, centre, colour in zip(notes, dots, sizes, centres, colours, strict=True):
        if centre is None:
            note.remove()
            continue
        note.set_position((centre[0] - dot[0], centre[1] - dot[1]))
        if needs_line(dot, centre, size, radius, dots):
            end = edge_towards(dot, centre, size)
            ends = axes.transData.inverted().transform([dot, end])
            axes.plot(ends[:, 0], ends[:, 1], color=colour, linewidth=0.5, zorder=2, scalex=False, scaley=False)
