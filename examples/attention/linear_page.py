"""Render the measurements of ``linear.py`` as a page, from ``linear.json``.

python examples/attention/linear_page.py model_cards/attention
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from statistics import mean
from typing import Any

NAMES = {
    "performer": "`performer`",
    "independent": "`performer`, rows of W not orthogonal",
    "rfa": "`rfa`",
    "softmax": "softmax attention of PyTorch",
}


def page(results: Mapping[str, Any]) -> str:
    """Return the page; parts that were not run are left out."""
    parts = [
        "# Attention by random features\n\nMade by [examples/attention/linear.py](../../examples/attention/linear.py). "
        "[What the techniques do](../../docs/learned-attention.md#performer).\n"
    ]
    parts += [write(results[name]) for name, write in PARTS.items() if name in results]
    return "\n".join(parts)


def errors(part: Mapping[str, Any]) -> str:
    """Return the section on errors."""
    lines = [
        f"| {NAMES[name]} | {' | '.join(f'{each:.4f}' for each in row)} | {part['slopes'][name]:.3f} |"
        for name, row in part["errors"].items()
    ]
    heads = " | ".join(f"{count:,}" for count in part["counts"])
    return f"""## Error

Root mean square error of causal attention over 64 tokens against the softmax attention that is estimated, as a share of
its own root mean square, by number of features; over {part["draws"]} draws of the features, in float64. The last column
is the slope on logarithms: -0.5 is one over the root of the features. The input is one draw of normal numbers; heads
are 32 wide, queries and keys of `performer` a third of normal, those of `rfa` unit vectors with logits between -0.5
and 0.5. Larger queries and keys need more features.

| | {heads} | slope |
|---|{"---:|" * (len(part["counts"]) + 1)}
{chr(10).join(lines)}
"""


def times(part: Mapping[str, Any]) -> str:
    """Return the section on times."""
    names = list(part["exponents"])
    lines = []
    for row in part["rows"]:
        cells = [f"{row['ms'][name]:.0f}" for name in names]
        lines.append(f"| {row['length']:,} | {' | '.join(cells)} |")
    last = " | ".join(f"{part['exponents'][name]:.2f}" for name in names)
    features = ", ".join(f"{count} of `{name}`" for name, count in part["features"].items())
    return f"""## Time on a CPU

Milliseconds of one causal attention of {part["heads"]} heads of {part["width"]} in float32, forward, by length: CPU
time of one thread, medians of {part["repeats"]} in turn, in plain PyTorch. Features: {features}.

| tokens | {" | ".join(NAMES[name] for name in names)} |
|---|{"---:|" * len(names)}
{chr(10).join(lines)}
| exponent from 4,096 on | {last} |
"""


def study(part: Mapping[str, Any]) -> str:
    """Return the section on the language model."""
    lines = []
    for method, distill in dict.fromkeys((row["method"], row["distill"]) for row in part["rows"]):
        rows = [row for row in part["rows"] if (row["method"], row["distill"]) == (method, distill)]
        before, after = (mean(row[when] for row in rows) for when in ("before", "after"))
        errors = "".join(
            f" | {mean(row[e] for row in rows):.2f}" for e in ("error_before", "error_after") if e in rows[0]
        )
        lines.append(f"| {method} | {distill}{errors or ' | | '} | {before:.2f} | {after:.2f} |")
    return f"""## A language model

babyllama-1m (8 heads of 16, 256 tokens), converted and trained for {part["steps"]} steps of {part["batch"]} windows of
{part["context"]} tokens of TinyStories, those of distillation included; perplexity on {part["held_out_tokens"]:,}
held-out tokens, as converted (and distilled) and after training, means over {len(part["seeds"])} seed(s). *Error*:
squared difference of the outputs of attention from those of the dense model, as a share of their squares.

| attention | steps of distillation | error before | after | perplexity before | after |
|---|---:|---:|---:|---:|---:|
{chr(10).join(lines)}
"""


PARTS = {"errors": errors, "times": times, "study": study}


def main(folder: Path) -> None:
    results = json.loads((folder / "linear.json").read_text(encoding="utf-8"))
    (folder / "linear.md").write_text(page(results), encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="holds linear.json, and gets the page")
    main(parser.parse_args().folder)
