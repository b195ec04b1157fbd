"""Render the measurements of ``adaptive.py`` as a page, from ``adaptive.json``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

CLOSE = 1.15
"""A choice whose time is within this factor of the best one, measured again, counts as right."""


def excess(row: Mapping[str, Any]) -> float:
    """Return the time of the chosen way over that of the fastest, both measured again."""
    return row["again"][row["chosen"]] / min(row["again"].values())


def write(folder: Path) -> None:
    """Write ``README.md`` into the folder of ``adaptive.json``."""
    results = json.loads((folder / "adaptive.json").read_text(encoding="utf-8"))
    rows = results["measured"]
    ways = list(dict.fromkeys(way for row in rows for way in row["again"]))
    lines = []
    for row in rows:
        cells = [f"{row['again'][way]:.2f}" if way in row["again"] else "" for way in ways]
        cells = [f"**{cell}**" if way == row["chosen"] else cell for way, cell in zip(ways, cells, strict=True)]
        head = f"| {row['ranks']} | {row['tokens']} | {row['load']} | {row['imbalance']:.2f} | "
        lines.append(head + " | ".join(cells) + f" | {excess(row):.2f} |")
    right = sum(excess(row) <= CLOSE for row in rows)
    worst = max(max(row["again"].values()) / row["again"][row["chosen"]] for row in rows)
    fixed = {
        way: max(r["again"][way] / min(r["again"].values()) for r in rows)
        for way in ways
        if all(way in r["again"] for r in rows)
    }
    best_fixed = min(fixed, key=fixed.__getitem__)
    apart = max(row["largest_difference"] for row in rows)
    text = f"""# Tutel: which way is chosen, and was it the fastest

A mixture layer of {results["experts"]} experts (top {results["top_k"]}, {results["hidden"]} x {results["inner"]},
float32) spread over gloo ranks of one machine with {results["cores"]} cores. Each rank has the tokens of the second
column. Every way was timed {results["trials"]} times, then one was chosen (**bold**); the times below (ms) were
measured afterwards, the best of seven calls, the slowest rank of each. The last column is the time of the chosen way
over that of the fastest. Made by [examples/moe/adaptive.py](../../../examples/moe/adaptive.py).

| ranks | tokens | load | busiest / mean | {" | ".join(ways)} | chosen / fastest |
| ---: | ---: | --- | ---: | {" | ".join("---:" for _ in ways)} | ---: |
{chr(10).join(lines)}

In {right} of {len(rows)} cases the chosen way is within {CLOSE - 1:.0%} of the fastest; the largest excess is
{max(map(excess, rows)):.2f} times. The slowest way takes up to {worst:.1f} times as long as the chosen one, and a
fixed way would be up to {fixed[best_fixed]:.1f} times as slow as the fastest (`{best_fixed}`, the best of the
fixed ones). The outputs of all ways differ by at most {apart:.1e}.

The load average of the machine was {results["load_average"][0]:g} before and {results["load_average"][1]:g} after:
other work ran on it. On one machine nothing travels, and ranks share the cores: an overlap of exchange and product
cannot gain much, and the times that decide are noisy. On GPUs nothing was measured.
"""
    (folder / "README.md").write_text(text, encoding="utf-8")
