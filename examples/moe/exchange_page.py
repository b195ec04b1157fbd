"""Render the measurements of ``exchange.py`` as a page and a plot, from ``exchange.json``."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from hf_optim.evaluation.cards.plots import COLOURS
from hf_optim.evaluation.reported import format_bytes

NAMES = {"flat": "all at once", "intra_first": "within nodes first", "inter_first": "between nodes first"}
MARKERS = {"flat": "o", "intra_first": "s", "inter_first": "^"}


def times_of(results: Mapping[str, Any], nodes: int, local: int) -> dict[str, dict[int, Mapping[str, Any]]]:
    """Return order -> bytes of a rank -> row."""
    found: dict[str, dict[int, Mapping[str, Any]]] = {}
    for row in results["measured"]:
        if (row["nodes"], row["local"]) == (nodes, local):
            found.setdefault(row["order"], {})[row["total"]] = row
    return found


def fastest_below(times: Mapping[str, Mapping[int, Mapping[str, Any]]]) -> str:
    """Return in words where the better hierarchical order beats one exchange by more than a tenth, and where not."""
    wins, losses = [], []
    for total, row in times["flat"].items():
        best = min(times[order][total]["seconds"] for order in times if order != "flat")
        if best < 0.9 * row["seconds"]:
            wins.append(total)
        elif best > 1.1 * row["seconds"]:
            losses.append(total)
    parts = [
        f"{word} at {len(found)} of {len(times['flat'])} sizes" + (f" ({span(found)})" if found else "")
        for word, found in (("faster", wins), ("slower", losses))
    ]
    return ", ".join(parts)


def span(totals: list[int]) -> str:
    """Return the range of a list of sizes."""
    low, high = min(totals), max(totals)
    return format_bytes(low) if low == high else f"{format_bytes(low)} to {format_bytes(high)}"


def crossing(value: float | None) -> str:
    """Return a crossing point in words; None: one exchange is always faster."""
    if value is None:
        return "never"
    return "always" if math.isinf(value) else f"below {format_bytes(int(value))}"


def rate(seconds: float) -> str:
    """Return the time of a byte as a rate."""
    return f"{1e-9 / seconds:.2f} GB/s" if seconds else "unlimited"


def rows_of(results: Mapping[str, Any]) -> list[str]:
    """Return the table of measured times."""
    lines = []
    for nodes, local in ((2, 2), (2, 4), (4, 2)):
        times = times_of(results, nodes, local)
        for total in (2**10, 2**14, 2**18, 2**20, 2**23):
            cells = [f"{times[order][total]['seconds'] * 1e3:.2f}" for order in NAMES]
            lines.append(f"| {nodes} x {local} | {format_bytes(total)} | " + " | ".join(cells) + " |")
    return lines


def simulated_rows(results: Mapping[str, Any]) -> list[str]:
    """Return the table of simulated clusters."""
    lines = []
    for fitted, assumed in zip(results["simulated_fitted"], results["simulated_assumed"], strict=True):
        flat, two = (assumed["seconds"][order][str(2**20)] * 1e6 for order in ("flat", "intra_first"))
        lines.append(
            f"| {fitted['ranks']:,} | {fitted['messages_flat']:,} | {fitted['messages_hierarchical']} | "
            f"{crossing(fitted['crossing_total'])} | {crossing(assumed['crossing_total'])} | {flat:,.0f} | {two:,.0f} |"
        )
    return lines


def write(folder: Path) -> None:
    """Write ``README.md`` and ``exchange.png`` into the folder of ``exchange.json``."""
    results = json.loads((folder / "exchange.json").read_text(encoding="utf-8"))
    draw(results, folder / "exchange.png")
    fit = results["fit"]
    words = {
        f"{nodes} x {local}": fastest_below(times_of(results, nodes, local))
        for nodes, local in ((2, 2), (2, 4), (4, 2))
    }
    text = f"""# Exchanges between ranks: one, or two over nodes

Every rank sends an equal part to every rank: at once, or within nodes and between nodes (either first). Times are those
of the slowest rank, the best of {results["rounds"]} rounds of several exchanges, with gloo on one machine of
{results["cores"]} cores, where nodes are only numbered as such: messages "between nodes" cost what all others cost, and
more ranks than cores wait for each other. Made by [examples/moe/exchange.py](../../../examples/moe/exchange.py).

