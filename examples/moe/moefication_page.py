"""Render the curves of ``moefication.py`` as a page, a plot and records of claims, from ``moefication.json``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from hf_optim.evaluation.cards.plots import COLOURS

MODELS = ("ReLU", "SwiGLU")
TRAINED, BEST = "trained router", "best choice"
WAYS = (TRAINED, "trained router, co-activation", "trained router, contribution", "similarity", BEST, "random")
KEPT, FEW, TWICE = 0.95, 0.30, 2.0
"""The paper: more than 95 % of the quality with 10 to 30 % of the parameters, and twice the speed with 25 %."""


def kept(results: Mapping[str, Any], way: str, share: str) -> float:
    """Return the accuracy of next tokens as a share of the dense model's."""
    return results[way][share]["accuracy"] / results["dense"]["accuracy"]


def within(results: Mapping[str, Any], most: float) -> list[str]:
    """Return the shares of active experts with which a token reads at most ``most`` of the parameters."""
    return [share for share, computed in results["shares"].items() if computed <= most]


def claims(results: Mapping[str, Any]) -> list[dict[str, str]]:
    """Return what the figures say of the paper's claims."""
    source, script = "arXiv 2110.01786, abstract", "examples/moe/moefication.py"
    quality = []
    for name in MODELS:
        shares = within(results[name], FEW)
        best = max(kept(results[name], TRAINED, share) for share in shares)
        limit = max(kept(results[name], BEST, share) for share in shares)
        at = max(shares, key=lambda share: kept(results[name], TRAINED, share))
        quality.append((name, best, limit, results[name]["shares"][at]))
    relu = quality[0][1] >= KEPT
    quarter = [row for row in results["times"]["rows"] if row["share"] == 0.25]
    fastest = max(row["times"] for row in quarter)
    times = results["times"]
    return [
        {
            "technique": "moefication",
            "claim": "10 to 30 % of the feed-forward parameters keep more than 95 % of the quality",
            "source": source,
            "script": script,
            "ours": "; ".join(
                f"{name}: {100 * share:.1f} % of the dense accuracy of next tokens with {100 * computed:.0f} % of the "
                f"parameters ({100 * limit:.1f} % with the best choice of experts)"
                for name, share, limit, computed in quality
            ),
            "setting": f"{results['model']}, {results['experts']} experts per layer, no training after the division; "
            f"ReLU: distilled for {results['steps']} steps; {results['held_out_tokens']:,} held-out tokens",
            "verdict": "confirmed" if relu else "contradicted",
            "why": "for the ReLU model; SwiGLU has no zeros, so it is outside of the claim, and loses more"
            if relu
            else "at most 30 % of the parameters, routers included, keep less; the paper's models are over 100 times "
            "larger, and its quality is that of fine-tuned classification and question answering",
        },
        {
            "technique": "moefication",
            "claim": "2 times the speed with 25 % of the feed-forward parameters",
            "source": source,
            "script": script,
            "ours": "; ".join(f"{row['experts']} experts: {row['times']:.2f} times" for row in quarter),
            "setting": f"one token through a ReLU layer of {times['width']} x {times['neurons']} in float32 on "
            f"{times['threads']} CPU thread(s), router included, weights read from memory",
            "verdict": "confirmed" if fastest >= TWICE else "contradicted",
            "why": "time of the feed-forward layer alone, as in the paper" if fastest >= TWICE else
            "the layer is faster, but by less than the claim",
        },
    ]  # fmt: skip


