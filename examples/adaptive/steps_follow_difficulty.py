"""Do tokens take more steps where the task is harder? A planted task, learned from scratch with ``act``.

    python examples/adaptive/steps_follow_difficulty.py --output model_cards/adaptive
    python examples/adaptive/steps_follow_difficulty.py --output trial --steps 20 --seeds 0    # a trial

Every position of a row holds a pointer to a position and a number of hops h; its label is where h hops lead: with h = 0
the position of its own pointer, with h = 1 the pointer of that position, and so on. A hop is one look-up by attention,
so h of them need h steps one after the other. The rows have all difficulties mixed, and nothing but the loss and the
cost of pondering says how many steps a token should take.

A BERT of one block is applied in up to five steps (``universal_transformer``), with halting (``act``) and, for
comparison, without. Per seed about a minute on one CPU core. Held-out rows give, by difficulty: the mean number of
steps and the accuracy; the correlation of steps with difficulty over tokens; and the tokens that the block computes.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import BertConfig, BertForTokenClassification

import hf_optim

PLACES, HOPS, STEPS, WIDTH, BATCH, RATE = 8, 3, 5, 64, 64, 3e-3


def rows(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Return ids and labels, int64 ``[count, PLACES]``, and the difficulty of each token, 0 to ``HOPS - 1``."""
    pointers = torch.rand(count, PLACES, generator=generator).argsort(1)
    hops = torch.randint(0, HOPS, (count, PLACES), generator=generator)
    labels, at = pointers, pointers
    for hop in range(1, HOPS):
        at = pointers.gather(1, at)
        labels = torch.where(hops >= hop, at, labels)
    return hops * PLACES + pointers, labels, hops


def model(halting: dict[str, Any] | None, seed: int) -> Any:
    """Return a BERT of one block with random weights, in steps, with halting or without."""
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=HOPS * PLACES, hidden_size=WIDTH, intermediate_size=2 * WIDTH, num_hidden_layers=1,
        num_attention_heads=4, max_position_embeddings=PLACES, num_labels=PLACES, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    tied = {"technique": "universal_transformer", "steps": STEPS, "position_signal": "none", "step_signal": "learned"}
    steps = [tied] if halting is None else [tied, {"technique": "act", **halting}]
    return hf_optim.optimize(BertForTokenClassification(config), steps)


def trained(network: Any, steps: int, seed: int, cost: float) -> Any:
    """Train a model on rows that are never repeated; from the middle on, pondering costs something.

    Where it costs from the beginning, tokens whose task is not learned yet halt first, and never learn it.
    """
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(network.parameters(), lr=RATE, weight_decay=0.01)
    network.train()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = RATE * min((step + 1) / (steps // 20 + 1), 0.5 + 0.5 * math.cos(math.pi * step / steps))
        ids, labels, _ = rows(BATCH, generator)
        loss = network(input_ids=ids, labels=labels).loss
        if cost and 2 * step >= steps:
            loss = loss + cost * network.pondered.cost
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
    return network.eval()


@torch.no_grad()
def measured(network: Any, seed: int, count: int = 2000) -> dict[str, Any]:
    """Return accuracy and steps by difficulty on held-out rows, and the correlation of steps with difficulty."""
    ids, labels, hops = rows(count, torch.Generator().manual_seed(10_000 + seed))
    right = network(input_ids=ids).logits.argmax(-1) == labels
    pondered = getattr(network, "pondered", None)
    taken = torch.full_like(ids, STEPS) if pondered is None else pondered.steps
    groups = [hops == hop for hop in range(HOPS)]
    found: dict[str, Any] = {
        "accuracy": round(float(right.double().mean()), 4),
        "accuracy_by_hops": [round(float(right[group].double().mean()), 4) for group in groups],
        "mean_steps": round(float(taken.double().mean()), 4),
        "steps_by_hops": [round(float(taken[group].double().mean()), 4) for group in groups],
    }
    if pondered is not None:
        pairs = torch.stack([taken.flatten().double(), hops.flatten().double()])
        found["correlation"] = round(float(torch.corrcoef(pairs)[0, 1].nan_to_num()), 4)
        found["tokens_by_steps"] = torch.bincount(taken.flatten(), minlength=STEPS + 1)[1:].tolist()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--ponder-cost", type=float, default=0.02)
    parser.add_argument("--bias", type=float, default=-2.0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    results: dict[str, Any] = {
        "task": {"places": PLACES, "difficulties": HOPS, "most_steps": STEPS},
        "training": {
            "steps": args.steps,
            "rows": args.steps * BATCH,
            "ponder_cost": args.ponder_cost,
            "bias": args.bias,
        },
        "act": {},
        "fixed": {},
    }
    for seed in args.seeds:
        for name, halting in (("act", {"ponder_cost": 0.0, "bias": args.bias}), ("fixed", None)):
            begin = time.perf_counter()
            found = measured(
                trained(model(halting, seed), args.steps, seed, args.ponder_cost if halting else 0.0), seed
            )
            found["seconds"] = round(time.perf_counter() - begin, 1)
            results[name][str(seed)] = found
            print(f"seed {seed}, {name}: {json.dumps(found)}", flush=True)
    args.output.mkdir(parents=True, exist_ok=True)
    text = json.dumps(results, indent=1) + "\n"
    (args.output / "steps_follow_difficulty.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
