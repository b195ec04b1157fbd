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
TRAINED, COACTIVE, BEST = "trained router", "trained router, co-activation", "best choice"
WAYS = (TRAINED, COACTIVE, "similarity", BEST, "random")
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
        after = results[name]["recovered"]
        trained = after["accuracy"] / results[name]["dense"]["accuracy"]
        best, limit = (max(kept(results[name], way, share) for share in shares) for way in (COACTIVE, BEST))
        quality.append((name, best, limit, trained, after["share"]))
    _, most, _, trained, _ = quality[0]
    fulfilled = max(most, trained) >= KEPT
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
                f"{name}: {100 * share:.1f} % of the dense model's accuracy of next tokens with {100 * computed:.0f} % "
                f"of the parameters, {100 * after:.1f} % after training ({100 * limit:.1f} % by the best choice, "
                "untrained)"
                for name, share, limit, after, computed in quality
            ),
            "setting": f"{results['model']} (SwiGLU), and with ReLU after {results['steps']} steps of distillation; "
            f"{results['experts']} experts per layer; training: {results['ReLU']['recovered']['steps']} steps of "
            f"distillation from the dense model; {results['held_out_tokens']:,} held-out tokens",
            "verdict": "confirmed" if fulfilled else "contradicted",
            "why": why(fulfilled, results),
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
            "why": "time of the feed-forward layer alone, on a machine with a load of "
            f"{times['load']:g} from other work; {times['repeats']} such measurements range from "
            f"{times['quarter'][0]:.2f} to {times['quarter'][1]:.2f}" if fastest >= TWICE else
            "the layer is faster, but by less than the claim",
        },
    ]  # fmt: skip


def why(fulfilled: bool, results: Mapping[str, Any]) -> str:
    """Return the reason of the verdict on quality."""
    zeros = results["ReLU"]["records"][TRAINED]["zeros"]
    if fulfilled:
        return "for the ReLU model; SwiGLU has no zeros, so it is outside of the claim"
    return (
        f"in a model of 1 M parameters {100 * zeros:.0f} % of ReLU's activations are zero, and the best choice loses, "
        "too; the paper's models are over 100 times larger and sparser, and its quality is that of classification and "
        "question answering"
    )


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
    trained = [
        f"| {name} | {own['recovered']['share']:.1%} | {own[COACTIVE]['0.2']['nll']:.3f} | "
        f"{own['recovered']['nll']:.3f} | {own['dense']['nll']:.3f} | "
        f"{own['recovered']['accuracy'] / own['dense']['accuracy']:.1%} |"
        for name, own in ((name, results[name]) for name in MODELS)
    ]
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
Columns: experts of neurons with similar weights, chosen by the router that is trained on magnitudes of activations; the
same with experts of neurons that are active together; chosen by similarity with the experts' mean weights; the best
choice, which computes all experts to know it; and random experts. The last column belongs to the first.

## Trained afterwards

A fifth of the experts, of neurons that are active together, distilled for {results["ReLU"]["recovered"]["steps"]} steps
from the dense model (`logit_kd`).

| model | parameters read | divided | trained | dense | accuracy kept |
| --- | ---: | ---: | ---: | ---: | ---: |
{chr(10).join(trained)}

## Time

One token through a ReLU layer of {times["width"]} x {times["neurons"]} (OPT-1.3B) in float32, {times["threads"]} CPU
thread(s), router included. Weights are random and read from memory; the fastest of several passes. The machine had a
load of {times["load"]:g} from other work; in {times["repeats"]} such measurements, of which this is the last, 25 % of
the experts were {times["quarter"][0]:.2f} to {times["quarter"][1]:.2f} times faster.

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
