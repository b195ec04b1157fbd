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
{of_pretrained(first["variants"])}

![Perplexity along the training, and the time of a decoding step](mqa.png)

## A known share of the training

A multi-head Llama with 8 heads, trained from scratch for {second["steps"]} steps ({second["tokens"]:,} tokens):
perplexity {second["base"]:.3f} on {second["held_out_tokens"]:,} held-out tokens. Converted, and trained for
{second["more"]} more steps (5 %, the share of the paper):

| key/value heads | parameters | cache per token | converted | trained |
| --- | ---: | ---: | ---: | ---: |
{_rows(second["variants"])}
| 1, from scratch, {second["steps"] + second["more"]} steps {_cells(second["one_head_from_scratch"])}

{of_known_share(second)}

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


def of_pretrained(variants: Mapping[str, Any]) -> str:
    """Return what the figures of the pretrained model say."""
    base = next(own["end"] for name, own in variants.items() if "unconverted" in name)
    above = {name: own["end"] / base - 1 for name, own in variants.items()}
    means = ", ".join(
        f"{100 * gap:+.0f} % with {name[0]} head{'s' * (name[0] != '1')}"
        for name, gap in above.items()
        if name.endswith(", mean")
    )
    order = sorted(("mean", "first", "random"), key=lambda way: variants[f"1, {way}"]["end"])
    return (
        f"After the same number of steps, perplexity beside the unconverted model: {means}. By how a shared "
        f"head starts, from the best: {', '.join(order)}. With one head the perplexity is "
        f"{variants['1, mean']['end']:.2f} from the pretrained weights, and "
        f"{variants['1, from random weights']['end']:.2f} from random ones."
    )


def of_known_share(part: Mapping[str, Any]) -> str:
    """Return what the figures of the known share say."""
    own, scratch = part["variants"], part["one_head_from_scratch"]["end"]
    converted, start = own["1"]["end"] / own["8"]["end"] - 1, scratch / own["8"]["end"] - 1
    most = (
        " So most of the difference is too little training after the conversion, not the number of heads."
        if start < converted / 2
        else ""
    )
    return (
        f"After 5 % of so short a training, {part['more']} steps, perplexity with one head is {100 * converted:+.0f} % "
        f"beside eight heads; with one head from the start it is {100 * start:+.0f} %.{most}"
    )


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
    left.set_xlim(left=0)
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
