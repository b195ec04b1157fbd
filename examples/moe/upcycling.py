"""Upcycling beside the dense twin on text that neither has seen: held-out loss after equal further steps.

    python examples/moe/upcycling.py --tokenizer ../shared/models/babyllama-1m --data ../shared/data/tinystories \\
        --output model_cards/moe

A small Qwen3 is trained from scratch on the first half of the stories. Then it goes on as it is, and upcycled (8
experts, top 2) in every layer and in every second one, on the second half, each story once: with data that is never
repeated, more parameters cannot memorize it. ``--data`` is a folder with train.jsonl, calibration.jsonl and eval.jsonl.
Two seeds take ten minutes on one CPU core.
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
import upcycling_page
from capacity import sequences
from torch import Tensor
from transformers import (
    AutoTokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
)

import hf_optim
from hf_optim.evaluation.evaluate import perplexity

BATCH, LENGTH = 8, 128
MIXTURE = {"technique": "upcycle", "experts": 8, "top_k": 2, "aux_loss": 0.01, "noise": 0.1}
VARIANTS: dict[str, dict[str, Any] | None] = {
    "dense": None,
    "every layer": {"every": 1},
    "every second layer": {"every": 2},
    "every second layer, no noise": {"every": 2, "noise": 0.0},
}


class Balanced(TrainerCallback):
    """Switches the model's own load-balancing loss on while it trains."""

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        model.config.output_router_logits = True

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        model.config.output_router_logits = False


def dense_model(vocabulary: int, seed: int) -> Any:
    """Return a Qwen3 with random weights."""
    torch.manual_seed(seed)
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=vocabulary, hidden_size=64, intermediate_size=176, num_hidden_layers=4, num_attention_heads=4,
            num_key_value_heads=2, head_dim=16, max_position_embeddings=256, tie_word_embeddings=True, bos_token_id=1,
            eos_token_id=2, pad_token_id=None,
        )
    )  # fmt: skip


def train(model: Any, rows: Tensor, seed: int, callbacks: list[TrainerCallback]) -> None:
    """Train a model in place on the CPU, on every row once."""
    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArguments(
            folder, num_train_epochs=1, per_device_train_batch_size=BATCH, learning_rate=3e-3, seed=seed, use_cpu=True,
            lr_scheduler_type="cosine", warmup_steps=len(rows) // BATCH // 10, report_to=[], save_strategy="no",
            disable_tqdm=True, logging_strategy="no",
        )  # fmt: skip
        examples = [{"input_ids": row, "labels": row} for row in rows]
        Trainer(
            model=model, args=settings, train_dataset=examples, data_collator=default_data_collator, callbacks=callbacks
        ).train()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--data", required=True, type=Path, help="a folder with the three files of texts")
    parser.add_argument("--output", type=Path, default=Path("model_cards/moe"))
    parser.add_argument("--steps", type=int, default=160, help="of each half")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--sequences", type=int, default=48, help="held-out sequences of 256 tokens")
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    rows = torch.cat([sequences(tokenizer, args.data / f"{name}.jsonl") for name in ("train", "calibration")])
    rows = rows.view(-1, LENGTH)
    held_out = sequences(tokenizer, args.data / "eval.jsonl", args.sequences).view(-1, LENGTH)
    steps = min(args.steps, len(rows) // BATCH // 2)
    halves = rows[: steps * BATCH], rows[steps * BATCH : 2 * steps * BATCH]
    results: dict[str, Any] = {
        "steps": steps,
        "trained_tokens": halves[0].numel(),
        "held_out_tokens": held_out.numel(),
        "seeds": [],
    }
    for seed in range(args.seeds):
        start = dense_model(len(tokenizer), seed)
        train(start, halves[0], seed, [])
        row: dict[str, Any] = {"start": round(perplexity(start.eval(), held_out, BATCH)["nll"], 4)}
        for name, fields in VARIANTS.items():
            model = copy.deepcopy(start)
            active = model.num_parameters()
            if fields is not None:
                model = hf_optim.optimize(model, [{**MIXTURE, **fields, "seed": seed}])
                active = hf_optim.run_of(model).record.steps["0"]["active_parameters"]
                model = hf_optim.release(model)
            train(model, halves[1], seed, [] if fields is None else [Balanced()])
            loss = round(perplexity(model.eval(), held_out, BATCH)["nll"], 4)
            row[name] = {"parameters": model.num_parameters(), "active": active, "nll": loss}
            print(seed, row["start"], name, json.dumps(row[name]), flush=True)
        results["seeds"].append(row)
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "upcycle.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    upcycling_page.write(args.output)


if __name__ == "__main__":
    main()
