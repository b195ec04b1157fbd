"""Render the comparison with other tools as a page and a plot, from the results of ``beside_peers.py``."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter
from peer_cells import BITS, DRAWS, GROUP, GROUPS, METHODS, OURS, PEERS, SUBJECTS, Cell, Results, all_cells
from peer_verdicts import (
    HEADLINE,
    LOWER_IS_BETTER,
    MODEL,
    RULE,
    above_dense,
    bars,
    failure,
    goal,
    judge_all,
    qualities,
    summary,
)

METRICS = {
    "babyllama-1m": "perplexity on TinyStories",
    "stories260k": "perplexity on TinyStories",
    "MiniLM, STS-B": "Spearman on STS-B test",
    "SST-2 classifier": "accuracy on SST-2 dev",
}
COLOURS = ("#4C72B0", "#64B5CD", "#55A868", "#C44E52", "#8172B3", "#937860", "#DD8452")
MARKERS = "os^*DXP"

HEAD = f"""# Beside llm-compressor and AutoRound

Written by `examples/quantization/beside_peers.py`, which computes every cell. The same linear layers of the blocks,
the same bits, groups and calibration data for all; every method returns its dequantized weights, which are checked to
be codes of that many bits and measured here, in float32. No zero points at 4 and 3 bits, zero points at 2. Calibration:
256 windows of 256 tokens of TinyStories for the language models, 512 sentences of the training split for the encoders,
whose weights were rounded to float16 first, in {DRAWS} draws. Settings were chosen on babyllama-1m and on the dev split
of STS-B; the rest is quoted as it comes.

Figures are means over the draws; after them, half the distance from the smallest to the largest; in brackets the number
of draws, where it is not {DRAWS}. The best of a column is bold. Seconds are of processor time on one thread, memory is
what the method held beyond the model and the data; both are medians over the widths and draws of the table, whose cells
were computed on machines of different speed: only the goal on time compares cells of one machine.

- ours: `gptq` with ranges by squared error; `awq, rtn`; `signround` as in its paper; `best`, the recipes `w4a16-best`,
  `w3a16-best` and `w2a16-best`, one for each width, as they are shipped but for the groups.
- llm-compressor: GPTQ and AWQ with ranges by squared error (`mse`) and the order of columns that it has by default.
- AutoRound: 200 steps of 8 sequences for each block, its default, in float32. It keeps layers in 16 bits if 32 does not
  divide their sides, for its kernels; here it is made to quantize them.
- Where 32 does not divide a layer's width (172 in stories260k), its largest divisor below is every method's group.
- On the encoders the other tools are used below their presets: llm-compressor is told the blocks, and its AWQ scales
  the one pair of layers there that can be scaled exactly; AutoRound gets padded sentences with their mask.

