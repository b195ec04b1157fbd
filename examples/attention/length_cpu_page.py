"""Render the figures of ``length_cpu.py`` as a page and a plot, from ``length_cpu.json``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from hf_optim.evaluation.cards.plots import COLOURS

TITLES = {"attention": "the attention alone", "layers": "a model of 4 layers", "training": "attention and gradients"}
SIDES = {False: "both sides", True: "causal"}


def write(folder: Path) -> None:
    """Write ``length_cpu.md`` and ``length_cpu.png`` beside ``length_cpu.json``."""
    results = json.loads((folder / "length_cpu.json").read_text(encoding="utf-8"))
    draw(results, folder / "length_cpu.png")
    tables = []
    shown = dict.fromkeys((row["kind"], row["threads"], row["causal"]) for row in results["rows"])
    for kind, threads, causal in shown:
        tables.append(f"## {TITLES[kind].capitalize()}, {SIDES[causal]}, {count(threads)}\n\n")
        tables.append(table(results, kind, threads, causal) + "\n")
    memory = [row for row in results["rows"] if "peak_mib" in row]
    lines = "\n".join(
        f"| {row['length']:,} | {row['name'].replace('sdpa', 'dense')} | {row['peak_mib']:,.0f} |" for row in memory
    )
    text = f"""# Time against length on a CPU

Milliseconds of processor time for one row, in float32; *dense* is PyTorch's scaled_dot_product_attention. 12 heads of
64 numbers; the causal model has 4 of keys and values. Made on a shared machine by
[examples/attention/length_cpu.py](../../examples/attention/length_cpu.py).

![Time against length](length_cpu.png)

{"".join(tables)}
## Peak memory of the model of 4 layers, both sides

In MiB above what the process held before its first forward, which also makes the lists of blocks: the
least of up to three runs, which differ by up to 70 MiB.

| tokens | attention | MiB |
| ---: | --- | ---: |
{lines}
"""
    (folder / "length_cpu.md").write_text(text, encoding="utf-8")


def key(row: Mapping[str, Any]) -> str:
    """Return the name of a figure."""
    return f"{row['kind']}, {SIDES[row['causal']]}, {row['threads']}, {row['name']}, {row['length']}"


def count(threads: int) -> str:
    """Return a number of threads in words."""
    return "1 thread" if threads == 1 else f"{threads} threads"


def table(results: Mapping[str, Any], kind: str, threads: int, causal: bool) -> str:
    """Return the times of one kind of call as a table."""
    rows = [r for r in results["rows"] if (r["kind"], r["threads"], r["causal"]) == (kind, threads, causal)]
    lengths = sorted({row["length"] for row in rows})
    head = " | ".join(f"{length:,}" for length in lengths)
    lines = [f"| | {head} |", f"| --- | {' | '.join(['---:'] * len(lengths))} |"]
    for name in dict.fromkeys(row["name"] for row in rows):
        times = {row["length"]: row["ms"] for row in rows if row["name"] == name}
        cells = " | ".join(f"{times[length]:,.1f}" if length in times else "" for length in lengths)
        lines.append(f"| {'dense' if name == 'sdpa' else name} | {cells} |")
    return "\n".join(lines) + "\n"


def draw(results: Mapping[str, Any], path: Path) -> None:
    """Draw the time of the attention alone against the length, for both sides and causal."""
    figure = Figure(figsize=(9.5, 4.2), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for axis, causal in zip(axes, (False, True), strict=True):
        rows = [r for r in results["rows"] if r["kind"] == "attention" and r["causal"] == causal and r["threads"] == 1]
        names = list(dict.fromkeys(row["name"] for row in rows))
        for number, name in enumerate(names):
            points = [(row["length"], row["ms"]) for row in rows if row["name"] == name]
            colour = "black" if name == "sdpa" else COLOURS[(number - 1) % len(COLOURS)]
            axis.plot(*zip(*points, strict=True), marker="o", ms=3, color=colour, label=name.replace("sdpa", "dense"))
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_title(f"attention, {SIDES[causal]}, 1 thread", fontsize=9)
        axis.set_xlabel("tokens")
        lengths = results["lengths"]
        axis.set_xticks(lengths, [f"{length // 1024}k" for length in lengths])
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("processor time (ms)")
    axes[1].legend(fontsize=7, frameon=False)
    FigureCanvasAgg(figure).print_png(str(path))
