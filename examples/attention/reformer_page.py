"""Render the figures of ``reformer.py`` as a page, from ``reformer.json``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def write(folder: Path) -> None:
    """Write ``reformer.md`` beside ``reformer.json``, with the parts that are there."""
    results = json.loads((folder / "reformer.json").read_text(encoding="utf-8"))
    parts = [
        "# LSH attention on a CPU",
        "Made on a shared machine by [examples/attention/reformer.py](../../examples/attention/reformer.py).",
    ]
    if "times" in results:
        parts += times(results["times"])
    if "memory" in results:
        parts += memory(results["memory"])
    if "recovery" in results:
        parts += recovery(results["recovery"], results["trained_tokens"])
    if "copy" in results:
        parts += copy(results["copy"], results["copy_steps"])
    (folder / "reformer.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def times(figures: dict[str, Any]) -> list[str]:
    """Return the tables of times."""
    parts = [
        "## Time against length",
        "Milliseconds of processor time of causal attention over one row, 12 heads of 64 in float32, one thread. "
        "Chunks of 64 tokens, 2 n / 64 buckets, hashing included. *Dense* is PyTorch's scaled_dot_product_attention.",
    ]
    for kind, by_name in figures.items():
        lengths = list(next(iter(by_name.values())))
        rows = [f"| {kind} | " + " | ".join(f"{int(length):,}" for length in lengths) + " |"]
        rows.append("| --- |" + " ---: |" * len(lengths))
        for name, by_length in by_name.items():
            rows.append(f"| {name} | " + " | ".join(f"{by_length[length]:,.0f}" for length in lengths) + " |")
        parts.append("\n".join(rows))
    return parts


def memory(figures: dict[str, Any]) -> list[str]:
    """Return the table of memory."""
    layers = list(next(iter(figures.values())))
    rows = ["| layers | " + " | ".join(layers) + " |", "| --- |" + " ---: |" * len(layers)]
    for kind, by_layers in figures.items():
        rows.append(f"| {kind} | " + " | ".join(f"{by_layers[each] / 2**20:,.1f}" for each in layers) + " |")
    return [
        "## Memory of activations",
        "MiB that the backward of a decoder waits with after its forward: 2 rows of 1,024 tokens, width 128, one round "
        "of hashing. *Reversible* layers store buckets, and both streams once.",
        "\n".join(rows),
    ]


def recovery(figures: dict[str, Any], tokens: int) -> list[str]:
    """Return the table of perplexities."""
    rows = ["| attention | converted | trained |", "| --- | ---: | ---: |"]
    rows += [f"| {name} | {each['before']:.2f} | {each['after']:.2f} |" for name, each in figures.items()]
    return [
        "## A pretrained model",
        "Held-out perplexity of babyllama-1m on TinyStories, rows of 256 tokens, after the conversion and after "
        f"{tokens:,} tokens of training, the same for each. Chunks of 16 tokens and 16 buckets.",
        "\n".join(rows),
    ]


def copy(figures: dict[str, Any], steps: int) -> list[str]:
    """Return the table of the copy task."""
    rows = ["| attention | symbols copied |", "| --- | ---: |"]
    rows += [f"| {name} | {share:.1%} |" for name, share in figures.items()]
    return [
        "## Copying",
        f"A decoder of two layers reads 63 random symbols and repeats them; {steps} steps from random weights. A "
        "symbol lies 64 tokens behind its copy, further than a chunk of 16 and the one before it reach.",
        "\n".join(rows),
    ]
