"""Render the measurements of ``sparse_projections.py`` and ``terraformer.py`` as a page and a plot.

python examples/sparsity/scaling_page.py model_cards/sparsity
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

PAPER = {"dense": 1.0, "sparse FFN": 20.0, "sparse FFN and QKV": 37.0}  # 17 billion weights, on a CPU, batch 1


def page(projections: Mapping[str, Any], terraformer: Mapping[str, Any]) -> str:
    """Return the page; parts that were not run are left out."""
    parts = [
        "# The attention of the Scaling Transformer, and Terraformer\n\nMade by "
        "[sparse_projections.py](../../examples/sparsity/sparse_projections.py) and "
        "[terraformer.py](../../examples/sparsity/terraformer.py). "
        "[What the techniques do](../../docs/scaling-transformer.md).\n",
    ]
    parts += [losses(projections)] if "loss" in projections else []
    parts += [times(projections["times"])] if "times" in projections else []
    parts += [decoding(terraformer["decoding"])] if "decoding" in terraformer else []
    parts += [memory(terraformer["memory"])] if "memory" in terraformer else []
    return "\n".join(parts)


def losses(part: Mapping[str, Any]) -> str:
    """Return the section on losses."""
    lines = []
    for name, loss in part["loss"].items():
        each = [row["loss"] for row in part["rows"] if row["variant"] == name]
        spread = f" ({min(each):.3f} to {max(each):.3f})" if len(each) > 1 else ""
        weights = f"{part['weights'][name]:,} | {part['weights_of_attention'][name]:,}"
        lines.append(f"| {name} | {weights} | {loss:.3f}{spread} |")
    seeds = len({row["seed"] for row in part["rows"]})
    several = f"means over {seeds} seeds" if seeds > 1 else "one seed"
    return f"""## Loss at equal steps

Decoders of 4 layers, 128 wide, 8 heads, trained from scratch on TinyStories for {part["steps"]} steps of
{part["tokens_of_a_step"]:,} tokens, all on the same ones; loss of a held-out token, {several}. 8 modules; no output
projection but in the dense model. The Terraformer has blocks of 16 units of 352, LSH attention in chunks of 32,
reversible layers and a recurrence of 32. With a large start, values and recurrences are drawn as the authors draw them
(`small_start: false`), beside embeddings that are drawn as in Llama: the tokens drown, and the model learns their
frequencies alone.

| | weights | of attention | loss |
|---|---:|---:|---:|
{chr(10).join(lines)}
"""


def times(part: Mapping[str, Any]) -> str:
    """Return the section on times."""
    names = {"training": "training step", "prefill": "prefill", "decode": "one token"}
    lines = [
        f"| {text} | {1000 * part[what]['dense']:.1f} | {1000 * part[what]['sparse']:.1f} | "
        f"{part['ratios'][what]:.2f} |"
        for what, text in names.items()
    ]
    own = part["weights_of_attention"]
    return f"""## Time on a CPU

Milliseconds of one thread, float32, random weights: {part["layers"]} layers, {part["width"]:,} wide, feed-forward
layers of {2 * part["width"]:,}; {part["modules"]} modules; {part["tokens"]} tokens in a training step and a prefill.
Attention has {own["dense"]:,} weights, and {own["sparse"]:,} with sparse projections.

| | dense | sparse | ratio |
|---|---:|---:|---:|
{chr(10).join(lines)}
"""


def decoding(part: Mapping[str, Any]) -> str:
    """Return the section on decoding."""
    lines = [
        f"| {name} | {1000 * row['seconds']:.1f} | {row['times_as_fast']:.1f} | "
        f"{row['bytes_of_blocks'] / 2**20:,.0f} | {row['bytes_less']:.1f} |"
        for name, row in part["rows"].items()
    ]
    return f"""## Decoding by what is made sparse

One token behind a prompt of 64, batch 1, float32, one thread of a CPU: {part["layers"]} layers, {part["width"]:,} wide,
{part["units"]:,} gated units, {part["heads"]} heads; blocks of 64 units, 16 modules. Weights are random: time does not
depend on them. The paper has 20 and 37 for 17 billion weights, and 2.6 for 800 million.

![Times as fast as the dense model](terraformer.png)

| | ms | times as fast | MiB of weights read in blocks | times fewer |
|---|---:|---:|---:|---:|
{chr(10).join(lines)}

Bytes fall as the method says, times less: what is left is the launch of some hundred small operations for each token,
which does not shrink. LSH attention and the recurrence add operations, and save nothing at this length.
"""


def memory(part: Mapping[str, Any]) -> str:
    """Return the section on memory."""
    names = {"dense": "dense", "stored": "Terraformer, activations stored", "reversible": "Terraformer"}
    lines = [f"| {text} | {' | '.join(f'{each:.0f}' for each in part[name])} |" for name, text in names.items()]
    heads = " | ".join(str(depth) for depth in part["depths"])
    return f"""## Memory of training by depth

MiB by which the memory of a process grows at most in a forward and a backward, weights and gradients left out: 4 rows
of 512 tokens, 64 wide, by number of layers.

| layers | {heads} |
|---|{"---:|" * len(part["depths"])}
{chr(10).join(lines)}
"""


def plot(part: Mapping[str, Any], path: Path) -> None:
    """Draw how many times as fast as the dense model a token is, by what is made sparse."""
    from hf_optim.evaluation.cards.plots import COLOURS, _canvas, save

    figure, axes = _canvas()
    names = list(part["rows"])
    ours = [part["rows"][name]["times_as_fast"] for name in names]
    fewer = [part["rows"][name]["bytes_less"] for name in names]
    for shift, values, text, colour in (
        (-0.27, ours, "time, measured here", COLOURS[0]),
        (0.0, fewer, "bytes of weights, here", COLOURS[4]),
        (0.27, [PAPER.get(name) for name in names], "time in the paper, 17 billion weights", COLOURS[1]),
    ):
        for place, value in enumerate(values):
            if value is not None:
                axes.bar(place + shift, value, 0.25, color=colour, label=text if place == 0 else None)
                axes.annotate(f"{value:.1f}", (place + shift, value), ha="center", va="bottom", fontsize=8)
    axes.set_xticks(range(len(names)), names, fontsize=8)
    axes.set_ylabel("times as fast, or fewer, than dense", fontsize=9)
    axes.set_title("Decoding one token by what is made sparse", fontsize=10, loc="left")
    axes.legend(fontsize=8, frameon=False, loc="upper left")
    save(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="holds the two records, and gets the page and its plot")
    home = parser.parse_args().folder
    projections, terraformer = (
        json.loads((home / f"{name}.json").read_text(encoding="utf-8"))
        for name in ("sparse_projections", "terraformer")
    )
    (home / "scaling.md").write_text(page(projections, terraformer), encoding="utf-8")
    plot(terraformer["decoding"], home / "terraformer.png")
    print(home / "scaling.md")


if __name__ == "__main__":
    main()