| nodes x ranks | bytes of a rank | {" | ".join(f"{name} (ms)" for name in NAMES.values())} |
| --- | ---: | {" | ".join("---:" for _ in NAMES)} |
{chr(10).join(rows_of(results))}

The better order of the two, against one exchange (differences under a tenth count as equal):

{chr(10).join(f"- {grid}: {word}." for grid, word in words.items())}

## The model, and larger clusters

The model of `hf_optim.toolkit.distributed.ExchangeCost` has constants for a collective, a message, a byte on a link and
a byte that is moved in memory. Fitted to all {len(results["measured"])} times, divided by the ranks that share a core,
without a difference between links: a
collective {fit["collective"] * 1e6:.0f} us, a message {fit["message_inside"] * 1e6:.1f} us, a link
{rate(fit["byte_inside"])}, memory {rate(fit["byte_moved"])}; its error is
{results["fit_error_median"]:.0%} in the median.

A rank sends (L - 1) + (N - 1) messages in place of N L - 1. When are two exchanges faster, by the bytes that a rank
sends in all, with {results["ranks_per_node"]} ranks per node? *Assumed*: constants of a GPU cluster, which were not
measured (`ASSUMED` in the script); the times are for 1 MiB of a rank, with the assumed constants.

| ranks | messages at once | in two steps | two steps are faster (fitted) | (assumed) | at once (us) | two steps (us) |
| ---: | ---: | ---: | ---: | ---: | ---: | ---: |
{chr(10).join(simulated_rows(results))}

![Measured times with their fit, and the crossing points against the ranks](exchange.png)

The published gains (HetuMoE, Tutel) are of clusters with several network cards; nothing here was measured between
machines.
"""
    (folder / "README.md").write_text(text, encoding="utf-8")


def draw(results: Mapping[str, Any], path: Path) -> None:
    """Draw the times of two grids with their fit, and the bytes up to which two exchanges are faster."""
    figure = Figure(figsize=(10.5, 3.8), layout="constrained", dpi=120)
    left, middle, right = figure.subplots(1, 3)
    for axes, (nodes, local) in zip((left, middle), ((2, 2), (2, 4)), strict=True):
        times = times_of(results, nodes, local)
        for number, (order, rows) in enumerate(times.items()):
            seconds = [row["seconds"] * 1e3 for row in rows.values()]
            axes.plot(
                list(rows), seconds, MARKERS[order], color=COLOURS[number], markersize=4, label=NAMES[order], alpha=0.8
            )
            fitted = [row["fitted"] * 1e3 for row in rows.values()]
            axes.plot(list(rows), fitted, "--" if order == "inter_first" else "-", color=COLOURS[number], linewidth=1)
        axes.set_title(f"gloo, {nodes} nodes of {local} ranks, one machine", fontsize=9)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xlabel("bytes that a rank sends")
        axes.set_ylabel("time of an exchange (ms)")
        ticks = [2**10, 2**14, 2**18, 2**22]
        axes.set_xticks(ticks, [format_bytes(tick) for tick in ticks], fontsize=8)
        axes.legend(frameon=False, fontsize=7, title="points: measured; lines: fitted", title_fontsize=7)
    for number, (key, label) in enumerate(
        (("simulated_fitted", "fitted to gloo"), ("simulated_assumed", "assumed GPUs"))
    ):
        points = [(row["ranks"], row["crossing_total"]) for row in results[key] if row["crossing_total"] is not None]
        points = [(ranks, value) for ranks, value in points if math.isfinite(value)]
        if points:
            right.plot(
                *zip(*points, strict=True), marker="os"[number], color=COLOURS[number], markersize=4, label=label
            )
    right.set_title("below the line two exchanges are faster", fontsize=9)
    right.set_xscale("log", base=2)
    right.set_yscale("log", base=2)
    right.set_xlabel("ranks (8 per node)")
    right.set_ylabel("bytes that a rank sends")
    ranks = [row["ranks"] for row in results["simulated_fitted"]]
    right.set_xticks(ranks, [str(value) for value in ranks], fontsize=7)
    low, high = (int(math.log2(bound)) for bound in right.get_ylim())
    ticks = [2**power for power in range(low, high + 1, max(1, (high - low) // 5))]
    right.set_yticks(ticks, [format_bytes(tick) for tick in ticks], fontsize=8)
    right.legend(frameon=False, fontsize=8)
    for axes in (left, middle, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.minorticks_off()
    FigureCanvasAgg(figure).print_png(str(path))
