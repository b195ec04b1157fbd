"""Render the pruning sweep as a page and a plot, from ``results.json``, and test the papers' claims on its numbers."""

from __future__ import annotations

import json
import statistics
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from methods import DENSE, METHODS, ROUNDS

from hf_optim.evaluation.cards.plots import COLOURS
from hf_optim.runs.record import versions

NAME = "results.json"
UNTRAINED = {method.name for method in METHODS if not method.trains}
LOWER_IS_BETTER = {"babyllama-1m": True, "MiniLM, SST-2": False}
METRICS = {"babyllama-1m": "perplexity", "MiniLM, SST-2": "accuracy"}

HEAD = f"""# The pruning family on two real models

Written by `examples/pruning/sweep.py`, which computes every number. babyllama-1m: perplexity on TinyStories (lower is
better), after further training with the language-model loss on 700 stories. MiniLM: the pretrained encoder with a new
head, pruned while it is fine-tuned on SST-2; accuracy on its dev split. All linear layers of the blocks are pruned,
each to the same sparsity (variational dropout and l0: to one sparsity over all layers). All methods that train get the
same number of optimizer steps, data, peak learning rate and batch size; methods in rounds divide the steps into a dense
phase and {ROUNDS} rounds. "random tickets" has the masks of weight rewinding, and random weights in the last round.
"smaller dense" is a dense model with as many weights in its blocks, pruned from the large one by `structured` and
trained for as many steps. Means over the seeds, and the standard deviation where there are several.

![Sparsity against quality](quality.png)
"""


class Claim(NamedTuple):
    """A claim of a paper: ``better`` beats ``worse``, or is at least as good if ``ties_count``."""

    text: str
    better: str
    worse: str
    ties_count: bool


CLAIMS = (
    Claim("Gale et al. (1902.09574): magnitude pruning is competitive", "gmp", "variational dropout", True),
    Claim("Gale et al. (1902.09574): magnitude pruning is competitive", "gmp", "l0", True),
    Claim("Renda et al. (2003.02389): lr rewinding matches or beats", "lr rewinding", "weight rewinding", True),
    Claim("Renda et al. (2003.02389): beats", "lr rewinding", "iterative, fine-tuned", False),
    Claim("Renda et al. (2003.02389): beats", "weight rewinding", "iterative, fine-tuned", False),
    Claim("Zhu & Gupta (1710.01878): large-sparse beats small-dense", "gmp", "smaller dense", False),
    Claim("Frankle & Carbin (1803.03635): tickets beat", "weight rewinding", "random tickets", False),
    Claim("Zhu & Gupta (1710.01878): gradual beats one shot", "gmp", "magnitude, one shot", False),
)


def read(folder: Path) -> dict[str, Any]:
    """Read ``results.json`` of a folder; without the file, return empty results."""
    path = folder / NAME
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"runs": {}}


def write(folder: Path, results: dict[str, Any]) -> None:
    """Write ``results.json`` with the current versions of the libraries."""
    results["versions"] = versions()
    results["runs"] = dict(sorted(results["runs"].items()))
    (folder / NAME).write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


class Cell(NamedTuple):
    """Mean and standard deviation over seeds, their number, and the mean of the sparsity that they reached."""

    mean: float
    deviation: float
    seeds: int
    sparsity: float


Table = dict[tuple[str, str, float], Cell]


def tabulate(runs: dict[str, Any]) -> Table:
    """Summarize the seeds of each (subject, method, sparsity)."""
    groups: dict[tuple[str, str, float], list[dict[str, Any]]] = {}
    for name, run in runs.items():
        subject, method, sparsity, _ = name.split(" | ")
        if "figure" in run:
            groups.setdefault((subject, method, float(sparsity)), []).append(run)
    return {
        key: Cell(
            statistics.mean(run["figure"] for run in seeds),
            statistics.stdev(run["figure"] for run in seeds) if len(seeds) > 1 else 0.0,
            len(seeds),
            statistics.mean(run["sparsity"] for run in seeds),
        )
        for key, seeds in groups.items()
    }


def render(folder: Path) -> None:
    """Write README.md and the plot."""
    results = read(folder)
    table = tabulate(results["runs"])
    lines = [HEAD]
    for subject, metric in METRICS.items():
        sparsities = sorted({s for name, _, s in table if name == subject and s > 0})
        if not sparsities:
            continue
        lines += [f"## {subject}: {metric}", "", *_method_rows(table, subject, sparsities), ""]
        lines += [*_claim_rows(table, subject, sparsities), ""]
    failed = sorted(f"- {name}: {run['failed']}" for name, run in results["runs"].items() if "failed" in run)
    lines += ["## Failed", "", *failed, ""] if failed else []
    lines += [_provenance(results, table), ""]
    (folder / "README.md").write_text("\n".join(lines), encoding="utf-8")
    _plot(folder / "quality.png", table)


