"""Render the 2:4 chain as a page and a plot, from ``results.json`` and the benchmark in ``runtime`` (optional)."""

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

Written by `examples/sparsity/chain.py`, which computes every number. babyllama-1m, **every** linear layer of its blocks
2:4; perplexity on the eval split of TinyStories, which is used once, after stock transformers has reloaded the
checkpoint. Training and calibration use only the 700 stories of the other two splits. `sr_ste` recomputes the mask at
every step. With KD, the dense model is the teacher and the divergence from it is the only loss.

The amount of text is the limit: the student is much closer to its teacher on sequences from its training than on
others. So two links continue from the checkpoint of `+ KD`: in one, tokens of every second sequence are replaced at
random; in the other, every second sequence is sampled from the dense model after 16 tokens of a story. int4 is applied
to the second.

![Perplexity of every link](chain.png)
"""
TIMES = """
## Run time

A model of one million weights fits into the cache of any device, so its times mean little. These times are of random
weights in the shape of {model}, run by stock transformers on hf_optim's kernels ({device}, torch {torch}, triton
{triton}); measured by `{command}` ([full results](runtime/README.md)). Prefill is one forward over a prompt that also
fills the cache.
"""


def read(folder: Path) -> dict[str, Any]:
    """Read ``results.json`` of a folder; without the file, return empty results."""
    path = folder / NAME
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"links": {}}


def add(folder: Path, link: str, result: dict[str, Any]) -> None:
    """Add the result of one link to ``results.json``; several processes may do so at once."""
    with open(folder / f".{NAME}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        results = read(folder)
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
        results["links"][link] = {**result, "device": device}
        results["versions"] = versions()
        (folder / NAME).write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    (folder / f".{NAME}.lock").unlink(missing_ok=True)


def render(folder: Path, order: Sequence[str]) -> None:
    """Write README.md and the plot."""
    results = read(folder)
    links = {name: results["links"][name] for name in order if name in results["links"]}
    lines = [HEAD, "| | perplexity | weights on disk | training steps | on |", "|---|---|---|---|---|"]
    for name, result in links.items():
        lines.append(
            f"| {name} | {result['perplexity']:.4f} | {result['bytes'] / 1e6:.2f} MB | {result.get('steps', '')} | "
            f"{result['device']} |"
        )
    lines += ["", "A 2:4 checkpoint without codes is an ordinary dense one: its zeros take up space on disk."]
    lines += _run_time_section(folder)
    lines += [
        "",
        "Last computed with "
        + ", ".join(f"{name} {version}" for name, version in results.get("versions", {}).items())
        + ".",
        "",
    ]
    (folder / "README.md").write_text("\n".join(lines), encoding="utf-8")
    _plot(folder / "chain.png", {name: result["perplexity"] for name, result in links.items()})


def _run_time_section(folder: Path) -> list[str]:
    if not (folder / RUNTIME).is_dir():
        return []
    benchmark = Results.load(folder / RUNTIME)
    prompts = sorted({row.tokens for row in benchmark.prefill})
    heads = ["weights", "weights GB", "ms per token, batch 1", *(f"ms, prefill of {tokens}" for tokens in prompts)]
    setup = {"model": benchmark.decode[0].model, "device": benchmark.device, "command": benchmark.command}
    lines = [TIMES.format(**setup, **benchmark.versions), f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for row in benchmark.decode:
        times = {each.tokens: each.ms for each in benchmark.prefill if each.scheme == row.scheme}
        cells = [row.scheme, f"{row.weights_gb:.2f}", f"{row.ms:.2f}", *(f"{times[tokens]:.1f}" for tokens in prompts)]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _plot(path: Path, perplexities: dict[str, float]) -> None:
    """Draw the perplexities as bars on a logarithmic axis, and that of the dense model as a line."""
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
