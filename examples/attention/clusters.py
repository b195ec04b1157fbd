"""Attention within clusters and to sorted blocks: time by length, and a language model that is converted.

    python examples/attention/clusters.py --shared ../shared --output model_cards/attention
    python examples/attention/clusters.py --shared ../shared --output clusters --recovery 5 --longest 4096  # a trial
    python examples/attention/clusters_page.py model_cards/attention

1. ``times``: the median CPU time of one attention of 4 heads of width 64, in turn with PyTorch's own attention, and
   the exponent of the length that fits the lengths from 4,096 on.
2. ``quality``: babyllama-1m is converted and trained for a short recovery on stories, as a dense control is:
   perplexity on held-out stories before and after.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from stories import CONTEXT, perplexity, recovered, windows
from torch import nn
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_optim
from hf_optim.toolkit.attention import Call
from hf_optim_plugins.attention._routed_model import ATTACHMENT
from hf_optim_plugins.attention._sinkhorn_model import SORTED

HEADS, WIDTH = 4, 64
LENGTHS = (1024, 2048, 4096, 8192, 16384)
ROUTED = {"technique": "routing_transformer", "clusters": 8, "window": 32}
SORTED_BLOCKS = {"technique": "sinkhorn", "block": 32}
MODELS: dict[str, dict[str, Any]] = {
    "dense": {},
    "routing_transformer": ROUTED,
    "routing_transformer, fit: keys": {**ROUTED, "fit": "keys"},
    "routing_transformer, fit: keys, all heads routed": {**ROUTED, "fit": "keys", "local_heads": 0},
    "sinkhorn": SORTED_BLOCKS,
    "sinkhorn, cumulative": {**SORTED_BLOCKS, "prefix": "cumulative"},
    "sinkhorn, the paper's network": {**SORTED_BLOCKS, "sorter": "linear", "summary": "sum", "prefix": "cumulative"},
}


def attentions(causal: bool) -> dict[str, Any]:
    """Return the parts of one attention of each kind."""
    routing = {
        "form": "last" if causal else "top", "clusters": 16, "window": 128, "local_heads": 0, "local_window": 128,
        "normalize": "layer_norm", "scores": "model", "keys": "own", "unrouted": "zero", "fit": "both", "decay": 0.999,
        "commitment": 0.0, "seed": 0, "key_heads": HEADS, "head_width": WIDTH,
    }  # fmt: skip
    sorting = {
        "block": 64, "blocks": 0, "sorter": "attention", "summary": "mean", "prefix": "first", "positive": "exp",
        "temperature": 0.75, "iterations": 8, "noise": 0.0, "cut": 0, "seed": 0, "key_heads": HEADS,
        "head_width": WIDTH,
    }  # fmt: skip
    made = {"routing_transformer": (ATTACHMENT, routing), "sinkhorn": (SORTED, sorting)}
    return {name: (one, one.build_part(settings, 0).eval()) for name, (one, settings) in made.items()}  # type: ignore[union-attr]


@torch.no_grad()
def times(length: int, causal: bool, repeats: int) -> dict[str, float]:
    """Return the median milliseconds of CPU time of each attention over one row of random queries, keys and values."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, HEADS, length, WIDTH, generator=generator) for _ in range(3))
    call = Call(
        module=nn.Identity().eval(), query=q, key=k, value=v, lengths=None, earlier=None, causal=causal,
        scale=WIDTH**-0.5, dropout=0.0, layer=0, state=None, keeps=False,
    )  # fmt: skip
    ways: dict[str, Callable[[], Any]] = {
        "full": lambda: functional.scaled_dot_product_attention(q, k, v, is_causal=causal)
    }
    for name, (one, part) in attentions(causal).items():
        ways[name] = lambda one=one, part=part: one.compute_call(part, call)
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(repeats + 1):
        for name, way in ways.items():
            begin = time.process_time()
            way()
            if turn:
                taken[name].append(1000 * (time.process_time() - begin))
    return {name: round(statistics.median(each), 2) for name, each in taken.items()}


def exponent(lengths: list[int], values: list[float]) -> float:
    """Return the slope of the logarithm of values over that of lengths."""
    x, y = ([math.log(each) for each in part] for part in (lengths, values))
    mean = sum(x) / len(x)
    return round(sum((a - mean) * b for a, b in zip(x, y, strict=True)) / sum((a - mean) ** 2 for a in x), 2)


def against_length(longest: int, repeats: int) -> dict[str, Any]:
    """Return times by length, and the exponents that fit those from 4,096 on."""
    rows, exponents = [], {}
    for causal in (True, False):
        mine = []
        for length in (n for n in LENGTHS if n <= longest):
            row = {"causal": causal, "length": length, "load": round(os.getloadavg()[0], 1)}
            mine.append({**row, "times": times(length, causal, repeats)})
            print(json.dumps(mine[-1]), flush=True)
        long = [row for row in mine if row["length"] >= 4096]
        if len(long) > 1:
            exponents["causal" if causal else "both sides"] = {
                name: exponent([row["length"] for row in long], [row["times"][name] for row in long])
                for name in long[0]["times"]
            }
        rows += mine
    return {"heads": HEADS, "width": WIDTH, "threads": 1, "repeats": repeats, "rows": rows, "exponents": exponents}


def converted(home: Path, step: dict[str, Any], train: torch.Tensor) -> Any:
    """Return babyllama-1m with a technique; centroids are fitted to the first training windows."""
    model = AutoModelForCausalLM.from_pretrained(home).eval()
    if not step:
        return model
    data = train[:8] if step["technique"] == "routing_transformer" else None
    return hf_optim.optimize(model, [step], calibration=data)


def quality(shared: Path, texts: int, steps: int) -> dict[str, Any]:
    """Return perplexities of babyllama-1m with each technique, as converted and after a recovery."""
    home = shared / "models" / "babyllama-1m"
    tokenizer = AutoTokenizer.from_pretrained(home)
    held = windows(tokenizer, shared / "data" / "tinystories" / "eval.jsonl", texts)
    train = windows(tokenizer, shared / "data" / "tinystories" / "train.jsonl", 4 * steps)
    rows = []
    for name, step in MODELS.items():
        model = converted(home, step, train)
        row = {"model": name, "step": step, "before": perplexity(model, held)}
        row["after"] = perplexity(recovered(model, train, steps), held)
        rows.append(row)
        print(json.dumps(row), flush=True)
    return {"held_out_tokens": held.numel(), "steps": steps, "batch": 4, "context": CONTEXT, "rows": rows}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", required=True, type=Path, help="folder with data and models/babyllama-1m")
    parser.add_argument("--output", type=Path, default=Path("model_cards/attention"))
    parser.add_argument("--recovery", type=int, default=60, help="steps of each language model")
    parser.add_argument("--texts", type=int, default=48, help="held-out windows of 256 tokens")
    parser.add_argument("--longest", type=int, default=16384, help="row that is timed")
    parser.add_argument("--repeats", type=int, default=5, help="of each time")
    parser.add_argument("--parts", nargs="+", choices=("times", "quality"), default=("times", "quality"))
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    args.output.mkdir(parents=True, exist_ok=True)
    path = args.output / "clusters.json"
    results: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    run = {
        "times": lambda: against_length(args.longest, args.repeats),
        "quality": lambda: quality(args.shared, args.texts, args.recovery),
    }
    for part in args.parts:
        results[part] = run[part]()
        path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(path)


if __name__ == "__main__":
    main()
