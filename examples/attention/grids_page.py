"""Render the measurements of ``grids.py`` as a page and a plot, from ``grids.json``.

python examples/attention/grids_page.py model_cards/attention
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from statistics import mean
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from hf_optim.evaluation.cards.plots import COLOURS

SCRIPT = "examples/attention/grids.py"
NAMES = {
    "full": "full attention",
    "layers": "axial by layer",
    "heads": "axial by head",
    "union": "axial, both in a head",
}


def accuracies(results: Mapping[str, Any]) -> list[str]:
    """Return the lines of the table of trained vision transformers."""
    lines = []
    for axes, name in NAMES.items():
        rows = [row for row in results["axial"]["rows"] if row["axes"] == axes]
        lines.append(f"| {name} | {rows[0]['pairs']:,} | {mean(row['accuracy'] for row in rows):.3f} |")
    return lines


def sizes(results: Mapping[str, Any]) -> list[str]:
    """Return the lines of the table of times."""
    lines = []
    for row in results["times"]["rows"]:
        cells = [f"{row['times'][axes]['median']:.1f}" for axes in NAMES]
        least = row["times"]["full"]["median"] / min(row["times"][axes]["median"] for axes in ("layers", "heads"))
        pairs = row["pairs"]["full"] / row["pairs"]["layers"]
        lines.append(f"| {row['side']} x {row['side']} | {' | '.join(cells)} | {pairs:.1f} | {least:.1f} |")
    return lines


def strides(results: Mapping[str, Any]) -> list[str]:
    """Return the lines of the table of compressed language models."""
    rows = results["compressed"]["rows"]
    lines = []
    for row in rows:
        name = "1 (dense)" if row["stride"] == 1 else str(row["stride"])
        share = row["cache_bytes"] / rows[0]["cache_bytes"]
        pairs = row.get("share_of_attention", 1.0)
        lines.append(
            f"| {name} | {row['local']} | {row['cache_bytes']:,} | {share:.2f} | {pairs:.2f} | {row['before']:.2f} | "
            f"{row['after']:.2f} |"
        )
    return lines


def draw(results: Mapping[str, Any], path: Path) -> None:
    """Draw time against image size, and perplexity against the bytes of the cache."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    rows = results["times"]["rows"]
    for colour, (axes, name) in zip(COLOURS, NAMES.items(), strict=False):
        left.plot(
            [row["tokens"] for row in rows],
            [row["times"][axes]["median"] for row in rows],
            "o-",
            color=colour,
            label=name,
        )
    left.set(xscale="log", yscale="log", xlabel="tokens of an image", ylabel="ms for a forward of two layers (CPU)")
    left.legend(frameon=False)
    left.set_title("Vision transformer of 48 channels")
    shown = results["compressed"]["rows"]
    for colour, key, name in zip(COLOURS, ("before", "after"), ("converted", "after the recovery"), strict=False):
        right.plot([r["cache_bytes"] / 1024 for r in shown], [r[key] for r in shown], "o", color=colour, label=name)
    for row in shown:
        text = "dense" if row["stride"] == 1 else f"c = {row['stride']}"
        text += f"\nlocal {row['local']}" if row["local"] else ""
        place = (row["cache_bytes"] / 1024, max(row["before"], row["after"]))
        right.annotate(text, place, textcoords="offset points", xytext=(0, 7), fontsize=8, ha="center")
    right.set(xlabel="KiB of cache for 256 tokens", ylabel="perplexity on held-out stories", yscale="log")
    ticks = [2, 3, 4, 6, 8, 12]
    right.set_yticks(ticks, [str(tick) for tick in ticks])
    right.minorticks_off()
    right.margins(y=0.12)
    right.legend(frameon=False, loc="center right")
    right.set_title("babyllama-1m, compressed keys and values")
    FigureCanvasAgg(figure).print_png(path)


def page(results: Mapping[str, Any]) -> str:
    """Return the text of the page."""
    axial, time, language, positions = (results[part] for part in ("axial", "times", "compressed", "positions"))
    scaled = [f"| `{row['method']}` | {row['short']:.2f} | {row['long']:.2f} |" for row in positions["rows"]]
    loads = [row["load"] for row in time["rows"]]
    newline, seeds = "\n", len({row["seed"] for row in axial["rows"]})
    return f"""# Axial and compressed attention, and longer positions

Made by [{SCRIPT}](../../{SCRIPT}).

## Axial: vision transformers

CIFAR-10, {axial["train_images"]:,} training and {axial["test_images"]:,} test images; {axial["depth"]} layers of width
{axial["width"]}, 8 x 8 patches and a class token, {axial["steps"]} steps of {axial["batch"]} images from scratch, equal
weights and batches for each; {seeds} seed, so that the standard error of an accuracy is 0.010 at least. Pairs are those
of a layer, the mean over heads and two layers.

| attention | pairs of tokens | accuracy |
| --- | ---: | ---: |
{newline.join(accuracies(results))}

A forward of {time["layers"]} layers of width {time["width"]} for one image, {time["threads"]} CPU thread, milliseconds
(median of {time["repeats"]} or more, models in turn). The machine had a load of {min(loads):.1f} to {max(loads):.1f}
from other work: times below 20 ms are uncertain by slices of about 10 ms. The last columns are ratios of full to axial
attention: in pairs by layer, and in the time of the faster of the two that see one axis.

| patches | {" | ".join(NAMES.values())} | pairs | time |
| --- | {"---: | " * len(NAMES)}---: | ---: |
{newline.join(sizes(results))}

## Compressed: babyllama-1m

Perplexity on {language["held_out_tokens"]:,} held-out tokens of TinyStories in windows of {language["context"]};
converted with convolutions that are means, then trained for {language["steps"]} steps of {language["batch"]} windows
with the stock Trainer. The dense model was trained in the same way, as a control. Bytes are those that a row of
{language["context"]} tokens leaves in the cache.

| stride c | local | cache bytes | of dense | pairs of dense | converted | after training |
| --- | ---: | ---: | ---: | ---: | ---: | ---: |
{newline.join(strides(results))}

What lies near matters most: with the last 16 tokens as they are, a conversion costs a small part of what it costs
without, before any training. The training is short, on few stories; what it costs the control is its own effect. The
model reads characters, so a window of 4 is less than a word.

![Time against image size; perplexity against cache](grids.png)

## Longer positions: babyllama-1m without training

Perplexity on {positions["held_out_tokens"]:,} held-out tokens, in windows of its context of {positions["context"]} and
of {positions["length"]} tokens.

| method | windows of {positions["context"]} | windows of {positions["length"]} |
| --- | ---: | ---: |
{newline.join(scaled)}
"""


def main(folder: Path) -> None:
    """Write ``grids.md`` and ``grids.png`` beside ``grids.json``."""
    results = json.loads((folder / "grids.json").read_text(encoding="utf-8"))
    draw(results, folder / "grids.png")
    (folder / "grids.md").write_text(page(results), encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="holds grids.json, and gets the page and its plot")
    main(parser.parse_args().folder)
