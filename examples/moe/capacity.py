"""Quality against expert capacity: slots by position (``capacity_routing``) beside slots by gate (batch priority).

    python examples/moe/capacity.py --model ../shared/models/babyllama-1m --data ../shared/data/tinystories \\
        --output model_cards/moe

A dense decoder is upcycled to 8 experts of which each token chooses 2, and trained with a capacity factor of 1.05, as
V-MoE is. Then the held-out loss is measured with other factors, for both orders, with and without renormalized gates.
``--data`` is a folder with train.jsonl and eval.jsonl. 400 steps and two seeds take ten minutes on two CPU cores.

The loss of a text is measured in one forward. There a capacity is not causal: which tokens are computed depends on
tokens after them, under both orders.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import capacity_page
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments, default_data_collator

import hf_optim
from hf_optim.evaluation.evaluate import perplexity

EXPERTS, TOP_K, LENGTH, BATCH = 8, 2, 256, 8
FACTORS = (0.1, 0.25, 0.5, 0.75, 1.05, 1.5, 2.0, EXPERTS / TOP_K)
ORDERS = {
    "by position": {"technique": "capacity_routing"},
    "by priority": {"technique": "batch_priority_routing"},
    "by position, renormalized": {"technique": "capacity_routing", "renormalize": True},
    "by priority, renormalized": {"technique": "batch_priority_routing", "renormalize": True},
}


def sequences(tokenizer: Any, path: Path, count: int | None = None) -> Tensor:
    """Return the texts of a file as token ids, int64 ``[n, LENGTH]``; at most ``count`` rows."""
    texts = [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()]
    ids = [token for text in texts for token in tokenizer(text).input_ids]
    rows = torch.tensor(ids[: len(ids) // LENGTH * LENGTH]).view(-1, LENGTH)
    return rows[:count]


def trained(args: argparse.Namespace, rows: Tensor, seed: int, folder: str) -> Any:
    """Return the upcycled model after training with the capacity of V-MoE, on the CPU, without a capacity."""
    dense = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    steps = [
        {"technique": "upcycle", "experts": EXPERTS, "top_k": TOP_K, "noise": 0.1, "aux_loss": 0.01, "seed": seed},
        {"technique": "capacity_routing", "capacity": 1.05, "measure": False},
    ]
    model = hf_optim.optimize(dense, steps)
    examples = [{"input_ids": row, "labels": row} for row in rows]
    settings = TrainingArguments(
        folder, max_steps=args.steps, per_device_train_batch_size=BATCH, learning_rate=args.lr, seed=seed,
        lr_scheduler_type="cosine", warmup_steps=args.steps // 20, report_to=[], save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(
        model=model, args=settings, train_dataset=examples, data_collator=default_data_collator,
        callbacks=hf_optim.callbacks(model),
    )  # fmt: skip
    trainer.train()
    return hf_optim.restore(hf_optim.release(model.cpu().eval()))


def measure(model: Any, rows: Tensor, step: dict[str, Any], factor: float) -> dict[str, float]:
    """Return the held-out loss (nats per token) and the dropped share with one order and factor."""
    capped = hf_optim.optimize(model, [{**step, "capacity": factor, "measure": False}])
    found = perplexity(capped, rows, BATCH)
    hf_optim.restore(hf_optim.release(capped))
    return {"nll": round(found["nll"], 4), "dropped": round(found["dropped_share"], 4)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a dense decoder that `upcycle` takes")
    parser.add_argument("--data", required=True, type=Path, help="a folder with train.jsonl and eval.jsonl")
    parser.add_argument("--output", type=Path, default=Path("model_cards/moe"))
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--sequences", type=int, default=64, help="held-out sequences of 256 tokens")
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    data = sequences(tokenizer, args.data / "train.jsonl")
    held_out = sequences(tokenizer, args.data / "eval.jsonl", args.sequences)
    dense = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    results: dict[str, Any] = {
        "model": Path(args.model).name,
        "experts": EXPERTS,
        "top_k": TOP_K,
        "steps": args.steps,
        "trained_tokens": args.steps * BATCH * LENGTH,
        "held_out_tokens": held_out.numel(),
        "dense_nll": round(perplexity(dense, held_out, BATCH)["nll"], 4),
        "seeds": [],
    }
    for seed in range(args.seeds):
        with tempfile.TemporaryDirectory() as folder:
            model = trained(args, data, seed, folder)
        row: dict[str, Any] = {"dropless": round(perplexity(model, held_out, BATCH)["nll"], 4)}
        for name, step in ORDERS.items():
            row[name] = {f"{factor:g}": measure(model, held_out, step, factor) for factor in FACTORS}
            print(seed, name, json.dumps(row[name]), flush=True)
        results["seeds"].append(row)
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "capacity.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    capacity_page.write(args.output)


if __name__ == "__main__":
    main()
