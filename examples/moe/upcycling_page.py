"""Render the comparison of ``upcycling.py`` as a page, from ``upcycle.json``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from statistics import mean
from typing import Any


def verdict(results: Mapping[str, Any]) -> str:
    """Return what the figures say, seed by seed."""
    mixtures = [name for name in results["seeds"][0] if name not in ("start", "dense")]
    gaps = {name: [row[name]["nll"] - row["dense"]["nll"] for row in results["seeds"]] for name in mixtures}
    below = [name for name in mixtures if max(gaps[name]) < 0]
    spread = "; ".join(f"{name}: {min(gap):+.3f} to {max(gap):+.3f}" for name, gap in gaps.items())
    if below:
        return (
            f"Below its dense twin on held-out text in every seed: {', '.join(below)}. Differences by seed: {spread}."
        )
    return f"No mixture is below its dense twin on held-out text in every seed. Differences: {spread}."


def write(folder: Path) -> None:
    """Write ``upcycle.md`` into the folder of ``upcycle.json``."""
    results = json.loads((folder / "upcycle.json").read_text(encoding="utf-8"))
    first = results["seeds"][0]
    lines = []
    for name, own in first.items():
        if name == "start":
            continue
        each = [row[name]["nll"] for row in results["seeds"]]
        spread = f"{min(each):.3f} to {max(each):.3f}"
        lines.append(f"| {name} | {own['parameters']:,} | {own['active']:,} | {mean(each):.3f} | {spread} |")
    text = f"""# Upcycling beside its dense twin

A small Qwen3, trained from scratch on {results["trained_tokens"]:,} tokens of stories
({mean(row["start"] for row in results["seeds"]):.3f} nats per token on held-out stories), goes on for
{results["steps"]} steps on as many tokens that it has not seen: as it is, and upcycled by `upcycle` to 8 experts of
which a token chooses 2. Held-out loss on {results["held_out_tokens"]:,} tokens, mean of {len(results["seeds"])} seeds.
Made by [examples/moe/upcycling.py](../../examples/moe/upcycling.py).

| experts in | parameters | of one token | held-out loss | seeds |
| --- | ---: | ---: | ---: | ---: |
{chr(10).join(lines)}

{verdict(results)} A token computes two experts where the dense model computes one layer, so steps and data are equal,
products are not. [On repeated data](../measurements/README.md) the mixture fits the training text better and held-out
text worse.
"""
    (folder / "upcycle.md").write_text(text, encoding="utf-8")
