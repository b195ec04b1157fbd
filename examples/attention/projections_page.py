"""Render the figures of ``projections.py`` as a page, a plot and records of claims, from ``projections.json``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FormatStrFormatter, NullFormatter

from hf_optim.evaluation.cards.plots import COLOURS

DENSE, SDPA = "full attention", "full attention (SDPA)"
MEAN, CONTROL, PMA = "mean over the tokens", "the head with uniform attention", "pooling by attention"
FILE = "attention/projections.json"
SCRIPT = "examples/attention/projections.py"


def claims(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return what the figures say of the papers' claims."""
    names = {
        kind: next(name for name in results["times"] if name.startswith(kind)) for kind in ("linformer", "set_tran")
    }
    lengths = list(results["times"][SDPA])
    last, before = lengths[-1], lengths[-2]
    linear, points = names["linformer"], names["set_tran"]
    models = list(results["steps"])
    counts = results["counts"]
    trained = (
        f"all-MiniLM-L6-v2, Spearman on {counts['pairs']} pairs of STS-B, test, after {counts['distill']} steps of "
        f"distillation and {counts['recovery']} of training"
    )
    time = f"the attention alone on one thread of a CPU with a load of {results['load']:g} from other work"
    speed = f"{last} tokens: {{last:.0f}} ms, {{dense:.0f}} with full attention; {before} tokens: {{before:.0f}} ms."
    return [
        {
            "family": "attention",
            "technique": "linformer",
            "claim": "A fixed projection of keys and values keeps quality with memory O(L)",
            "source": "Wang et al. 2006.04768",
            "script": SCRIPT,
            "figures": {
                "last": [FILE, "times", linear, last, "ms"],
                "before": [FILE, "times", linear, before, "ms"],
                "dense": [FILE, "times", SDPA, last, "ms"],
                "memory": [FILE, "times", linear, last, "mib"],
                "half": [FILE, "times", linear, before, "mib"],
                "stored": [FILE, "times", SDPA, last, "mib"],
                "near": [FILE, "quality", models[0], "trained"],
                "apart": [FILE, "quality", models[1], "trained"],
                "full": [FILE, "quality", DENSE, "trained"],
            },
            "ours": (
                f"{speed} Memory {{memory:.0f}} MiB, {{half:.0f}} at {before} tokens; SDPA, which stores no scores, "
                "{stored:.0f}. Correlation {near:.3f} from means of neighbours (k = 16 of 64), {apart:.3f} from means "
                "of every 8th token (k = 8), {full:.3f} with full attention after the same training"
            ),
            "setting": f"{trained}; {time}",
            # A tenth above linear time is left for what the machine does beside; and two points of correlation.
            "holds": [["last", "<", "before", 2.2], ["memory", "<", "half", 2.2], ["apart", ">", "full", 0.98]],
            "why": "the paper trains with projections from the start; here a trained model gets them, for a few steps",
        },
        {
            "family": "attention",
            "technique": "set_transformer",
            "claim": "Inducing points bring the cost of attention among n elements from O(n^2) to O(nm)",
            "source": "Lee et al. 1810.00825",
            "script": SCRIPT,
            "figures": {
                "last": [FILE, "times", points, last, "ms"],
                "before": [FILE, "times", points, before, "ms"],
                "dense": [FILE, "times", SDPA, last, "ms"],
                "trained": [FILE, "quality", "set_transformer", "trained"],
                "full": [FILE, "quality", DENSE, "trained"],
            },
            "ours": (
                f"{speed} 16 points in the place of trained attention, after a short training: {{trained:.3f}}, "
                "{full:.3f} with full attention"
            ),
            "setting": f"{trained}; {time}",
            "holds": [["last", "<", "before", 2.2], ["last", "<", "dense"]],
        },
        {
            "family": "attention",
            "technique": "set_transformer",
            "claim": "Pooling by attention to learned seeds is better than the mean of the elements",
            "source": "Lee et al. 1810.00825",
            "script": SCRIPT,
            "figures": {
                "pma": [FILE, "pooling", PMA, "trained"],
                "control": [FILE, "pooling", CONTROL, "trained"],
                "mean": [FILE, "pooling", MEAN, "converted"],
            },
            "ours": (
                "Correlation {pma:.4f}, {control:.4f} with the same head whose attention stays uniform, {mean:.4f} "
                "with the mean and no training, over the same frozen encoder"
            ),
            "setting": (
                f"all-MiniLM-L6-v2, {counts['recovery']} steps of 16 pairs of STS-B; {counts['pairs']} pairs to test on"
            ),
            "verdict": "not testable here",
            "why": (
                "one seed and so few pairs do not tell such differences apart; and the encoder was trained for its mean"
            ),
        },
    ]


