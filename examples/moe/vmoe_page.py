"""Render the comparison of ``vmoe.py`` as a page, plots and claims, from ``vmoe.json``.

python examples/moe/vmoe_page.py model_cards/moe
"""

from __future__ import annotations

import argparse
import base64
import json
from collections.abc import Mapping
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from vmoe_verdicts import (
    SCRIPT,
    SMALL,
    claims,
    dense_curve,
    dense_rows,
    gain,
    halves,
    models,
    named,
    sampled,
    setting,
    widths,
)

from hf_optim.evaluation.cards.plots import COLOURS

NAMES = ("airplane", "car", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
HEAD = (
    "| C | batch, by position | batch, by priority | image, by position | image, by priority | difference (batch) |\n"
    "| ---: | ---: | ---: | ---: | ---: | ---: |"
)


def write(folder: Path) -> None:
    """Write ``vmoe.md`` and its plots into the folder of ``vmoe.json``, and the claims into ``claims`` beside it."""
    results = json.loads((folder / "vmoe.json").read_text(encoding="utf-8"))
    found = claims(results)
    target = folder.parent / "claims"
    target.mkdir(exist_ok=True)
    for name, rows in found.items():
        (target / f"{name}.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    draw_curves(results, folder / "vmoe.png")
    draw_dropped(results, folder / "vmoe_dropped.png")
    (folder / "vmoe.md").write_text(page(results, found), encoding="utf-8")


def page(results: Mapping[str, Any], found: Mapping[str, list[dict[str, str]]]) -> str:
    """Return the text of the page."""
    factors = list(results["vmoe"][0]["flops"])
    lines = [
        f"| dense, width {rows[0]['width']} | {rows[0]['parameters']:,} | {rows[0]['flops'] / 1e6:.1f} | "
        f"{spread([row['accuracy'] for row in rows])} |"
        for rows in dense_rows(results)
    ]
    twice, tables = halves(results), []
    for (kind, width), rows in models(results).items():
        for factor in ("1.05", f"{SMALL:g}"):
            values = [row["accuracy"]["batch"]["by priority"][factor] for row in rows]
            lines.append(
                f"| {named(kind, width)}, C = {factor} | {rows[0]['parameters']:,} | "
                f"{rows[0]['flops'][factor] / 1e6:.1f} | {spread(values)} |"
            )
        cells = []
        for factor in factors:
            shown = [
                f"{mean(row['accuracy'][group][order][factor] for row in rows if group in row['accuracy']):.3f}"
                for group in ("batch", "image")
                for order in ("by position", "by priority")
            ]
            cells.append(f"| {factor} | {' | '.join(shown)} | {gain(results, kind, width, factor, 1)} |")
        tables.append(f"{named(kind, width).capitalize()}:\n\n{HEAD}\n" + "\n".join(cells))
    (compute,), (priority, low) = found["vmoe"], found["batch_priority_routing"]
    beside = "; ".join(f"width {width}: {one}" for width, one in twice.items()) or "no model of twice the FLOPs"
    tuning = results["tuning"]
    tried = "; ".join(
        f"{kind} " + ", ".join(f"{rate}: {value:.3f}" for rate, value in tuning[kind].items())
        for kind in ("dense", "vmoe")
    )
    return f"""# V-MoE on CIFAR-10

{setting(results)}.
V-MoE has mixtures of {results["experts"]} experts, of which each patch chooses {results["top_k"]}; trained with a
capacity factor of 1.05, slots by position, importance and load losses 0.005 each, all weights at random at the start.
Device: {results["device"]}. Made by [{SCRIPT}](../../{SCRIPT}); the test set was read by final models alone.

Learning rates were chosen on {tuning["held_back"]:,} images held back from training ({tuning["steps"]} steps, width
{tuning["width"]}; accuracy by rate: {tried}).

## Accuracy against inference compute, at equal training steps

MFLOPs are those of one image, with every slot of an expert counted; accuracy is on the test set: mean and range of the
seeds. V-MoE runs with slots by priority.

| model | parameters | MFLOPs | accuracy | range |
| --- | ---: | ---: | ---: | ---: |
{chr(10).join(lines)}

![Accuracy against FLOPs](vmoe.png)

V-MoE with mixtures in every second layer at C = {SMALL:g}, minus dense models of twice its FLOPs: {beside}. Intervals
are over {sampled(results)}, paired by seed, and hold at once.

"{compute["claim"]}" **{compute["verdict"].capitalize()}**: {compute["why"]}.

## Who gets the slots

Accuracy with other capacities at inference, mean over seeds. Patches compete within a batch of
{results["group_images"]} images, as published, or within their image (of the first three seeds). The last column is
priority minus position in a batch, with the 95% interval of this line alone, over {sampled(results)}.

{(chr(10) * 2).join(tables)}

"{priority["claim"]}" **{priority["verdict"].capitalize()}**: {priority["why"]}. The same comparison
[on a language model](README.md).

"{low["claim"]}" **{low["verdict"].capitalize()}**: {low["ours"]}.

## Which patches are dropped

The first test image of each class, in a batch of {results["group_images"]}, at C = {results["picture"]["factor"]:g}.
Dark patches are computed by no expert of the layer: they pass by the residual connection. By position, the slots are
used up by the images at the beginning of the batch; by priority, every image keeps those that its router is surest of.

![Patches that no expert computes](vmoe_dropped.png)
"""


def spread(values: list[float]) -> str:
    """Return the mean and the range of accuracies, as two cells."""
    return f"{mean(values):.3f} | {min(values):.3f} to {max(values):.3f}"


def draw_curves(results: Mapping[str, Any], path: Path) -> None:
    """Draw accuracy against FLOPs, and accuracy against the capacity factor."""
    figure = Figure(figsize=(10.5, 4.0), layout="constrained")
    left, right = figure.subplots(1, 2)
    curve = dense_curve(results)
    left.plot([f / 1e6 for f, _ in curve], [a for _, a in curve], "o-", color="0.35", label="dense")
    for number, width in enumerate(widths(results)):
        rows = models(results)["vmoe", width]
        for order, line in (("by priority", "-"), ("by position", "--")):
            points = [
                (rows[0]["flops"][c] / 1e6, mean(row["accuracy"]["batch"][order][c] for row in rows))
                for c in rows[0]["flops"]
            ]
            left.plot(*zip(*points, strict=True), line, color=COLOURS[number], marker="s", markersize=4,
                      label=f"V-MoE, width {width}, slots {order}")  # fmt: skip
    left.set_xscale("log")
    ticks = [f / 1e6 for f, _ in curve]
    left.set_xticks(ticks, [f"{tick:.3g}" for tick in ticks])
    left.minorticks_off()
    left.set_xlabel("MFLOPs for one image (V-MoE: C from 0.1 to 4)")
    left.set_title("mixtures in every second layer", fontsize=10)
    left.set_ylabel("test accuracy")
    left.legend(frameon=False, fontsize=8)
    factors = list(results["vmoe"][0]["flops"])
    x = [float(factor) for factor in factors]
    for number, order in enumerate(("by position", "by priority")):
        for group, line in (("batch", "-"), ("image", "--")):
            counted = [row["accuracy"] for row in results.get("every_layer") or results["vmoe"]]
            rows = [row[group][order] for row in counted if group in row]
            values = [[row[factor] - row[factors[-1]] for row in rows] for factor in factors]
            right.plot(x, [mean(v) for v in values], line, color=COLOURS[number], marker="o", markersize=4,
                       label=f"slots {order}, within {'the batch' if group == 'batch' else 'an image'}")  # fmt: skip
            if group == "batch":
                right.fill_between(
                    x,
                    [min(v) for v in values],
                    [max(v) for v in values],
                    color=COLOURS[number],
                    alpha=0.15,
                    linewidth=0,
                )
    right.set_xscale("log")
    right.set_xticks(x, factors)
    right.minorticks_off()
    right.set_title(f"mixtures in every {'layer' if results.get('every_layer') else 'second layer'}", fontsize=10)
    right.set_xlabel("capacity factor C at inference")
    right.set_ylabel("test accuracy, less that with nothing dropped")
    right.legend(frameon=False, fontsize=8)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    FigureCanvasAgg(figure).print_png(str(path))


def draw_dropped(results: Mapping[str, Any], path: Path) -> None:
    """Draw images with the patches that no expert computes darkened: a row for each order and layer."""
    picture = results["picture"]
    images = [np.frombuffer(base64.b64decode(data), np.uint8).reshape(32, 32, 3) for data in picture["images"]]
    rows = [("the image", None)]
    rows += [
        (f"{order},\nlayer {int(layer.split('.layers.')[1].split('.')[0]) + 1}", masks)
        for order, layers in picture["orders"].items()
        for layer, masks in layers.items()
    ]
    figure = Figure(figsize=(1.05 * len(images) + 1.4, 1.12 * len(rows)), layout="constrained")
    grid = figure.subplots(len(rows), len(images))
    for line, (title, masks) in zip(grid, rows, strict=True):
        for place, axes in enumerate(line):
            shown = images[place].astype(float)
            if masks is not None:
                side = round(len(masks[place]) ** 0.5)
                kept = np.array([mark == "1" for mark in masks[place]]).reshape(side, side)
                kept = np.kron(kept, np.ones((32 // side, 32 // side)))[:, :, None]
                shown = kept * shown + (1 - kept) * shown * 0.12
            axes.imshow(shown.astype(np.uint8))
            axes.set_xticks([])
            axes.set_yticks([])
            for spine in axes.spines.values():
                spine.set_visible(False)
            if masks is None:
                axes.set_title(NAMES[place], fontsize=9)
        line[0].set_ylabel(title, fontsize=9, rotation=0, ha="right", va="center")
    FigureCanvasAgg(figure).print_png(str(path))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="holds vmoe.json, and gets the page and its plots")
    write(parser.parse_args().folder)
