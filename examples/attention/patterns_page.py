"""Render the figures of ``patterns.py`` as a page, a plot and records of claims, from ``patterns.json``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure

from hf_optim.evaluation.cards.plots import COLOURS

KEYS = (1, 8, 15, 16, 40, 64, 100, 128, 200, 255)
"""Distances at which a key is planted before the last token."""


def write(folder: Path) -> None:
    """Write ``patterns.md`` and ``patterns.png`` beside ``patterns.json``."""
    results = json.loads((folder / "patterns.json").read_text(encoding="utf-8"))
    draw(results, folder / "patterns.png")
    (folder / "patterns.md").write_text(page(results), encoding="utf-8")


def page(results: Mapping[str, Any]) -> str:
    """Return the page."""
    rows, keys = [], []
    for name, own in results["variants"].items():
        rows.append(f"| {name} | {own['share']:.1%} | {own['before']:.3f} | {own['after']:.3f} |")
        reach = results["reach"][name]
        cells = [first_depth(reach, results["depths"], distance) for distance in KEYS]
        keys.append(f"| {name} | {' | '.join(cells)} |")
    head = " | ".join(str(distance) for distance in KEYS)
    depths = ", ".join(map(str, results["depths"][:-1])) + f" and {results['depths'][-1]}"
    return f"""# Patterns of attention on a pretrained model

babyllama-1m (5 layers, 8 heads, texts of {results["length"]} tokens) under each pattern: held-out perplexity of
{results["held_out_tokens"]:,} tokens before and after {results["steps"]} steps of training
({results["trained_tokens"]:,} tokens), the same for all. The dense row is the control: what this training does to a
model without a pattern. *Share*: pairs of query and key that are computed, of those of full attention. *strided 16,
window 16* and *sparse_transformer strided* are the same pairs. Patterns that hide the neighbours from some heads or
layers cost the most: the model was trained with them in sight. Made by
[examples/attention/patterns.py](../../examples/attention/patterns.py).

| pattern | share | before | after |
| --- | ---: | ---: | ---: |
{chr(10).join(rows)}

![Perplexity against the share of attention, and what the last token can see](patterns.png)

## A planted key

Can the last token use a key at a distance? The number is the smallest depth, of {depths} layers, at which its output
depends on the key; a dash stands for none of them. It is exact: the gradient in a model of random weights is zero where
no path leads.

| pattern | {head} |
| --- | {" | ".join(["---:"] * len(KEYS))} |
{chr(10).join(keys)}
"""


def first_depth(reach: list[list[int]], depths: list[int], distance: int) -> str:
    """Return the smallest depth at which a key at a distance is seen."""
    return next((str(depth) for depth, seen in zip(depths, reach, strict=True) if distance in seen), "-")


def draw(results: Mapping[str, Any], path: Path) -> None:
    """Draw the perplexity against the share of attention, and the depth at which the last token sees each key."""
    figure = Figure(figsize=(10.5, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[1, 1.25])
    names = list(results["variants"])
    for number, (name, own) in enumerate(results["variants"].items()):
        share = 100 * own["share"]
        left.plot([share, share], [own["before"], own["after"]], color="0.8", zorder=1)
        left.scatter(share, own["before"], facecolor="white", edgecolor="0.5", zorder=2)
        left.scatter(share, own["after"], color=COLOURS[0] if name != "dense" else "black", zorder=3)
        left.annotate(str(number + 1), (share, own["after"]), textcoords="offset points", xytext=(5, -9), fontsize=7)
    left.set_yscale("log")
    left.set_yticks([2, 3, 5, 10, 20, 30], ["2", "3", "5", "10", "20", "30"])
    left.minorticks_off()
    left.set_xlabel("pairs computed (% of full attention)")
    left.set_ylabel("held-out perplexity: hollow before, filled after training")
    left.spines[["top", "right"]].set_visible(False)
    depths = results["depths"]
    grid = []
    for name in names:
        levels = [len(depths)] * results["length"]
        for index in reversed(range(len(depths))):
            for distance in results["reach"][name][index]:
                levels[distance] = index
        grid.append(levels)
    shades = ListedColormap(["#08306b", "#4292c6", "#c6dbef", "white"])
    right.imshow(grid, aspect="auto", cmap=shades, vmin=-0.5, vmax=3.5, interpolation="nearest")
    right.set_yticks(range(len(names)), [f"{i + 1}  {name}" for i, name in enumerate(names)], fontsize=7)
    right.set_xlabel("distance of a key from the last token (tokens)")
    words = ", ".join(f"{depth} ({shade})" for depth, shade in zip(depths, ("dark", "mid", "light"), strict=True))
    right.set_title(f"seen through layers: {words}, none (white)", fontsize=9)
    FigureCanvasAgg(figure).print_png(str(path))
