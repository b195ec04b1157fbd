"""The roofline plot: the rate of each contender over operations per byte, under the ceilings of the device."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from ...trust.text import plot_label
from ..cards.plots import COLOURS, DPI, GREY, MARKERS, SIZE, save
from .results import OpResult, Results

# Above 1 by less is noise of the measured ceilings.
TOLERANCE = 1.02


def is_above_floor(share: float | None) -> bool:
    """Return True if a time is shorter than its floor; ``share`` is the floor over the time."""
    return share is not None and share > TOLERANCE


def rows_above_floor(results: Results) -> bool:
    """Return True if any time is shorter than its floor: the page then explains how that can be."""
    shares = [row.fraction_of_floor for row in results.rows]
    shares += [row.floor_ms / row.ms for row in results.decode if row.floor_ms and row.ms]
    return any(map(is_above_floor, shares))


def roofline(results: Results, path: Path) -> Path:
    """Draw one panel per operator with a point per row, both axes logarithmic; return the file.

    x: operations over the bytes that the format must read. y: operations per second. The lines are the copy bandwidth
    and the measured matrix rates.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    timed = [row for row in results.rows if row.graph_us and row.bytes]
    ops = list(dict.fromkeys(row.op for row in timed))
    columns = min(2, len(ops))
    lines = -(-len(ops) // columns)
    figure = Figure(figsize=(SIZE[0] * columns * 0.8, SIZE[1] * lines), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False).flat
    for axes, op in zip(panels, ops, strict=False):
        _panel(axes, [row for row in timed if row.op == op], results)
        axes.set_title(op, fontsize=10, loc="left")
    for axes in list(panels)[len(ops) :]:
        axes.remove()
    figure.supxlabel("operations per byte of the weight", fontsize=9)
    figure.supylabel("TFLOP/s", fontsize=9)
    title = plot_label(results.device, 120)
    if rows_above_floor(results):
        title += "\nabove the lines: the weight was read from caches, or the product is faster than the measured one"
    figure.suptitle(title, fontsize=10)
    return save(figure, path)


def _panel(axes: Any, rows: list[OpResult], results: Results) -> None:
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.grid(True, color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=8)
    names = sorted({(row.role != "ours", row.role == "peer", row.contender) for row in rows})
    for i, (_, _, name) in enumerate(names):
        own = [row for row in rows if row.contender == name]
        peer = own[0].role != "ours"
        axes.scatter(
            [row.flops / row.bytes for row in own],
            [row.flops / (row.graph_us or 1) / 1e6 for row in own],
            s=16 if peer else 34,
            alpha=0.6 if peer else 1.0,
            color=GREY if own[0].role == "dense" else COLOURS[i % len(COLOURS)],
            marker=MARKERS[i % len(MARKERS)],
            label=name,
            zorder=2 if peer else 3,
        )
    _ceilings(axes, rows, results.ceilings)
    # Beside the axes: among the points, a marker of the legend would look like one of them.
    axes.legend(fontsize=7, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))


def _ceilings(axes: Any, rows: list[OpResult], ceilings: dict[str, float]) -> None:
    xs = [row.flops / row.bytes for row in rows]
    low, high = min(xs) / 2, max(xs) * 2
    for name, style in (("bfloat16", "--"), ("int8", ":")):
        rate, copy = ceilings[name], ceilings["copy"]
        knee = min(max(rate / copy, low), high)
        ends = [low, knee, high]
        heights = [min(x * copy, rate) / 1e6 for x in ends]
        axes.plot(ends, heights, color="#000000", linewidth=0.9, linestyle=style, zorder=1)
        if math.isclose(*(ceilings[kind] for kind in ("bfloat16", "int8")), rel_tol=0.1):
            # Two labels at one height would cover each other.
            if name == "int8":
                axes.annotate("bfloat16, int8", (high, heights[-1]), fontsize=7, ha="right", va="bottom")
            continue
        axes.annotate(name, (high, heights[-1]), fontsize=7, ha="right", va="bottom" if name == "bfloat16" else "top")
