"""Render the quantization table as a page and a plot, from ``results.json``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rows import Row

from hf_optim.runs.record import versions

NAME = "results.json"
SUBJECTS = ("babyllama-1m", "stories260k", "MiniLM, STS-B", "SST-2 classifier")
METRICS = ("perplexity", "perplexity", "Spearman, test", "accuracy, dev")
# Ten colours for the many lines of a panel: more than those of hf_optim's own plots.
COLOURS = (
    "#4C72B0", "#DD8452", "#55A868", "#C44E52", "#8172B3", "#937860", "#DA8BC3", "#8C8C8C", "#CCB974", "#64B5CD",
)  # fmt: skip

HEAD = """# The quantization family on real models

Written by `examples/quantization/table.py`, which computes every cell. Perplexity on TinyStories (lower is better) for
the two language models; Spearman correlation of cosine similarity on the test split of STS-B for all-MiniLM-L6-v2 (its
weights rounded to float16 first, except in the rows dense and gobo); accuracy on the dev split of SST-2 for the same
encoder, fine-tuned on SST-2 by `examples/quantization/train_sst2_classifier.py`. All linear layers of the blocks are
quantized; embeddings and output heads are not. `g32`: 32 inputs share a scale. gptq uses zero points and searched
scales, except per channel. Rows with qat train for 200 steps; the others use only calibration data, and rtn, zeroquant,
llm_int8 and gobo use no data.

![Quality against bits](quality.png)
"""

RELOAD = """
## Bytes and reload

Bytes of the weights on disk (embeddings and heads included) and seconds that the method takes. "Stock reload" compares
the outputs with those of stock transformers, which reloads the checkpoint in a process that cannot import hf_optim:
`equal`, or the largest difference. A REMOTE_CODE checkpoint must first be refused there.
"""


def read(folder: Path) -> dict[str, Any]:
    """Read ``results.json`` of a folder; without the file, return empty results."""
    path = folder / NAME
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"cells": {}}


def write(folder: Path, results: dict[str, Any], device: torch.device) -> None:
    """Write ``results.json`` with the device and the current versions of the libraries."""
    results["versions"] = versions()
    results["device"] = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    (folder / NAME).write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def render(folder: Path, rows: Sequence[Row]) -> None:
    """Write README.md and the plot."""
    results = read(folder)
    cells = results["cells"]
    columns = " | ".join(f"{subject}: {metric}" for subject, metric in zip(SUBJECTS, METRICS, strict=True))
    lines = [HEAD, f"| technique | bits | {columns} |", "|---" * (2 + len(SUBJECTS)) + "|"]
    for row in rows:
        metrics = " | ".join(_metric_text(cells, row, subject) for subject in SUBJECTS)
        lines.append(f"| {row.name} | {row.bits} | {metrics} |")
    lines += [RELOAD, f"| technique | bits | reload level | stock reload | {' | '.join(SUBJECTS)} |"]
    lines.append("|---" * (4 + len(SUBJECTS)) + "|")
    for row in rows:
        sizes = " | ".join(_size_text(cells, row, subject) for subject in SUBJECTS)
        lines.append(f"| {row.name} | {row.bits} | {_reload_text(cells, row)} | {sizes} |")
    refused = sorted(
        {
            f"- {r.name}, {r.bits}, {s}: {c['refused']}"
            for r in rows
            for s in SUBJECTS
            if "refused" in (c := _cell(cells, r, s))
        }
    )
    if refused:
        lines += ["", "## Refused", "", *refused]
    lines += [
        "",
        f"Computed on: {results.get('device')}; "
        + ", ".join(f"{k} {v}" for k, v in results.get("versions", {}).items())
        + ".",
        "",
    ]
    (folder / "README.md").write_text("\n".join(lines), encoding="utf-8")
    _plot(folder / "quality.png", cells, rows)


def _cell(cells: dict[str, Any], row: Row, subject: str) -> dict[str, Any]:
    return cells.get(f"{row.name} | {row.bits}", {}).get(subject, {})


def _metric_text(cells: dict[str, Any], row: Row, subject: str) -> str:
    cell = _cell(cells, row, subject)
    return f"{cell['figure']:.4f}" if "figure" in cell else ("refused" if "refused" in cell else "")


def _reload_text(cells: dict[str, Any], row: Row) -> str:
    saved = [cell for subject in SUBJECTS if "reload" in (cell := _cell(cells, row, subject))]
    levels = " / ".join(dict.fromkeys(cell["reload"] for cell in saved))
    return f"{levels} | " + " / ".join(dict.fromkeys(cell.get("stock", "") for cell in saved))


def _size_text(cells: dict[str, Any], row: Row, subject: str) -> str:
    cell = _cell(cells, row, subject)
    if "bytes" not in cell:
        return ""
    seconds = f", {cell['seconds']:.0f} s" if "seconds" in cell else ""
    return f"{cell['bytes'] / 1e6:.2f} MB{seconds}"


def _plot(path: Path, cells: dict[str, Any], rows: Sequence[Row]) -> None:
    """Draw a panel per model: the metric by bits, with a line per technique and one for the dense model."""
    figure = Figure(figsize=(13, 9), layout="constrained")
    FigureCanvasAgg(figure)
    positions = {"W8": 3, "W8A8": 3, "W8A8/16": 3, "W4": 2, "W4A8": 2, "W4 mean": 2, "W3": 1, "W3 mean": 1, "W2": 0}
    names = list(dict.fromkeys(row.name for row in rows if row.steps))
    markers = "osD^v<>pPX*h"
    for number, (subject, metric) in enumerate(zip(SUBJECTS, METRICS, strict=True)):
        axes = figure.add_subplot(2, 2, number + 1)
        dense = _cell(cells, rows[0], subject).get("figure")
        for index, name in enumerate(names):
            points = [
                (positions[row.bits], _cell(cells, row, subject)["figure"])
                for row in rows
                if row.name == name and "figure" in _cell(cells, row, subject)
            ]
            if points:
                x, y = zip(*sorted(points), strict=True)
                shift = (index - len(names) / 2) * 0.018
                axes.plot(
                    [v + shift for v in x],
                    y,
                    marker=markers[index % len(markers)],
                    markersize=5,
                    linewidth=0.8,
                    label=name,
                    color=COLOURS[index % len(COLOURS)],
                )
        if dense is not None:
            axes.axhline(dense, color="black", linewidth=0.8, linestyle="--", label="dense")
        axes.set_title(f"{subject}: {metric}")
        axes.set_xlabel("bits of a weight")
        axes.set_xticks(range(4), ["2", "3", "4", "8"])
        if "perplexity" in metric:
            axes.set_yscale("log")
        axes.grid(alpha=0.3)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=6, fontsize=8)
    figure.savefig(path, dpi=110)
