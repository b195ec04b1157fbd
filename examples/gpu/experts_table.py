"""Write the page of the experts' kernels from what ``experts.py`` has measured.

    PYTHONPATH=.:plugins:kernels python examples/gpu/experts_table.py model_cards/kernels/experts

The folder has ``layers-h200.json``, times of whole layers, and ``launches-h200.json``, those of each launch by its tiles.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from experts import SHAPES, TOKENS, _short

from hf_optim_kernels.experts import launch
from hf_optim_kernels.experts.naive import UNGATED

GOALS = {
    "qwen3-30b-a3b": {1: 27, 8: 140, 64: 350, 512: 360, 4096: 600},
    "mixtral": {1: 210, 8: 840, 64: 840, 512: 1000, 4096: 4600},
}
TEXT = """# Experts of a mixture

{device}, torch {torch}, triton {triton}; bfloat16, replayed CUDA graphs, weights outside of the L2 cache, random inputs and choices. Written by `examples/gpu/experts_table.py`
from what `examples/gpu/experts.py` has measured. A layer is a route, two products with the activation between, and the weighted sum; the linear layer of the router is not part of it.
Tiles were chosen by the first two shapes; the other three are held out.

## Whole layers

Microseconds. *torch* is two `torch.nn.functional.grouped_mm` and the activation, without sorting and summing. *floor* is the time to read the matrices of the experts that are hit
({bandwidth:.2f} TB/s), or to multiply ({rate:.0f} TFLOP/s), whichever is longer. These times are those of the **first** tiles; outputs differ from float64 by at most {error:.1e} (norm over norm, bfloat16), and
two runs have equal bits.

{whole}

Slower than torch's product: {losing}.

## Launches with the tiles that are used

Microseconds of each launch, with the tiles of `launch.plan`; *layer* is their sum or, where it was measured as a whole, the time of the layer. *goal* is what was set out to be reached.

{launches}

Missed: {missed}.

## Few tokens

Microseconds of whole layers by the two launches of decoding, and by grouped products. Decoding is used for one token, and while there are at most half as many pairs as experts.

{few}

## Not measured

Stock `generate` with these kernels, transformers' own functions in the same run, training, and whole layers with the tiles that are used beyond the rows above. The script has a section for each.
Layers in float32 and float16 were not timed. The errors above are those of decoding and of blocks of 16 to 64 rows that read their matrices through pointers. Configurations that read them
through tensor descriptors were timed here, not compared: each is compared with the specification before its first use on a device, and pointers are read where it differs.
"""


def table(header, rows):
    """A table in Markdown."""
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def tiles_used(name, tokens):
    """The tiles that a launch of each product has, and the rows of its blocks."""
    shape = SHAPES[name]
    gated = shape.gate.layout != UNGATED
    return launch.plan(tokens, shape.top_k, shape.experts, shape.inner, shape.d, shape.transposed, gated)


def measured(found, name, tokens, block, which, tiles):
    """The time of a launch, or None."""
    # The kernels of decoding share the experts of a token among as many programs as there are, whatever is larger.
    known = found["tiles"].get(str((name, tokens, block, which)), {})
    return known.get(_short(tiles)) or known.get(_short(tiles._replace(split=8)))


def main():
    folder = Path(sys.argv[1])
    layers, found = (json.loads((folder / f"{name}-h200.json").read_text()) for name in ("layers", "launches"))
    whole, losing, used, missed = [], [], [], []
    for key, row in layers["blocks"].items():
        name, tokens = key.rsplit(" ", 1)
        whole.append([name, tokens, f"**{row['ours']:.1f}**", f"{row['torch']:.1f}", f"{row['floor']:.1f}"])
        if row["ours"] > row["torch"]:
            losing.append(f"{name} at {tokens} tokens ({row['ours'] / row['torch']:.2f} times)")
    for name in SHAPES:
        for tokens in TOKENS:
            how = tiles_used(name, tokens)
            products = [measured(found, name, tokens, how.block, i, t) for i, t in enumerate((how.up, how.down))]
            parts = found["parts"].get(f"{name} {tokens}", {})
            whole_time = found["decode or blocks"].get(f"{name} {tokens}", {}).get("decode") if how.block == 0 else None
            rest = [0.0, 0.0] if how.block == 0 else [parts.get("route"), parts.get("combine")]
            times = [*products, *rest]
            total = whole_time or (sum(times) if None not in times else None)
            if total is None:
                continue
            goal = GOALS.get(name, {}).get(tokens)
            if goal and total > goal:
                missed.append(f"{name} at {tokens} tokens ({total:.0f} against {goal})")
            shown = ["-" if not t else f"{t:.1f}" for t in (rest[0], *products, rest[1])]
            label = "decode" if how.block == 0 else str(how.block)
            used.append(
                [name, str(tokens), label, *shown, f"**{total:.1f}**", str(goal or ""), "" if whole_time else "sum"]
            )
    few = [
        [*key.rsplit(" ", 1), f"{row['decode']:.1f}", f"{row['blocks']:.1f}"]
        for key, row in found["decode or blocks"].items()
    ]  # fmt: skip
    text = TEXT.format(
        **{key: layers[key] for key in ("device", "torch", "triton")}, bandwidth=layers["ceilings"]["bytes_us"] / 1e6,
        rate=layers["ceilings"]["flops_us"] / 1e6, error=max(row["error"] for row in layers["check"].values()),
        whole=table(("layer", "tokens", "ours", "torch", "floor"), whole), losing=", ".join(losing) or "none",
        launches=table(
            ("layer", "tokens", "rows of a block", "route", "up", "down", "sum over experts", "layer", "goal", ""), used
        ),
        missed=", ".join(missed) or "none", few=table(("layer", "tokens", "decoding", "grouped"), few),
    )  # fmt: skip
    (folder / "README.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