def _provenance(results: dict[str, Any], table: Table) -> str:
    """Return the sentences on seeds, steps, devices, versions, and the notes."""
    runs = [run for run in results["runs"].values() if "figure" in run]
    trained = sorted({cell.seeds for (_, name, _), cell in table.items() if name not in UNTRAINED})
    seeds = " to ".join(str(n) for n in sorted({trained[0], trained[-1]})) if trained else "no"
    single = " Results of one seed have no deviation; the claims are tested on that seed." if trained[:1] == [1] else ""
    steps = ", ".join(str(n) for n in sorted({run["steps"] for run in runs if run["steps"]}))
    devices = Counter(run.get("device", "unknown") for run in runs)
    where = ", ".join(f"{name} ({count} runs)" for name, count in devices.most_common())
    versions_of = ", ".join(f"{name} {version}" for name, version in results.get("versions", {}).items())
    sentences = [f"Seeds per result: {seeds}; one for results without training, which are not random.{single}"]
    sentences += [*results.get("notes", []), f"{steps} steps per run. Computed on {where}; last with {versions_of}."]
    return " ".join(sentences)


def _method_rows(table: Table, subject: str, sparsities: list[float]) -> list[str]:
    lines = [
        "| method | " + " | ".join(f"{100 * s:g} %" for s in sparsities) + " |",
        "|---" * (1 + len(sparsities)) + "|",
    ]
    dense = table.get((subject, DENSE.name, 0.0))
    if dense:
        lines.append(f"| dense, trained equally long | {_format_cell(dense)} |" + " |" * (len(sparsities) - 1))
    for method in METHODS:
        cells = [table.get((subject, method.name, s)) for s in sparsities]
        if any(cells):
            texts = [_format_cell(cell, s) for cell, s in zip(cells, sparsities, strict=True)]
            lines.append(f"| {method.name} | " + " | ".join(texts) + " |")
    return lines


def _format_cell(cell: Cell | None, target: float | None = None) -> str:
    """Return the mean and deviation of a cell, and the sparsity if it missed the target."""
    if cell is None:
        return ""
    deviation = f" ± {cell.deviation:.3f}" if cell.seeds > 1 else ""
    missed = "" if target is None or abs(cell.sparsity - target) < 0.01 else f" (at {100 * cell.sparsity:.1f} %)"
    return f"{cell.mean:.3f}{deviation}{missed}"


def _claim_rows(table: Table, subject: str, sparsities: list[float]) -> list[str]:
    lines = ["| claim | against | holds at | contradicted at | undecided at |", "|---|---|---|---|---|"]
    for claim in CLAIMS:
        verdicts: dict[str, list[str]] = {"holds": [], "contradicted": [], "undecided": []}
        for s in sparsities:
            pair = table.get((subject, claim.better, s)), table.get((subject, claim.worse, s))
            if None not in pair:
                verdicts[_verdict(*pair, LOWER_IS_BETTER[subject], claim.ties_count)].append(f"{100 * s:g} %")  # type: ignore[arg-type]
        lines.append(
            f"| {claim.text} ({claim.better}) | {claim.worse} | "
            + " | ".join(", ".join(v) for v in verdicts.values())
            + " |"
        )
    lines += [
        "",
        "Undecided: the means differ by at most the sum of the two standard deviations; a claim of a tie then holds.",
    ]
    return lines


def _verdict(better: Cell, worse: Cell, lower: bool, ties_count: bool) -> str:
    gain = (worse.mean - better.mean) * (1 if lower else -1)
    if abs(gain) <= better.deviation + worse.deviation:
        return "holds" if ties_count else "undecided"
    return "holds" if gain > 0 else "contradicted"


def _plot(path: Path, table: Table) -> None:
    """Draw a panel per model: quality against sparsity, a line per method, error bars of one standard deviation."""
    figure = Figure(figsize=(13, 6), layout="constrained")
    FigureCanvasAgg(figure)
    styles = ["-", "--", ":"]
    for number, (subject, metric) in enumerate(METRICS.items()):
        axes = figure.add_subplot(1, 2, number + 1)
        for index, method in enumerate(METHODS):
            points = sorted((s, c) for (name, m, s), c in table.items() if name == subject and m == method.name)
            if points and method.trains:
                axes.errorbar(
                    [100 * s for s, _ in points],
                    [c.mean for _, c in points],
                    [c.deviation for _, c in points],
                    label=method.name,
                    color=COLOURS[index % len(COLOURS)],
                    linestyle=styles[index // len(COLOURS)],
                    marker="os^Dv<>pPX*h"[index],
                    markersize=5,
                    linewidth=1.2,
                    capsize=2,
                )
        if dense := table.get((subject, DENSE.name, 0.0)):
            axes.axhline(dense.mean, color="black", linewidth=0.8, linestyle="--", label="dense, trained equally long")
        if LOWER_IS_BETTER[subject]:
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter("{x:g}")
        better = "lower" if LOWER_IS_BETTER[subject] else "higher"
        axes.set_title(f"{subject}: {metric} ({better} is better)", loc="left")
        axes.set_xlabel("weights removed from the blocks (%)")
        axes.grid(color="#dddddd", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=6, fontsize=9)
    figure.savefig(path, dpi=110)