def write(folder: Path) -> None:
    """Write ``projections.md``, ``projections.png`` and the claims beside ``projections.json``."""
    results = json.loads((folder / "projections.json").read_text(encoding="utf-8"))
    draw(results, folder / "projections.png")
    target = folder.parent / "claims"
    target.mkdir(exist_ok=True)
    records = json.dumps(claims(results), indent=1) + "\n"
    (target / "projections.json").write_text(records, encoding="utf-8")
    (folder / "projections.md").write_text(page(results), encoding="utf-8")


def page(results: Mapping[str, Any]) -> str:
    """Return the text of the page."""
    counts = results["counts"]
    quality = []
    for name, row in results["quality"].items():
        error = f"{row['error']['before']:.0%}, then {row['error']['after']:.0%}" if "error" in row else ""
        distilled = f"{row['distilled']:.4f}" if "distilled" in row else ""
        quality.append(f"| {name} | {row['converted']:.4f} | {error} | {distilled} | {row['trained']:.4f} |")
    pooling = [
        f"| {name} | {row['converted']:.4f} | {row['trained']:.4f} |" if "trained" in row
        else f"| {name} | {row['converted']:.4f} | |"
        for name, row in results["pooling"].items()
    ]  # fmt: skip
    lengths = list(results["times"][SDPA])
    timed = [
        f"| {name} | {what} | " + " | ".join(f"{own[length][key]:,.0f}" for length in lengths) + " |"
        for what, key in (("ms", "ms"), ("MiB", "mib"))
        for name, own in results["times"].items()
    ]
    steps = "\n".join(f"- {name}: `{json.dumps(step)}`" for name, step in results["steps"].items())
    return f"""# Linformer and Set Transformer in a sentence encoder

all-MiniLM-L6-v2 (6 layers, 384 wide, 12 heads) with other attention, and with another pooling. Made by
[examples/attention/projections.py](../../examples/attention/projections.py).

{steps}

## Quality

Spearman's correlation of cosines with the scores of {counts["pairs"]} pairs of STS-B, test. *Error* is the squared
error of the outputs of attention relative to the dense ones, before and after {counts["distill"]} steps of
distillation, on the sentences it learns from (16 a step; the dense model has none of these steps); *trained* is after
{counts["recovery"]} steps of 16 pairs, the same for all. One seed. Sentences have some 15 tokens.
All begin with the weights of the pretrained encoder: neither technique was trained from nothing.

| attention | converted | error | distilled | trained |
| --- | ---: | ---: | ---: | ---: |
{chr(10).join(quality)}

## Pooling

The encoder is frozen; a head by attention from one seed begins as the mean, and is trained on the same pairs. So is the
same head whose attention stays uniform, to tell what attention adds from what the pairs teach its other weights. One
seed and {counts["pairs"]} pairs to test on do not tell differences of a few thousandths apart.

| vector of a sentence | converted | trained |
| --- | ---: | ---: |
{chr(10).join(pooling)}

## Time and memory by length

The forward of the attention alone on one thread of a CPU, 12 heads of 64 in float32, one row: milliseconds of processor
time, and MiB above what the process held before. The machine had a load of {results["load"]:g} from other work, which
takes a part of its caches, so that only the proportions count.

| attention | | {" | ".join(f"{int(length):,} tokens" for length in lengths)} |
| --- | --- | {" | ".join("---:" for _ in lengths)} |
{chr(10).join(timed)}

![Milliseconds of the attention by length](projections.png)
"""


def draw(results: Mapping[str, Any], path: Path) -> None:
    """Draw milliseconds by length."""
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.subplots()
    for index, (name, own) in enumerate(results["times"].items()):
        colour = "0.35" if name == SDPA else COLOURS[index - 1]
        lengths = [int(length) for length in own]
        values = [each["ms"] for each in own.values()]
        axes.plot(lengths, values, "-", color=colour, marker="o", markersize=3.5, label=name)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter(FormatStrFormatter("%g"))
    axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
    axes.set_xlabel("tokens")
    axes.set_ylabel("milliseconds of the attention")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    FigureCanvasAgg(figure).print_png(str(path))
