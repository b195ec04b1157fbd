"""Render the comparison of ``capacity.py`` as a page and a plot, from ``capacity.json``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from statistics import mean
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from hf_optim.evaluation.cards.plots import COLOURS

POSITION, PRIORITY = "by position", "by priority"
CLEARLY = 0.02
"""Nats per token: a smaller difference is not called one."""


def mean_of(results: Mapping[str, Any], order: str, factor: str, key: str = "nll") -> float:
    """Return a figure of one order and factor, averaged over the seeds."""
    return mean(row[order][factor][key] for row in results["seeds"])


def verdict(results: Mapping[str, Any]) -> str:
    """Return what the figures say of the claim that priority wins at small capacities, seed by seed."""
    factors = [factor for factor in results["seeds"][0][POSITION] if float(factor) <= 0.5]
    gains = [
        row[POSITION][factor]["nll"] - row[PRIORITY][factor]["nll"] for row in results["seeds"] for factor in factors
    ]
    spread = f"the differences lie between {min(gains):+.3f} and {max(gains):+.3f} nats per token"
    if min(gains) > CLEARLY:
        return f"**Confirmed here**: at C ≤ 0.5 slots by priority lose less, for every seed and factor; {spread}."
    if max(gains) < -CLEARLY:
        return f"**Contradicted here**: at C ≤ 0.5 slots by priority lose more, for every seed and factor; {spread}."
    return (
        f"**Not confirmed here**: at C ≤ 0.5 the sign depends on seed and factor, or differences are small; {spread}."
    )


def write(folder: Path) -> None:
    """Write ``README.md`` and ``capacity.png`` into the folder of ``capacity.json``."""
    results = json.loads((folder / "capacity.json").read_text(encoding="utf-8"))
    draw(results, folder / "capacity.png")
    orders = [name for name in results["seeds"][0] if name != "dropless"]
    factors = list(results["seeds"][0][POSITION])
    lines = [
        f"| {factor} | {mean_of(results, POSITION, factor, 'dropped'):.1%} | "
        + " | ".join(f"{mean_of(results, order, factor):.3f}" for order in orders)
        + " |"
        for factor in factors
    ]
    dropless = mean(row["dropless"] for row in results["seeds"])
    text = f"""# Expert capacity: who gets the slots

{results["model"]}, upcycled to {results["experts"]} experts (top {results["top_k"]}) and trained for
{results["steps"]} steps ({results["trained_tokens"]:,} tokens) with a capacity factor of 1.05, slots by position.
Held-out loss in nats per token on {results["held_out_tokens"]:,} tokens, mean of {len(results["seeds"])} trainings.
Without a capacity the mixture has {dropless:.3f}; the dense model it was made of {results["dense_nll"]:.3f}, so this
short training is a loss by itself, and only the differences between the columns count. Made by
[examples/moe/capacity.py](../../examples/moe/capacity.py).

| C | dropped by position | {" | ".join(orders)} |
| ---: | ---: | {" | ".join("---:" for _ in orders)} |
{chr(10).join(lines)}

![Held-out loss against the capacity factor](capacity.png)

V-MoE (arXiv 2106.05974) claims that at C ≤ 0.5 batch priority routing is clearly above vanilla routing, on images.
{verdict(results)} At C = {factors[-1]} nothing can be dropped, and all orders give the same loss.

A text model of one million dense parameters is not V-MoE: images have patches that can be left out, and in this class
(Mixtral) gates are normalized over the chosen experts, so that priority orders by how decided the router is. The loss
is that of one forward per batch, where the choice of computed tokens may depend on later ones; it says nothing about
decoding.

Other pages: [experts out of neurons](moefication.md), [PR-MoE](pr_moe.md), [upcycling and its dense twin](upcycle.md),
[V-MoE on CIFAR-10](vmoe.md), [experts for tasks](task_moe.md); and across ranks, [exchanges](exchange/README.md),
[the choices of tutel](adaptive/README.md) and [buckets that follow the load](buckets/README.md).
"""
    (folder / "README.md").write_text(text, encoding="utf-8")


def draw(results: Mapping[str, Any], path: Path) -> None:
    """Draw the loss against the capacity factor, one line for each order, with the range of the seeds."""
    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.add_subplot()
    orders = [name for name in results["seeds"][0] if name != "dropless"]
    for number, order in enumerate(orders):
        factors = list(results["seeds"][0][order])
        values = [[row[order][factor]["nll"] for row in results["seeds"]] for factor in factors]
        x = [float(factor) for factor in factors]
        colour, line = COLOURS[number % 2], "-" if number < 2 else "--"
        axes.plot(x, [mean(v) for v in values], line, color=colour, marker="o", markersize=4, label=f"slots {order}")
        axes.fill_between(x, [min(v) for v in values], [max(v) for v in values], color=colour, alpha=0.15, linewidth=0)
    axes.axhline(mean(row["dropless"] for row in results["seeds"]), color="0.4", linewidth=1, label="no capacity")
    axes.set_xscale("log")
    axes.set_xticks(x, [f"{value:g}" for value in x])
    axes.minorticks_off()
    axes.set_xlabel("capacity factor C")
    axes.set_ylabel("held-out loss (nats per token)")
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    FigureCanvasAgg(figure).print_png(str(path))