![Quality by method](beside_peers.png)
"""


def page(results: Mapping[str, Any]) -> str:
    """Return the page: the sentences on who is ahead, and a table for each model and grouping."""
    cells, dense = results["cells"], results["dense"]
    lines = [HEAD, "## Who is ahead", "", RULE, ""]
    for group in GROUPS:
        lines += [f"- {summary(judge_all(cells, group, m), group, m)}" for m in (HEADLINE, *OURS[:-1])]
    lines += ["", goal(judge_all(cells, GROUP, HEADLINE))]
    if higher := above_dense(cells, dense, METHODS):
        lines += [
            "",
            "Better than the model itself, in brackets, by more than the spread of the draws, which says something of "
            f"the test and not of the method: {'; '.join(higher)}. A method that stays closer to the model cannot "
            "win there. One sentence of SST-2's 872 is 0.0011.",
        ]
    lines += ["", f"Its goals on {MODEL} with groups of {GROUP}:", "", *bars(cells)]
    for subject in SUBJECTS:
        lines += ["", f"## {subject}: {METRICS[subject]}", ""]
        if subject in dense:
            better = "lower" if subject in LOWER_IS_BETTER else "higher"
            lines += [f"Dense {dense[subject]['quality']:.4f}; {better} is better.", ""]
        for group in GROUPS:
            name = f"groups of {group}" if group else "one scale per channel"
            run = _is_run(cells, subject, group)
            lines += [*(_table(cells, subject, group) if run else [f"With {name}: not run."]), ""]
        lines.pop()
    lines += [*_recipes(cells), *_failures(cells)]
    found = sorted({f"{name} {text}" for cell in cells.values() for name, text in cell.get("versions", {}).items()})
    devices = sorted({cell["device"] for cell in cells.values() if "device" in cell})
    lines += ["", f"Computed on: {', '.join(devices) or 'nothing yet'}; {', '.join(found)}.", ""]
    return "\n".join(lines)


def _is_run(cells: Mapping[str, Any], subject: str, group: int | None) -> bool:
    """Return True if there is a result for a model and a grouping."""
    return any(qualities(cells, subject, bits, group, method) for bits in BITS for method in METHODS)


def _has_a_line(cells: Mapping[str, Any], subject: str, group: int | None) -> bool:
    """Return True if there are methods to compare, and one has results at two widths of a model and a grouping."""
    widths = [sum(bool(qualities(cells, subject, bits, group, method)) for bits in BITS) for method in METHODS]
    return max(widths) > 1 and sum(map(bool, widths)) > 1


def _table(cells: Mapping[str, Any], subject: str, group: int | None) -> list[str]:
    """Return the table of one model: a row for each method, a column for each width."""
    name = f"groups of {group}" if group else "one scale per channel"
    widths = " | ".join(f"{bits} bits" for bits in BITS)
    lines = [f"| {name} | {widths} | seconds | MB |", "|---" * (len(BITS) + 3) + "|"]
    best = {bits: _best(cells, subject, bits, group) for bits in BITS}
    for method in METHODS:
        shown = []
        for bits in BITS:
            values = list(qualities(cells, subject, bits, group, method).values())
            text = _figure(values) or ("not possible" if failure(cells, subject, bits, group, method) else "")
            shown.append(f"**{text}**" if values and _rounded(values) == best[bits] else text)
        seconds, peak = (_median(cells, subject, group, method, key) for key in ("processor_seconds", "peak_bytes"))
        costs = f"{'' if seconds is None else f'{seconds:.0f}'} | {'' if peak is None else f'{peak / 1e6:.0f}'}"
        owner = "ours: " if method in OURS else ""
        lines.append(f"| {owner}{method} | {' | '.join(shown)} | {costs} |")
    return lines


def _rounded(values: list[float]) -> float:
    return round(sum(values) / len(values), 4)


def _best(cells: Mapping[str, Any], subject: str, bits: int, group: int | None) -> float | None:
    """Return the best mean of a column; None if it has no two to compare."""
    found = [list(qualities(cells, subject, bits, group, method).values()) for method in METHODS]
    means = [_rounded(values) for values in found if values]
    return (min if subject in LOWER_IS_BETTER else max)(means) if len(means) > 1 else None


def _figure(values: list[float]) -> str:
    if not values:
        return ""
    half = (max(values) - min(values)) / 2
    spread = f" ± {half:.4f}" if len(values) > 1 else ""
    return f"{_rounded(values):.4f}{spread}" + ("" if len(values) == DRAWS else f" ({len(values)})")


def _median(cells: Mapping[str, Any], subject: str, group: int | None, method: str, key: str) -> float | None:
    found = [
        result[key]
        for bits in BITS
        for draw in range(DRAWS)
        if "quality" in (result := cells.get(Cell(subject, bits, group, method, draw).key, {}))
    ]
    return statistics.median(found) if found else None


def _recipes(cells: Mapping[str, Any]) -> list[str]:
    """Return the section on the steps of our best recipes, as they ran."""
    found: dict[str, list[str]] = {}
    for cell in all_cells(methods=[HEADLINE]):
        if steps := cells.get(cell.key, {}).get("steps"):
            text = f"{cell.bits} bits, {f'groups of {cell.group}' if cell.group else 'per channel'}: " + ", then ".join(
                f"`{step['technique']}` with {', '.join(f'{k} {v}' for k, v in step.items() if k != 'technique')}"
                for step in steps
            )
            subjects = found.setdefault(text, [])
            subjects += [cell.subject] * (cell.subject not in subjects)
    if not found:
        return []
    lines = ["", f"## The steps of `{HEADLINE}`", "", "200 steps of 8 sequences where no other number is given.", ""]
    lines += [f"- {text} ({'; '.join(subjects)})." for text, subjects in found.items()]
    if any(step.get("batch_tokens") for cell in cells.values() for step in cell.get("steps", ())):
        lines += ["", "`batch_tokens` adds sequences to a step where 8 have fewer: none to windows of 256 tokens."]
    if any(step.get("tune_norms") for cell in cells.values() for step in cell.get("steps", ())):
        lines += ["", "They also learn the gains of the norms, which AutoRound offers as an option, off by default."]
    return lines


def _failures(cells: Mapping[str, Any]) -> list[str]:
    """Return the section on cells without a figure, with the reasons."""
    found: dict[str, dict[str, list[str]]] = {}
    for method in METHODS:
        for subject in SUBJECTS:
            for group in GROUPS:
                for bits in BITS:
                    if reason := failure(cells, subject, bits, group, method):
                        where = f"{subject}, {f'groups of {group}' if group else 'per channel'}"
                        found.setdefault(f"{method}: {reason}", {}).setdefault(where, []).append(str(bits))
    if not found:
        return []
    lines = ["", "## Not possible", ""]
    for why, places in found.items():
        named = "; ".join(f"{where}: {', '.join(widths)} bits" for where, widths in places.items())
        lines.append(f"- {why} ({named})")
    return lines


def draw(results: Mapping[str, Any], path: Path) -> None:
    """Draw a panel for each model and grouping with a line: quality by bits, a line for each method, whiskers."""
    shown = [(s, group) for group in GROUPS for s in SUBJECTS if _has_a_line(results["cells"], s, group)]
    columns = max(1, min(len(SUBJECTS), len(shown)))
    rows = max(1, -(-len(shown) // columns))
    figure = Figure(figsize=(max(7.5, 3.75 * columns), 0.5 + 3.5 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes, (subject, group) in zip(panels, shown, strict=False):
        _panel(axes, results, subject, group)
    for axes in panels[len(shown) :]:
        axes.remove()
    handles: dict[str, Any] = {}
    for axes in panels[: len(shown)]:
        handles |= {label: handle for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    order = [label for label in (*(f"ours: {m}" for m in OURS), *PEERS, "dense") if label in handles]
    figure.legend([handles[label] for label in order], order, loc="outside lower center", ncols=2 * columns, fontsize=9)
    figure.savefig(path, dpi=100)


def _panel(axes: Any, results: Mapping[str, Any], subject: str, group: int | None) -> None:
    cells, dense = results["cells"], results["dense"].get(subject)
    for number, method in enumerate(METHODS):
        found = [list(qualities(cells, subject, bits, group, method).values()) for bits in BITS]
        points = [(x, values) for x, values in enumerate(found) if values]
        if not points:
            continue
        means = [sum(values) / len(values) for _, values in points]
        low = [mean - min(values) for mean, (_, values) in zip(means, points, strict=True)]
        high = [max(values) - mean for mean, (_, values) in zip(means, points, strict=True)]
        axes.errorbar(
            [x + 0.06 * (number - 3) for x, _ in points],
            means,
            yerr=[[max(0.0, each) for each in low], [max(0.0, each) for each in high]],
            marker=MARKERS[number],
            markersize=8 if method == HEADLINE else 5,
            linewidth=0.8,
            linestyle="-" if method in OURS else ":",
            capsize=2,
            color=COLOURS[number],
            label=f"ours: {method}" if method in OURS else method,
        )
    if dense is not None:
        axes.axhline(dense["quality"], color="black", linewidth=0.8, linestyle="--", label="dense")
    axes.set_title(f"{subject}, {f'groups of {group}' if group else 'per channel'}", fontsize=10)
    axes.set_ylabel(METRICS[subject], fontsize=8)
    axes.set_xticks(range(len(BITS)), [f"{bits} bits" for bits in BITS])
    if subject in LOWER_IS_BETTER:
        axes.set_yscale("log")
        for ticks in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
            ticks(LogFormatter(minor_thresholds=(1.5, 0.6)))
    axes.grid(alpha=0.3)


def render(path: Path) -> None:
    """Write the page and the plot beside a file of results."""
    found = Results(path)
    results = {"dense": found.dense, "cells": found.cells}
    path.with_suffix(".md").write_text(page(results), encoding="utf-8")
    draw(results, path.with_suffix(".png"))
