"""Render the figures of ``mqa.py`` as a page and a plot, from ``mqa.json``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from hf_optim.evaluation.cards.plots import COLOURS


def write(folder: Path) -> None:
    """Write ``mqa.md`` and ``mqa.png`` into the folder of ``mqa.json``."""
    results = json.loads((folder / "mqa.json").read_text(encoding="utf-8"))
    draw(results, folder / "mqa.png")
    first, second, third = (results[name] for name in ("pretrained", "known_share", "decoding"))
    text = f"""# Fewer key/value heads

Made by [examples/attention/mqa.py](../../examples/attention/mqa.py), on one CPU core.

## A pretrained model

babyllama-1m, {first["query_heads"]} query heads over {first["present"]} key/value heads (it has grouped-query attention
already, so pooling starts there), converted by `mqa` and trained for {first["steps"]} steps on {first["tokens"]:,}
tokens of stories, each seen once (learning rates: converted {first["rates"]["converted"]:g}, unconverted
{first["rates"]["unconverted"]:g}, since a higher one makes it worse, from random weights {first["rates"]["random"]:g};
cosine). Its own pretraining is not documented, so the share of it is not known. Perplexity on
{first["held_out_tokens"]:,} held-out tokens; bytes of a float32 cache.

| key/value heads | parameters | cache per token | converted | trained |
| --- | ---: | ---: | ---: | ---: |
{_rows(first["variants"])}

*first* and *random* are the comparisons of the GQA paper. *Distilled* is trained towards the outputs of the unconverted
model on the same text. *From random weights* is the converted architecture without the pretrained weights.

![Perplexity along the training, and the time of a decoding step](mqa.png)

## A known share of the training

A multi-head Llama with 8 heads, trained from scratch for {second["steps"]} steps ({second["tokens"]:,} tokens):
perplexity {second["base"]:.3f} on {second["held_out_tokens"]:,} held-out tokens. Converted, and trained for
{second["more"]} more steps (5 %, the share of the paper):

| key/value heads | parameters | cache per token | converted | trained |
| --- | ---: | ---: | ---: | ---: |
{_rows(second["variants"])}
| 1, from scratch, {second["steps"] + second["more"]} steps {_cells(second["one_head_from_scratch"])}

## A decoding step

A Llama of two layers (2048 wide, 32 heads of 64, random weights, float32), one token after {third["context"]:,}, in
transformers' `DynamicCache`: median of {third["rounds"]} steps, in turn, quartiles in brackets, on
{third["threads"]} thread(s) of a shared machine (load {third["load"]}).

| key/value heads | step, ms | cache, MB | weights, MB |
| --- | ---: | ---: | ---: |
{chr(10).join(_decoding_row(kv, own) for kv, own in third["kv_heads"].items())}

Nothing here was run on a GPU. [examples/gpu/mqa.py](../../examples/gpu/mqa.py) is prepared for it.
"""
    (folder / "mqa.md").write_text(text, encoding="utf-8")


def _rows(variants: Mapping[str, Any]) -> str:
    return "\n".join(f"| {name} {_cells(own)}" for name, own in variants.items())


def _cells(own: Mapping[str, Any]) -> str:
    return f"| {own['parameters']:,} | {own['cache_bytes']:,} | {own['start']:.3f} | {own['end']:.3f} |"


def _decoding_row(kv_heads: str, own: Mapping[str, Any]) -> str:
    spread = f"{own['ms']:.1f} ({own['ms_low']:.1f} to {own['ms_high']:.1f})"
    return f"| {kv_heads} | {spread} | {own['cache_bytes'] / 1e6:.1f} | {own['weights_bytes'] / 1e6:.0f} |"


def draw(results: Mapping[str, Any], path: Path) -> None:
    """Draw the held-out perplexity along the training, and the time of a decoding step by key/value heads."""
    figure = Figure(figsize=(9.6, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[2, 1])
    curves = {
        name: own["curve"] for name, own in results["pretrained"]["variants"].items() if "from random" not in name
    }
    for number, (name, curve) in enumerate(curves.items()):
        steps = [int(step) for step in curve]
        left.plot(
            steps, list(curve.values()), marker="o", markersize=3, label=name, color=COLOURS[number % len(COLOURS)]
        )
    left.set_yscale("log")
    left.set_xscale("symlog", linthresh=max(1, results["pretrained"]["steps"] // 20))
    left.set_xlabel("steps after conversion")
    left.set_ylabel("held-out perplexity")
    left.legend(title="key/value heads", frameon=False, fontsize=8, title_fontsize=8)
    bars = results["decoding"]["kv_heads"]
    heights = [own["ms"] for own in bars.values()]
    spread = [
        [own["ms"] - own["ms_low"] for own in bars.values()],
        [own["ms_high"] - own["ms"] for own in bars.values()],
    ]
    right.bar(list(bars), heights, yerr=spread, color=COLOURS[0], capsize=3)
    right.set_xlabel(f"key/value heads of 32, {results['decoding']['context']:,} tokens")
    right.set_ylabel("ms per decoding step (CPU)")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    FigureCanvasAgg(figure).print_png(str(path))
