"""The 2:4 chain as a page and a plot, from ``results.json`` and, where it is there, the benchmark in ``runtime``."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from hf_optim.evaluation.bench.results import Results
from hf_optim.evaluation.cards.plots import COLOURS
from hf_optim.runs.record import versions

NAME = "results.json"
RUNTIME = "runtime"

HEAD = """# 2:4 sparsity, step by step

Written by `examples/sparsity/chain.py`; that script computes every figure. babyllama-1m, **every** linear layer of its
blocks 2:4; perplexity on TinyStories' eval split, which is used once, after stock transformers has reloaded the
checkpoint. Training and calibration see the 700 stories of the other two splits alone. `sr_ste` renews the mask at
every step; KD has the dense model for a teacher, and no other loss.
What limits it is the text: the student comes much nearer to its teacher on windows that it has seen than on others. So
two links go on from the checkpoint of the one before: one with tokens of every second window replaced at random, one
with every second window written by the dense model itself, begun with 16 tokens of a story. int4 follows on the latter.

![Perplexity of every link](chain.png)
"""
TIMES = """
## What it is worth at run time

A model of one million weights fits into the cache of any device, so its times say nothing. These are of random weights
in the shape of {model}, run by stock transformers on hf_optim's kernels ({device}, torch {torch}, triton {triton}); by
`{command}` ([all of it](runtime/README.md)). Prefill is one forward over a prompt, with a cache to fill.
"""


def read(folder: Path) -> dict[str, Any]:
    path = folder / NAME
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"links": {}}


def add(folder: Path, link: str, figures: dict[str, Any]) -> None:
    """Put one link into the results; several processes may do so at once."""
    with open(folder / f".{NAME}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        results = read(folder)
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
        results["links"][link] = {**figures, "device": device}
        results["versions"] = versions()
        (folder / NAME).write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    (folder / f".{NAME}.lock").unlink(missing_ok=True)


def render(folder: Path, order: Sequence[str]) -> None:
    """Write README.md and the plot."""
    results = read(folder)
    links = {name: results["links"][name] for name in order if name in results["links"]}
    lines = [HEAD, "| | perplexity | weights on disk | training steps | on |", "|---|---|---|---|---|"]
    for name, found in links.items():
        lines.append(
            f"| {name} | {found['perplexity']:.4f} | {found['bytes'] / 1e6:.2f} MB | {found.get('steps', '')} | "
            f"{found['device']} |"
        )
    lines += ["", "A 2:4 checkpoint without codes is an ordinary dense one: its zeros take their bytes on disk."]
    lines += _times(folder)
    lines += [
        "",
        "Last computed with "
        + ", ".join(f"{name} {version}" for name, version in results.get("versions", {}).items())
        + ".",
        "",
    ]
    (folder / "README.md").write_text("\n".join(lines), encoding="utf-8")
    _plot(folder / "chain.png", {name: found["perplexity"] for name, found in links.items()})


def _times(folder: Path) -> list[str]:
    if not (folder / RUNTIME).is_dir():
        return []
    found = Results.load(folder / RUNTIME)
    prompts = sorted({row.tokens for row in found.prefill})
    heads = ["weights", "weights GB", "ms a token, batch 1", *(f"ms, prefill of {tokens}" for tokens in prompts)]
    about = {"model": found.decode[0].model, "device": found.device, "command": found.command, **found.versions}
    lines = [TIMES.format(**about), f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for row in found.decode:
        times = {each.tokens: each.ms for each in found.prefill if each.scheme == row.scheme}
        cells = [row.scheme, f"{row.weights_gb:.2f}", f"{row.ms:.2f}", *(f"{times[tokens]:.1f}" for tokens in prompts)]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _plot(path: Path, perplexities: dict[str, float]) -> None:
    """Bars of perplexity, logarithmic, the dense model's as a line."""
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    names = list(perplexities)
    bars = axes.barh(names, list(perplexities.values()), color=COLOURS[0])
    axes.bar_label(bars, [f"{value:.3f}" for value in perplexities.values()], padding=3, fontsize=9)
    if "dense" in perplexities:
        axes.axvline(perplexities["dense"], color="black", linewidth=0.8, linestyle="--")
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlim(2, max(perplexities.values(), default=3) * 1.4)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("{x:g}")
    axes.set_xlabel("perplexity on TinyStories (logarithmic, lower is better)")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
