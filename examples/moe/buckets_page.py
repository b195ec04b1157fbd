"""Render the measurements of ``buckets.py`` as a page, from ``buckets.json``."""

from __future__ import annotations

import json
from pathlib import Path

COLUMNS = (
    "shape", "load", "static, peak", "static, C = 1.25", "dropped", "power of 2", "overflows", "captures",
    "multiple of 64", "overflows", "captures",
)  # fmt: skip
WAYS = ("buckets", "static", "product", "product, captured", "buckets, with captures")


def write(folder: Path) -> None:
    """Write ``README.md`` into the folder of ``buckets.json``."""
    results = json.loads((folder / "buckets.json").read_text(encoding="utf-8"))
    lines, timed = [], []
    for row in results["rows"]:
        peak, factor = row["static"]["peak"], row["static"]["factor"]
        power, fixed = row["buckets"]["power"], row["buckets"]["64"]
        lines.append(
            f"| {row['shape']} | {row['load']} | {peak['padding']:.0%} | {factor['padding']:.0%} | "
            f"{factor['dropped']:.1%} | {power['padding']:.0%} | {power['overflows']} | {power['captures']} | "
            f"{fixed['padding']:.0%} | {fixed['overflows']} | {fixed['captures']} |"
        )
        if row["times"]:
            cells = [f"{1e3 * row['times'][way]:,.0f}" for way in WAYS]
            error = f"{row['times']['relative_error']:.1e}"
            timed.append(f"| {row['shape']} | {row['load']} | " + " | ".join(cells) + f" | {error} |")
    text = f"""# DynaMoE: room that follows the load

Traces of {results["forwards"]} forwards of 512 tokens through one mixture layer. Loads: *even*; *skewed*, expert e in
proportion to 1 / (e + 1); *drifting*, the same with the experts rotated in {results["phases"]} phases. Made by
[examples/moe/buckets.py](../../../examples/moe/buckets.py).

## Padding

The share of computed rows that no token fills. *Static*: one capacity for all experts, either with room for the
busiest expert of the whole trace (nothing dropped), or C = {results["factor"]:g}, which drops. *Buckets*: `dynamoe`
with a window of {results["window"]}; an overflow is a forward that was computed without buckets, a capture makes a
graph.

| {" | ".join(COLUMNS)} |
| --- | --- |{" ---: |" * (len(COLUMNS) - 2)}
{chr(10).join(lines)}

Nothing is dropped with buckets. With 128 experts and 32 tokens of each on average, multiples of 64 pad most.
"""
    if timed:
        text += f"""
## Time

{results["device"]}, torch {results["torch"]}, bfloat16, microseconds of a forward, median of three runs of the trace;
the buckets include the host's reading of the loads after each replay. *Static* is the graph with room for the busiest
expert. *Product* is the layer without buckets (grouped, without padding). The last column of times starts without
graphs, so that it holds all captures of the trace. Error: of the buckets, relative to the product, largest of all
forwards. Rows that are not in the table were not measured.

| shape | load | {" | ".join(WAYS)} | error |
| --- | --- | {" | ".join("---:" for _ in WAYS)} | ---: |
{chr(10).join(timed)}
"""
    else:
        text += "\nTimes were not measured: that needs a GPU.\n"
    (folder / "README.md").write_text(text, encoding="utf-8")
