"""Render the measurements of ``decoding.py`` as a page and a plot, from ``decoding.json``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

LINES = (("#888888", 1.5), ("#4c72b0", 4), ("#55a868", 1.5), ("#c44e52", 1.5), ("#8172b2", 4), ("#ccb974", 1.5))


def remark(results: dict[str, Any]) -> str:
    """Return what else decided the times."""
    load = f"{results['load_before']:.1f} before and {results['load_after']:.1f} after"
    if "NVIDIA" in results["device"]:
        return (
            "The host decides these times: it launches for longer than the device computes. In PyTorch 2.11\n"
            "transformers' products of a new token go to cuDNN, which plans each new number of keys; with\n"
            "`TORCH_CUDNN_SDPA_DEPRIORITIZED=1` its step takes 6 to 7 ms at every length. Ours do not ask cuDNN."
        )
    return f"The load average of the machine was {load}:\nother work ran on it, and shared its caches and memory."


def by_case(rows: list[dict[str, Any]]) -> dict[str, dict[int, dict[str, Any]]]:
    """Return the rows of each case by length."""
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for row in rows:
        found.setdefault(row["case"], {})[row["length"]] = row
    return found


def table(cases: dict[str, dict[int, dict[str, Any]]], lengths: list[int], field: str, scale: float) -> list[str]:
    """Return the lines of a table with a column for each length."""
    lines = [f"| | {' | '.join(f'{length:,}' for length in lengths)} |", f"|---|{'---:|' * len(lengths)}"]
    for name, rows in cases.items():
        lines.append(f"| {name} | {' | '.join(f'{rows[length][field] / scale:.2f}' for length in lengths)} |")
    return lines


def write(folder: Path) -> None:
    """Write ``README.md`` and, where matplotlib is installed, ``decoding.png`` into the folder of ``decoding.json``."""
    results = json.loads((folder / "decoding.json").read_text(encoding="utf-8"))
    cases = by_case(results["rows"])
    lengths = sorted({row["length"] for row in results["rows"]})
    shape, longest = results["shape"], lengths[-1]
    stock, first, *_, ours = cases.values()
    worst = max(results["differences"].values())
    told = max(row["bytes_told"] / row["bytes"] for row in results["rows"] if "bytes_told" in row)
    clock = ", of the process on one thread" if results["dtype"] == "float32" else ""
    text = f"""# Decoding under an attention pattern

One step of a Llama with random weights ({shape["layers"]} layers, hidden size {shape["hidden_size"]},
{shape["num_attention_heads"]} heads, {shape["num_key_value_heads"]} of keys, {results["dtype"]}) after a context of so
many tokens, on {results["device"]}, torch {results["torch"]}, transformers {results["transformers"]}. Made by
[examples/attention/decoding.py](../../../examples/attention/decoding.py).

The cache of a pattern holds the keys that a later token can see, and a step gathers the keys that its token sees. Under
`strided`, every key is seen by some later token, so all are held and few are read. Full attention is shown twice:
transformers appends a token by copying the cache, and ours has free slots.

Milliseconds of a step{clock} (the median of {results["timed"]}):

{chr(10).join(table(cases, lengths, "ms", 1))}

MiB of the cache, with its free slots:

{chr(10).join(table(cases, lengths, "bytes", 2**20))}

At {longest:,} tokens, a window takes {first[longest]["ms"] / stock[longest]["ms"]:.2f} of the time of full attention in
transformers, {first[longest]["ms"] / ours[longest]["ms"]:.2f} of that with free slots, and
{first[longest]["bytes"] / stock[longest]["bytes"]:.3f} of the memory. When rows are decoded token
by token, the logits differ from those of the whole row by at most {worst:.1e} of the largest.
`hf_optim.cache_size` tells at most {told:.2f} times the bytes that are held: it counts the most at any time up to a
length.

![Milliseconds of a step and MiB of the cache by the length of the context](decoding.png)

{remark(results)}
"""
    (folder / "README.md").write_text(text, encoding="utf-8")
    try:
        plot(folder / "decoding.png", cases)
    except ImportError:
        print("matplotlib is not installed: no plot was drawn")


def plot(path: Path, cases: dict[str, dict[int, dict[str, Any]]]) -> None:
    """Draw time and bytes against the length, both logarithmic."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    panels = (("milliseconds of a step", "ms", 1), ("MiB of the cache", "bytes", 2**20))
    for number, (title, field, scale) in enumerate(panels):
        axes = figure.add_subplot(1, 2, number + 1)
        # Lines that lie on each other are told apart by their width.
        for (colour, width), (name, rows) in zip(LINES, cases.items(), strict=False):
            values = [row[field] / scale for row in rows.values()]
            axes.plot(list(rows), values, marker="o", markersize=3.5, color=colour, linewidth=width, label=name)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(list(rows), [f"{length // 1024}k" for length in rows])
        axes.yaxis.set_major_formatter("{x:g}")
        axes.set_xlabel("tokens of context", fontsize=9)
        axes.set_title(title, fontsize=10, loc="left")
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[1].legend(fontsize=7.5, frameon=False)
    figure.savefig(path, dpi=110)