def write(folder: Path) -> None:
    """Write ``moefication.md``, ``moefication.png`` and the claims beside ``moefication.json``."""
    results = json.loads((folder / "moefication.json").read_text(encoding="utf-8"))
    draw(results, folder / "moefication.png")
    found = claims(results)
    target = folder.parent / "claims"
    target.mkdir(exist_ok=True)
    (target / "moefication.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    (folder / "moefication.md").write_text(page(results, found), encoding="utf-8")


def page(results: Mapping[str, Any], found: list[dict[str, str]]) -> str:
    """Return the text of the page."""
    tables = []
    for name in MODELS:
        own = results[name]
        record = own["records"][TRAINED]
        lines = [
            f"| {computed:.1%} | " + " | ".join(f"{own[way][share]['nll']:.3f}" for way in WAYS)
            + f" | {kept(own, TRAINED, share):.1%} |"
            for share, computed in own["shares"].items()
        ]  # fmt: skip
        tables.append(
            f"""## {name}

Dense: {own["dense"]["nll"]:.3f} nats per token, {own["dense"]["accuracy"]:.1%} of next tokens right. On calibration
data {record["zeros"]:.1%} of its activations are exactly zero, and {record["neurons_for_95"]:.1%} of a token's neurons
carry 95 % of their magnitude. With a fifth of the experts the trained router covers {record["covered"]:.1%} of it, the
best choice {record["covered_at_best"]:.1%}.

| parameters read | {" | ".join(WAYS)} | accuracy kept |
| ---: | {" | ".join("---:" for _ in WAYS)} | ---: |
{chr(10).join(lines)}
"""
        )
    times = results["times"]
    rows = [
        f"| {row['experts']} | {row['share']:.0%} | {row['ms']:.2f} | {row.get('times', 1.0):.2f} |"
        for row in times["rows"]
    ]
    verdicts = [f"- {claim['claim']}: **{claim['verdict']}**. {claim['ours']}. ({claim['why']}.)" for claim in found]
    return f"""# MoEfication: how many feed-forward parameters a token needs

{results["model"]} (SwiGLU), and the same model with ReLU in place of its activation, distilled from it for
{results["steps"]} steps. The neurons of each feed-forward layer are divided into {results["experts"]} experts; nothing
is trained afterwards but the routers, on {results["calibration_tokens"]:,} tokens. Held-out loss in nats per token on
{results["held_out_tokens"]:,} tokens. *Parameters read* is what a token reads of the feed-forward layers, routers
included. Made by [examples/moe/moefication.py](../../examples/moe/moefication.py).

![Held-out loss against the share of feed-forward parameters](moefication.png)

{chr(10).join(tables)}
Columns: the router trained on magnitudes of activations; with experts of neurons that are active together; trained on
activations times the lengths of their columns in the last matrix; similarity with the experts' mean weights; the best
choice, which computes all experts to know it; and random experts.

## Time

One token through a ReLU layer of {times["width"]} x {times["neurons"]} (OPT-1.3B) in float32, {times["threads"]} CPU
thread(s), router included. Weights are random and read from memory.

| experts | active | ms | times faster |
| ---: | ---: | ---: | ---: |
{chr(10).join(rows)}

## Claims

{chr(10).join(verdicts)}
"""


def draw(results: Mapping[str, Any], path: Path) -> None:
    """Draw the loss against the share of parameters read, one panel for each model."""
    figure = Figure(figsize=(8.4, 3.8), layout="constrained")
    panels = figure.subplots(1, len(MODELS), sharey=True)
    styles = {
        TRAINED: (COLOURS[0], "-"),
        "similarity": (COLOURS[0], "--"),
        BEST: (COLOURS[1], "-"),
        "random": ("0.5", ":"),
    }
    for axes, name in zip(panels, MODELS, strict=True):
        own = results[name]
        for way, (colour, line) in styles.items():
            points = [(own["shares"][share], own[way][share]["nll"]) for share in own["shares"]]
            axes.plot(*zip(*points, strict=True), line, color=colour, marker="o", markersize=3.5, label=way)
        axes.axhline(own["dense"]["nll"], color="0.4", linewidth=1)
        axes.set_title(name, fontsize=10)
        axes.set_xlabel("share of feed-forward parameters read")
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("held-out loss (nats per token)")
    panels[0].set_ylim(0.7, 4.0)
    panels[1].legend(frameon=False, fontsize=8)
    FigureCanvasAgg(figure).print_png(str(path))
