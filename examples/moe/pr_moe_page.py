"""Render the comparison of ``pr_moe.py`` as a page, a plot and a record of the claim, from ``pr_moe.json``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from statistics import mean
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from hf_optim.evaluation.cards.plots import COLOURS

OURS, UNIFORM = "PR-MoE 4/8, gate 1", ("uniform 8, gate 1", "uniform 16, gate 1")
PAPER, PAPER_UNIFORM = "PR-MoE 4/8", ("uniform 8", "uniform 16")
EQUAL = 0.02
"""Nats per token: a smaller difference is not called one."""


def losses(results: Mapping[str, Any], name: str) -> list[float]:
    """Return the held-out loss of a variant, seed by seed."""
    return [row[name]["nll"] for row in results["seeds"]]


def claims(results: Mapping[str, Any]) -> list[dict[str, str]]:
    """Return what the figures say of the paper's claim."""
    gaps = [a - b for other in UNIFORM for a, b in zip(losses(results, OURS), losses(results, other), strict=True)]
    first = results["seeds"][0]
    sizes = {name: first[name]["parameters"] for name in (OURS, *UNIFORM)}
    confirmed = max(gaps) <= EQUAL
    others = "; ".join(
        f"{name}: {mean(losses(results, name)):.3f} with {sizes[name] / 1e6:.2f} M parameters" for name in UNIFORM
    )
    return [
        {
            "technique": "pr_moe",
            "claim": "the quality of a uniform mixture of experts with more parameters (up to 3 times)",
            "source": "arXiv 2201.05596, section 4",
            "script": "examples/moe/pr_moe.py",
            "ours": f"{OURS}: {mean(losses(results, OURS)):.3f} nats per token with {sizes[OURS] / 1e6:.2f} M "
            f"parameters; {others}; differences by seed from {min(gaps):+.3f} to {max(gaps):+.3f}",
            "setting": f"a Llama of {first['dense']['parameters'] / 1e6:.2f} M parameters from scratch, "
            f"{results['trained_tokens']:,} tokens, {len(results['seeds'])} seeds, {results['held_out_tokens']:,} "
            "held-out tokens",
            "verdict": "confirmed" if confirmed else "contradicted",
            "why": (
                f"no seed is more than {EQUAL} nats above a uniform mixture, at this size and after so few tokens"
                if confirmed
                else f"a seed is more than {EQUAL} nats above a uniform mixture"
            )
            + f"; with the probability as gate, as in the paper: {mean(losses(results, PAPER)):.3f} beside "
            + " and ".join(f"{mean(losses(results, name)):.3f}" for name in PAPER_UNIFORM)
            + f", all above the dense model's {mean(losses(results, 'dense')):.3f}, since few tokens are seen before "
            "the gates grow from 1 / experts",
        }
    ]  # fmt: skip


def write(folder: Path) -> None:
    """Write ``pr_moe.md``, ``pr_moe.png`` and the claim beside ``pr_moe.json``."""
    results = json.loads((folder / "pr_moe.json").read_text(encoding="utf-8"))
    draw(results, folder / "pr_moe.png")
    found = claims(results)
    target = folder.parent / "claims"
    target.mkdir(exist_ok=True)
    (target / "pr_moe.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    first = results["seeds"][0]
    lines = []
    for name, own in first.items():
        each = losses(results, name)
        spread = f"{min(each):.3f} to {max(each):.3f}"
        lines.append(f"| {name} | {own['parameters']:,} | {own['active']:,} | {mean(each):.3f} | {spread} |")
    text = f"""# PR-MoE beside uniform mixtures of experts

A small Llama, trained from scratch for {results["steps"]} steps ({results["trained_tokens"]:,} tokens of stories, each
seen once), with its feed-forward layers turned by `pr_moe`: one expert per token. Its output is multiplied by the
router's probability, as in the paper, or by 1 (*gate 1*, the default). *Residual* keeps a dense part beside the expert,
*pyramid* has 4 experts in the first half of the layers and 8 in the second.
Held-out loss in nats per token, {results["held_out_tokens"]:,} tokens, mean of {len(results["seeds"])} seeds.
Made by [examples/moe/pr_moe.py](../../examples/moe/pr_moe.py).

| variant | parameters | of one token | held-out loss | seeds |
| --- | ---: | ---: | ---: | ---: |
{chr(10).join(lines)}

![Held-out loss against parameters](pr_moe.png)

The claim: {found[0]["claim"]}. **{found[0]["verdict"].capitalize()} here**: {found[0]["ours"]} ({found[0]["why"]}). The
residual variants compute twice as much for a token as the uniform ones, as top-2 routing does.
"""
    (folder / "pr_moe.md").write_text(text, encoding="utf-8")


def draw(results: Mapping[str, Any], path: Path) -> None:
    """Draw the held-out loss of each variant against its parameters, with the range of the seeds."""
    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.add_subplot()
    for number, (name, own) in enumerate(results["seeds"][0].items()):
        each = losses(results, name)
        middle, size = mean(each), own["parameters"] / 1e6
        colour = COLOURS[0] if name == OURS else COLOURS[1] if name in UNIFORM else "0.5"
        axes.errorbar(size, middle, [[middle - min(each)], [max(each) - middle]], fmt="o", color=colour, capsize=3)
        axes.annotate(name, (size, middle), textcoords="offset points", xytext=(7, 7 - 7 * (number % 3)), fontsize=7)
    axes.set_xlabel("parameters (millions)")
    axes.set_ylabel("held-out loss (nats per token)")
    axes.margins(x=0.25, y=0.15)
    axes.spines[["top", "right"]].set_visible(False)
    FigureCanvasAgg(figure).print_png(str(path))
