"""Render the measurements of ``clusters.py`` as a page, from ``clusters.json``.

python examples/attention/clusters_page.py model_cards/attention
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

SCRIPT = "examples/attention/clusters.py"
WAYS = ("full", "routing_transformer", "sinkhorn")


def timed(results: Mapping[str, Any], causal: bool) -> list[str]:
    """Return the lines of a table of times."""
    rows = [row for row in results["times"]["rows"] if row["causal"] is causal]
    lines = [f"| {row['length']:,} | " + " | ".join(f"{row['times'][way]:,.0f}" for way in WAYS) + " |" for row in rows]
    slopes = results["times"]["exponents"]["causal" if causal else "both sides"]
    return [*lines, "| exponent | " + " | ".join(f"{slopes[way]:.2f}" for way in WAYS) + " |"]


def named(row: Mapping[str, Any]) -> str:
    """Return what a row of the table of models is called."""
    name, _, more = row["model"].partition(", ")
    return (f"`{name}`" if row["step"] else name) + (f", {more}" if more else "")


def page(results: Mapping[str, Any]) -> str:
    """Return the text of the page."""
    times, quality = results["times"], results["quality"]
    newline = "\n"
    rows = [f"| {named(row)} | {row['before']:.2f} | {row['after']:.2f} |" for row in quality["rows"]]
    table = "| tokens | full attention | `routing_transformer` | `sinkhorn` |\n| ---: | ---: | ---: | ---: |"
    return f"""# Attention within clusters and to sorted blocks

Made by [{SCRIPT}](../../{SCRIPT}).

## Time

One attention of {times["heads"]} heads of width {times["width"]} over one row, {times["threads"]} CPU thread:
milliseconds of CPU time, the median of {times["repeats"]}, in turn with PyTorch's own attention, while other work used
the machine. `routing_transformer` has 16 clusters and windows of 128 tokens, `sinkhorn` blocks of 64. The last row is
the exponent of the length that fits the lengths from 4,096 on.

Causal:

{table}
{newline.join(timed(results, True))}

Both sides, where 16 clusters of 128 tokens hold 2,048 at most: in longer rows the others are in no cluster, and their
output is 0, so that the time hardly grows. A model of longer rows has more clusters or larger windows.

{table}
{newline.join(timed(results, False))}

## Quality: babyllama-1m

Perplexity on {quality["held_out_tokens"]:,} held-out tokens of TinyStories in windows of {quality["context"]};
converted, then trained for {quality["steps"]} steps of {quality["batch"]} windows with the stock Trainer. The dense
model was trained in the same way, as a control. Routing has 8 clusters and windows of 32 tokens, centroids fitted to 8
training windows; sorted blocks have 32 tokens.

| model | converted | after training |
| --- | ---: | ---: |
{newline.join(rows)}

The training is short, on few stories; what it costs the control is its own effect.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="holds clusters.json, and gets the page")
    folder = parser.parse_args().folder
    results = json.loads((folder / "clusters.json").read_text(encoding="utf-8"))
    (folder / "clusters.md").write_text(page(results), encoding="utf-8")


if __name__ == "__main__":
    main()
