"""Write the page of the experts' kernels from what ``experts.py`` has measured.

    PYTHONPATH=.:plugins:kernels python examples/gpu/experts_table.py model_cards/kernels/experts

The folder has ``layers-h200.json``, times of whole layers, ``launches-h200.json``, those of each launch by its tiles,
and ``generate-h200.json``, those of ``generate``; ``prefill-h200.json`` and ``prefill-flat-h200.json`` are what two
kernels for many tokens have taken beside the ones that are used. ``training-h200.json`` may be there, too.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from experts_cases import SHAPES, TOKENS
from experts_tiles import short_name
from experts_training_table import kernels_of_a_token, training

from hf_optim_kernels.experts import launch
from hf_optim_kernels.experts.naive import UNGATED

GOALS = {
    "qwen3-30b-a3b": {1: 27, 8: 140, 64: 350, 512: 360, 4096: 600},
    "mixtral": {1: 210, 8: 840, 64: 840, 512: 1000, 4096: 4600},
}
# How often stock ``generate`` with a static cache was to be beaten.
GENERATE_GOAL = 4
WAYS = {
    "stock, eager": "stock `generate`, static cache, not compiled",
    "stock": "stock `generate`, static cache",
    "accelerated": "the same after `hf_optim.accelerate`",
    "door, captured": "`hf_optim.generate`, captured, not compiled",
    "door": "`hf_optim.generate`",
    "door, choices in one launch": "`hf_optim.generate`, with choices of experts in one launch",
}
PRODUCTS = {"up": "first", "down": "second"}
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

## Generate

Milliseconds a token of a model of 12 layers of Qwen3-30B-A3B's shape (random weights, bfloat16, batch 1, 128 tokens of context; [generate-h200.json](generate-h200.json), `examples/gpu/experts.py generate`). Its
weights that a token reads are {read:.2f} GB, {read_ms:.2f} ms.

{generate}

Goal: {generate_goal} times stock in stock `generate`. **{generate_verdict}**: transformers compiles the step with a static cache and replays it as CUDA graphs, so its experts cost far less than as eager functions, by which the goal was
set; what is left is the host between two steps. Beside stock without compiling, the kernels in stock `generate` are {eager_accelerated:.1f} times as fast, and `hf_optim.generate` {eager_door:.1f} times.

{token_kernels}{training}## Many tokens, and what was tried

Microseconds of whole layers with the tiles that are used, beside *taken along*, the first of two kernels that were tried ([prefill-h200.json](prefill-h200.json)).

{many}

Slower than torch's product with the tiles that are used: {many_losing}. *Taken along* was faster in {faster}. This machine was slower than the one of the launches above; goals are missed on both.
Neither the whole layer nor the sum of its launches is always the longer: the sums are {sums}, with the products of the same run, and the route and the sum over experts of the other.

Half of the experts have a few rows more than whole blocks, and these few cost a block. Two kernels multiplied at most 16 or 32 such rows together with the block before, so that the matrix is read once for both:

- *Taken along*: the tile of the matrix goes through registers to be the left operand of the short block's product.
- *Flat* ([prefill-flat-h200.json](prefill-flat-h200.json)): the matrices of all experts are described as one list of rows, so that both products read their operands from shared memory, and gate and up have a
  tile each; with and without taking rows along. The run ended after the launches of Qwen3's shape: no other shape, and no whole layer, was timed.

Both were right ({prefill_error:.1e} beside float64 on the five shapes, two runs with equal bits). Microseconds of a product of 4,096 tokens, the fastest and the slowest of the tiles that were compared in one run:

{tried}

Both products together, with the fastest tiles of each: {together}. The shapes are those by which the tiles were chosen, and the second product gains no more than runs differ by: with the tiles that are used, Qwen3's took {runs} in three of them.
Neither kernel pays for its code. Both were deleted; no plan used them.

## Not measured

Transformers' own functions in the same run{no_training}{no_choices}, and whole layers of fewer than 2,048 tokens with the tiles that are used beyond the rows above. The script has a section for each.
Layers in float32 and float16 were not timed. The errors in the first section are those of decoding and of blocks of 16 to 64 rows that read their matrices through pointers. Configurations that read them
through tensor descriptors are compared with float64 for blocks of 128 rows only; each one is compared with the specification before its first use on a device, and pointers are read where it differs.
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
    return known.get(short_name(tiles)) or known.get(short_name(tiles._replace(split=8)))


def bytes_read(layers=12, vocabulary=151936, heads=(32, 4, 4), head=128):
    """Bytes of the weights that a token reads in the model of ``experts_generate.py``: bfloat16, without norms."""
    shape = SHAPES["qwen3-30b-a3b"]
    attention = shape.d * head * (heads[0] * 2 + heads[1] + heads[2])
    experts = shape.top_k * 3 * shape.d * shape.inner + shape.experts * shape.d
    return 2 * (layers * (attention + experts) + vocabulary * shape.d)


def generated(found):
    """What the page says of ``generate``."""
    token = {way: row["ms_token"] for way, row in found["generate"].items()}
    rows = []
    for way, label in WAYS.items():
        if way not in token:  # of an earlier script
            continue
        first = found["generate"][way]["first_calls_s"][0]
        rows.append([label, f"{token[way]:.2f}", f"{first:.1f}", f"**{token['stock'] / token[way]:.2f}**"])
    reached = token["stock"] / token["accelerated"] >= GENERATE_GOAL
    header = ("way", "ms a token", "first call, s", "stock with a static cache over it")
    return {
        "no_choices": "" if "door, choices in one launch" in token else ", `generate` with choices of experts in one launch",
        "generate": table(header, rows), "generate_goal": GENERATE_GOAL,
        "generate_verdict": "Reached" if reached else "Missed",
        "eager_accelerated": token["stock, eager"] / token["accelerated"], "eager_door": token["stock, eager"] / token["door"],
    }  # fmt: skip


def many_tokens(found, first):
    """What the page says of whole layers of many tokens: ``first`` is the record of the first kernel tried."""
    rows, losing, faster, sums = [], [], [], []
    for key, row in first["layers"].items():
        name, tokens = key.rsplit(" ", 1)
        goal = GOALS.get(name, {}).get(int(tokens))
        times = [f"{row[way]:.0f}" for way in ("now", "taken along", "torch", "floor")]
        rows.append([name, tokens, f"**{times[0]}**", *times[1:], str(goal or "")])
        where = f"{name} at {tokens} tokens"
        if row["now"] > row["torch"]:
            losing.append(f"{where} ({row['now'] / row['torch']:.2f} times)")
        if row["taken along"] < row["now"]:
            faster.append(f"{where} ({row['taken along'] / row['now']:.2f} times)")
        if goal:
            how = tiles_used(name, int(tokens))
            parts = [
                first["launches"][f"{name} {which} {short_name(t)}"] for which, t in zip(PRODUCTS, how[1:], strict=True)
            ]
            total = sum(parts) + sum(found["parts"][key].values())
            sums.append(f"{total:.0f} for {row['now']:.0f} ({name})")
    return {
        "many": table(("layer", "tokens", "ours", "taken along", "torch", "floor", "goal"), rows),
        "many_losing": ", ".join(losing) or "none", "faster": ", ".join(faster) or "no row", "sums": " and ".join(sums),
    }  # fmt: skip


def kernels_tried(found, first, second):
    """What the page says of products by the two kernels that were tried, from the record of each."""
    rows, together = [], []
    for kernel, record in (("taken along", first), ("flat", second)):
        for name in GOALS:
            best = []
            for which, label in PRODUCTS.items():
                start = f"{name} {which} "
                times = {key[len(start) :]: us for key, us in record["launches"].items() if key.startswith(start)}
                own = [us for tiles, us in times.items() if "tail=" in tiles or "flat=" in tiles]
                now = [us for us in times.values() if us not in own]
                if own:
                    spans = [f"{min(group):.0f} to {max(group):.0f}" for group in (now, own)]
                    rows.append([kernel, name, label, *spans, f"{min(own) / min(now):.2f}"])
                    best.append((min(own), min(now)))
            if best:
                tried, usual = map(sum, zip(*best, strict=True))
                together.append(f"{name} {tried:.0f} {kernel} and {usual:.0f} without")
    name, tiles = "qwen3-30b-a3b", tiles_used("qwen3-30b-a3b", 4096).down
    runs = [measured(found, name, 4096, 128, 1, tiles)]
    runs += [record["launches"][f"{name} down {short_name(tiles)}"] for record in (first, second)]
    errors = [error for record in (first, second) for row in record["check"].values() for error, _ in row.values()]
    return {
        "tried": table(("kernel", "layer", "product", "tiles that exist", "tried", "fastest over fastest"), rows),
        "together": "; ".join(together), "runs": "{:.0f}, {:.0f} and {:.0f}".format(*runs), "prefill_error": max(errors),
    }  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="holds the records, and gets the page")
    folder = parser.parse_args().folder
    names = ("layers", "launches", "generate", "prefill", "prefill-flat")
    layers, found, generate, *tried = (json.loads((folder / f"{name}-h200.json").read_text()) for name in names)
    trained = json.loads(path.read_text()) if (path := folder / "training-h200.json").exists() else {}
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
                other = tried[0]["layers"].get(f"{name} {tokens}")
                again = f"; {other['now']:.0f} as a whole in another run" if other else ""
                last = trained.get("launches of whole layers", {}).get(name) if tokens == 4096 else None
                again += f", {last['whole']:.0f} in a third" if other and last else ""
                missed.append(f"{name} at {tokens} tokens ({total:.0f} against {goal}{again})")
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
        token_kernels=kernels_of_a_token(generate, table),
        training=training(trained, table, GOALS), no_training="" if "training" in trained else ", times of training",
        **{key: layers[key] for key in ("device", "torch", "triton")}, bandwidth=layers["ceilings"]["bytes_us"] / 1e6,
        rate=layers["ceilings"]["flops_us"] / 1e6, error=max(row["error"] for row in layers["check"].values()),
        whole=table(("layer", "tokens", "ours", "torch", "floor"), whole), losing=", ".join(losing) or "none",
        launches=table(
            ("layer", "tokens", "rows of a block", "route", "up", "down", "sum over experts", "layer", "goal", ""), used
        ),
        missed=", ".join(missed) or "none", few=table(("layer", "tokens", "decoding", "grouped"), few),
        read=bytes_read() / 1e9, read_ms=bytes_read() / layers["ceilings"]["bytes_us"] / 1e3, **generated(generate),
        **many_tokens(found, tried[0]), **kernels_tried(found, *tried),
    )  # fmt: skip
    (folder / "README.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
