"""Render the comparison of ``vmoe.py`` as a page, plots and claims, from ``vmoe.json``.

python examples/moe/vmoe_page.py model_cards/moe
"""

from __future__ import annotations

import base64
import json
import sys
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from hf_optim.evaluation.cards.plots import COLOURS

CLEARLY = 0.01
"""Accuracy: a smaller difference, on 2,000 images, is not called one."""
SMALL = 0.5
"""The claim on priorities is about capacities up to this one."""
NAMES = ("airplane", "car", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
SCRIPT = "examples/moe/vmoe.py"
HEAD = (
    "| C | batch, by position | batch, by priority | image, by position | image, by priority | difference (batch) |\n"
    "| ---: | ---: | ---: | ---: | ---: | ---: |"
)


def mixtures(results: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Return the trained V-MoEs, by where their mixtures are."""
    found = {"every second layer": results["vmoe"], "every layer": results.get("every_layer", [])}
    return {name: rows for name, rows in found.items() if rows}


def gains(rows: list[Any], group: str, factor: str) -> list[float]:
    """Return how much more accurate slots by priority are at a capacity factor, for each training."""
    orders = (row["accuracy"][group] for row in rows)
    return [order["by priority"][factor] - order["by position"][factor] for order in orders]


def cost_of_dropping(rows: list[Any]) -> float:
    """Return the mean accuracy that the smallest capacity costs, by position in a batch."""
    least, most = (list(rows[0]["flops"])[end] for end in (0, -1))
    return mean(
        r["accuracy"]["batch"]["by position"][most] - r["accuracy"]["batch"]["by position"][least] for r in rows
    )


def judge(results: Mapping[str, Any], factors: list[str]) -> str:
    """Return whether slots by priority are clearly above slots by position at ``factors``, in every training.

    Where dropping nearly everything costs nearly nothing, no order can be better than another; such models do not
    count.
    """
    counted = [rows for rows in mixtures(results).values() if cost_of_dropping(rows) >= 2 * CLEARLY]
    differences = [x for rows in counted for factor in factors for x in gains(rows, "batch", factor)]
    if not differences:
        return "not testable here"
    if min(differences) > CLEARLY:
        return "confirmed"
    return "mixed" if mean(differences) > CLEARLY else "contradicted"


def dense_curve(results: Mapping[str, Any]) -> list[tuple[float, float]]:
    """Return (FLOPs, mean accuracy) of the dense models, by width."""
    widths = sorted({row["width"] for row in results["dense"]})
    rows = [[row for row in results["dense"] if row["width"] == width] for width in widths]
    return [(part[0]["flops"], mean(row["accuracy"] for row in part)) for part in rows]


def compute_ratios(results: Mapping[str, Any], factor: str) -> dict[int, tuple[float, float, float]]:
    """Return, by width, the FLOPs and accuracy of V-MoE at a capacity, by priority, and its FLOPs over the dense ones.

    The dense FLOPs for equal accuracy are interpolated between widths, linearly in their logarithm; above the best and
    below the worst dense model there are none, and the ratio is 0 or infinite.
    """
    curve, found = dense_curve(results), {}
    for width in sorted({row["width"] for row in results["vmoe"]}):
        rows = [row for row in results["vmoe"] if row["width"] == width]
        flops, accuracy = rows[0]["flops"][factor], mean(r["accuracy"]["batch"]["by priority"][factor] for r in rows)
        ratio = 0.0 if accuracy > max(a for _, a in curve) else float("inf")
        for (low, worse), (high, better) in pairwise(curve):
            if worse <= accuracy <= better:
                part = (accuracy - worse) / max(better - worse, 1e-9)
                ratio = flops / float(np.exp(np.log(low) + part * (np.log(high) - np.log(low))))
                break
        found[width] = (flops, accuracy, ratio)
    return found


def resolution(results: Mapping[str, Any]) -> float:
    """Return the factor in dense FLOPs that one standard error of the accuracy stands for; infinite without a slope."""
    (low, worse), *_, (high, better) = dense_curve(results)
    error = float(np.sqrt(better * (1 - better) / results["test_images"]))
    slope = (better - worse) / float(np.log(high / low))
    return float(np.exp(error / slope)) if slope > 0 else float("inf")


def setting(results: Mapping[str, Any]) -> str:
    """Return in a phrase what was trained."""
    return (
        f"CIFAR-10, {results['train_images']:,} training and {results['test_images']:,} test images; ViTs of "
        f"{results['depth']} layers, patches of {results['patch']}, {results['steps']:,} steps of {results['batch']} "
        f"images from scratch, {len({row['seed'] for row in results['vmoe']})} seeds"
    )


def shown_ratio(ratio: float) -> str:
    """Return a ratio of FLOPs in words."""
    if ratio == 0:
        return "more accurate than every dense model"
    return "less accurate than every dense model" if ratio == float("inf") else f"{ratio:.2f} of the dense FLOPs"


def claims(results: Mapping[str, Any]) -> dict[str, list[dict[str, str]]]:
    """Return the claims of the paper with the verdicts that follow from the figures."""
    small = [factor for factor in results["vmoe"][0]["flops"] if float(factor) <= SMALL]
    texts = []
    for name, rows in mixtures(results).items():
        values = [x for factor in small for x in gains(rows, "batch", factor)]
        texts.append(
            f"mixtures in {name}: {min(values):+.3f} to {max(values):+.3f} accuracy (mean {mean(values):+.3f}), where "
            f"the smallest capacity by position costs {cost_of_dropping(rows):.3f}"
        )
    trained, half = compute_ratios(results, "1.05"), compute_ratios(results, "0.5")
    halves = [ratio <= 0.6 for _, _, ratio in half.values()]
    verdict = "confirmed" if all(halves) else "mixed" if any(halves) else "contradicted"
    factor = resolution(results)
    source = "Riquelme et al., arXiv 2106.05974"
    priority = {
        "technique": "batch_priority_routing",
        "claim": "At a capacity factor of 0.5 and less, slots by priority are clearly above slots by position, on "
        "images.",
        "source": source,
        "script": SCRIPT,
        "ours": f"by priority minus by position at C <= {SMALL}, over trainings and factors: {'; '.join(texts)}",
        "setting": setting(results),
        "verdict": judge(results, small),
        "why": f"patches compete within a batch, as published; a difference counts from {CLEARLY} on, for every "
        f"training and factor, and models count for which the smallest capacity costs at least {2 * CLEARLY}",
    }
    compute = {
        "technique": "vmoe",
        "claim": "V-MoE matches the quality of dense models with about half of the compute at inference.",
        "source": source,
        "script": SCRIPT,
        "ours": "; ".join(
            f"width {width}, C = {name}: accuracy {accuracy:.3f} at {flops / 1e6:.1f} MFLOPs, {shown_ratio(ratio)}"
            for name, ratios in (("1.05", trained), ("0.5", half))
            for width, (flops, accuracy, ratio) in ratios.items()
        ),
        "setting": setting(results),
        # With a claim of one half, two standard errors must be less than a factor of 2.
        "verdict": verdict if factor**2 < 2 else "not testable here",
        "why": "FLOPs of dense models of equal accuracy are interpolated between widths, at equal training steps; one "
        f"standard error of the accuracy ({results['test_images']:,} test images) is a factor of {factor:.2f} in them. "
        "The paper trains on 300 million images, where the capacity of many experts pays; here there are "
        f"{results['train_images']:,}",
    }
    return {"vmoe": [compute], "batch_priority_routing": [priority]}


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
    widths = sorted({row["width"] for row in results["vmoe"]})
    dense = [
        f"| dense, width {width} | {rows[0]['parameters']:,} | {rows[0]['flops'] / 1e6:.1f} | "
        f"{mean(r['accuracy'] for r in rows):.3f} | {min(r['accuracy'] for r in rows):.3f} to "
        f"{max(r['accuracy'] for r in rows):.3f} |"
        for width in sorted({row["width"] for row in results["dense"]})
        if (rows := [row for row in results["dense"] if row["width"] == width])
    ]
    sparse = []
    for width in widths:
        rows = [row for row in results["vmoe"] if row["width"] == width]
        values = [row["accuracy"]["batch"]["by priority"]["1.05"] for row in rows]
        sparse.append(
            f"| V-MoE, width {width} | {rows[0]['parameters']:,} | {rows[0]['flops']['1.05'] / 1e6:.1f} | "
            f"{mean(values):.3f} | {min(values):.3f} to {max(values):.3f} |"
        )
    tables = []
    for name, rows in mixtures(results).items():
        lines = []
        for factor in factors:
            cells = [
                f"{mean(row['accuracy'][group][order][factor] for row in rows):.3f}"
                for group in ("batch", "image")
                for order in ("by position", "by priority")
            ]
            differences = gains(rows, "batch", factor)
            lines.append(f"| {factor} | {' | '.join(cells)} | {min(differences):+.3f} to {max(differences):+.3f} |")
        found_widths = " and ".join(str(width) for width in sorted({row["width"] for row in rows}))
        tables.append(f"Mixtures in {name}, width {found_widths}:\n\n{HEAD}\n" + "\n".join(lines))
    (compute,), (priority,) = found["vmoe"], found["batch_priority_routing"]
    tuning = results["tuning"]
    tried = "; ".join(
        f"{kind} " + ", ".join(f"{rate}: {value:.3f}" for rate, value in tuning[kind].items())
        for kind in ("dense", "vmoe")
    )
    return f"""# V-MoE on CIFAR-10

{setting(results)}.
Every second layer of a V-MoE is a mixture of {results["experts"]} experts, of which each patch chooses
{results["top_k"]}; trained with a capacity factor of 1.05, slots by position, importance and load losses 0.005 each,
all weights at random at the start. Device: {results["device"]}. Made by [{SCRIPT}](../../{SCRIPT}); the test set was
read once, by the final models.

Learning rates were chosen on {tuning["held_back"]:,} images held back from training ({tuning["steps"]} steps, width
{tuning["width"]}; accuracy by rate: {tried}).

## Accuracy against inference compute, at equal training steps

MFLOPs are those of one image, with every slot of an expert counted; accuracy is on the test set: mean and range of the
seeds. V-MoE runs with the capacity that it was trained with, slots by priority.

| model | parameters | MFLOPs | accuracy | range |
| --- | ---: | ---: | ---: | ---: |
{chr(10).join(dense + sparse)}

![Accuracy against FLOPs](vmoe.png)

"{compute["claim"]}" **{compute["verdict"].capitalize()}**: {compute["ours"]}. One standard error of the accuracy is a
factor of {resolution(results):.2f} in the FLOPs of a dense model.

## Who gets the slots

Accuracy with other capacities at inference, mean over trainings. Patches compete within a batch of
{results["group_images"]} images, as published, or within their image. The last column is priority minus position in a
batch, the range over trainings.

{(chr(10) * 2).join(tables)}

"{priority["claim"]}" **{priority["verdict"].capitalize()}**: {priority["ours"]}. The same comparison
[on a language model](README.md).

## Which patches are dropped

The first test image of each class, in a batch of {results["group_images"]}, at C = {results["picture"]["factor"]:g}.
Dark patches are computed by no expert of the layer: they pass by the residual connection. By position, the slots are
used up by the images at the beginning of the batch; by priority, every image keeps those that its router is surest of.

![Patches that no expert computes](vmoe_dropped.png)
"""


def draw_curves(results: Mapping[str, Any], path: Path) -> None:
    """Draw accuracy against FLOPs, and accuracy against the capacity factor."""
    figure = Figure(figsize=(10.5, 4.0), layout="constrained")
    left, right = figure.subplots(1, 2)
    curve = dense_curve(results)
    left.plot([f / 1e6 for f, _ in curve], [a for _, a in curve], "o-", color="0.35", label="dense")
    for number, width in enumerate(sorted({row["width"] for row in results["vmoe"]})):
        rows = [row for row in results["vmoe"] if row["width"] == width]
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
            rows = [row["accuracy"][group][order] for row in results.get("every_layer") or results["vmoe"]]
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
    write(Path(sys.argv[1]))
