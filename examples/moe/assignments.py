"""Do assignments of tokens to experts settle while a mixture is trained, and what does keeping them cost?

    python examples/moe/assignments.py --model ../shared/models/stories260k --data ../shared/data/tinystories
    python examples/moe/buckets_page.py model_cards/moe/buckets

A small dense model is upcycled (8 experts, top 2) and trained on few sequences for many epochs, as the samples of a
training set come again, with a rate that falls to zero: once as it is, and once with ``dynamoe``'s ``stable``, which
keeps the experts of a sequence whose assignment was the same so many times in a row. After each epoch all sequences are
routed by the model as it is: the record has the share of tokens, and of whole sequences in a layer, whose experts are
those of the epoch before, and the share of routings that were left out. Held-out loss is that of other texts.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_optim

EXPERTS, TOP_K, LENGTH, BATCH, STABLE = 8, 2, 128, 16, 2


def sequences(tokenizer: Any, path: Path, count: int) -> Tensor:
    """Return the first texts of a file as token ids, int64 ``[count, LENGTH]``."""
    texts = [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()]
    ids = [token for text in texts for token in tokenizer(text).input_ids]
    return torch.tensor(ids[: count * LENGTH]).view(count, LENGTH)


def routers(model: Any) -> list[Any]:
    """Return the routers of a model."""
    return [layer.mlp.gate for layer in model.model.layers]


@torch.no_grad()
def choices(model: Any, rows: Tensor) -> Tensor:
    """Return the experts of each token, int64 ``[layers, sequences, LENGTH, k]``, in ascending order."""
    found: list[Tensor] = []
    handles = [gate.register_forward_hook(lambda _, __, out: found.append(out[2])) for gate in routers(model)]
    model.eval()(input_ids=rows, use_cache=False)
    model.train()
    for handle in handles:
        handle.remove()
    return torch.stack(found).view(len(found), len(rows), LENGTH, TOP_K).sort(-1).values


@torch.no_grad()
def loss(model: Any, rows: Tensor) -> float:
    """Return the mean loss of a model, nats per token."""
    value = float(model.eval()(input_ids=rows, labels=rows, use_cache=False).loss)
    model.train()
    return round(value, 4)


def trained(args: argparse.Namespace, rows: Tensor, held_out: Tensor, stable: int, seed: int) -> dict[str, Any]:
    """Train one mixture, and return what was seen after each epoch."""
    dense = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    step = {"technique": "upcycle", "experts": EXPERTS, "top_k": TOP_K, "noise": 0.1, "aux_loss": 0, "seed": seed}
    model = hf_optim.optimize(dense, [step, {"technique": "dynamoe", "stable": stable}]).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr)
    order = torch.Generator().manual_seed(seed)
    steps, done = args.epochs * len(rows) // BATCH, 0
    before, epochs = choices(model, rows), []
    counted = {"sequences_kept": 0, "sequences_routed": 0}
    for _ in range(args.epochs):
        for part in torch.randperm(len(rows), generator=order).split(BATCH):
            for group in optimizer.param_groups:
                group["lr"] = args.lr * (0.5 + 0.5 * math.cos(math.pi * done / steps))
            optimizer.zero_grad()
            model(input_ids=rows[part], labels=rows[part], use_cache=False).loss.backward()
            optimizer.step()
            done += 1
        now = choices(model, rows)
        same = (now == before).all(-1)
        kept = {key: sum(entry.get(key, 0) for entry in hf_optim.expert_buckets(model).values()) for key in counted}
        new = {key: kept[key] - counted[key] for key in counted}
        epochs.append({
            "tokens": round(float(same.float().mean()), 4),
            "sequences": round(float(same.all(-1).float().mean()), 4),
            "left_out": round(new["sequences_kept"] / max(1, sum(new.values())), 4),
        })  # fmt: skip
        before, counted = now, kept
    found = {"stable": stable, "seed": seed, "train": loss(model, rows), "held_out": loss(model, held_out)}
    print(json.dumps({**found, "last": epochs[-1]}), flush=True)
    return {**found, "epochs": epochs}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a dense decoder that `upcycle` takes")
    parser.add_argument("--data", required=True, type=Path, help="a folder with train.jsonl and eval.jsonl")
    parser.add_argument("--output", type=Path, default=Path("model_cards/moe/buckets"))
    parser.add_argument("--sequences", type=int, default=48)
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--lr", type=float, default=1e-3)
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    rows = sequences(tokenizer, args.data / "train.jsonl", args.sequences)
    held_out = sequences(tokenizer, args.data / "eval.jsonl", args.sequences)
    results: dict[str, Any] = {
        "model": Path(args.model).name, "experts": EXPERTS, "top_k": TOP_K, "sequences": args.sequences,
        "length": LENGTH, "epochs": args.epochs, "batch": BATCH, "rate": args.lr, "stable": STABLE, "runs": [],
    }  # fmt: skip
    args.output.mkdir(parents=True, exist_ok=True)
    for seed in range(args.seeds):
        for stable in (0, STABLE):
            results["runs"].append(trained(args, rows, held_out, stable, seed))
            text = json.dumps(results, indent=1) + "\n"
            (args.output / "assignments.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
