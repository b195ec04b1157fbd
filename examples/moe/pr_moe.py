"""PR-MoE beside uniform mixtures of experts with more parameters, trained from scratch for equal steps.

    python examples/moe/pr_moe.py --tokenizer ../shared/models/babyllama-1m --data ../shared/data/tinystories \\
        --output model_cards/moe

A small Llama with random weights is turned by `pr_moe`: with a dense part and a pyramid of experts (4 in the first half
of the layers, 8 in the second), and without, with 8 and with 16 experts in every layer; each part of PR-MoE is also
tried alone. All see the same batches in the same order, each token at most once. Held-out loss is that of the end.
``--data`` is a folder with train.jsonl, calibration.jsonl and eval.jsonl. Two seeds take 20 minutes on one CPU core.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import pr_moe_page
import torch
from capacity import sequences
from torch import Tensor
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, default_data_collator

import hf_optim
from hf_optim.evaluation.evaluate import perplexity

BATCH, LENGTH = 8, 128
MIXTURE = {"technique": "pr_moe", "gate": "probability", "noise": 0.5, "aux_loss": 0.01}
ONE = {"gate": "one"}
VARIANTS: dict[str, dict[str, Any] | None] = {
    "dense": None,
    "PR-MoE 4/8": {"experts": [4, 8]},
    "residual only, 8": {"experts": [8]},
    "pyramid only, 4/8": {"experts": [4, 8], "residual": False},
    "uniform 8": {"experts": [8], "residual": False},
    "uniform 16": {"experts": [16], "residual": False},
    "PR-MoE 4/8, gate 1": {"experts": [4, 8], **ONE},
    "uniform 8, gate 1": {"experts": [8], "residual": False, **ONE},
    "uniform 16, gate 1": {"experts": [16], "residual": False, **ONE},
}


def dense_model(vocabulary: int, seed: int) -> Any:
    """Return a Llama with random weights, the same for every variant of a seed."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary, hidden_size=64, intermediate_size=176, num_hidden_layers=4, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=256, tie_word_embeddings=True, bos_token_id=1,
            eos_token_id=2, pad_token_id=None,
        )
    )  # fmt: skip


def train(model: Any, rows: Tensor, steps: int, seed: int) -> None:
    """Train a model in place, on the CPU."""
    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArguments(
            folder, max_steps=steps, per_device_train_batch_size=BATCH, learning_rate=3e-3, seed=seed, use_cpu=True,
            lr_scheduler_type="cosine", warmup_steps=steps // 10, report_to=[], save_strategy="no", disable_tqdm=True,
            logging_strategy="no",
        )  # fmt: skip
        examples = [{"input_ids": row, "labels": row} for row in rows]
        kind = Trainer if type(model) is LlamaForCausalLM else hf_optim.OptimTrainer  # with the load-balancing loss
        trainer = kind(model=model, args=settings, train_dataset=examples, data_collator=default_data_collator)
        trainer.train()


def measure(fields: dict[str, Any] | None, args: argparse.Namespace, data: tuple[Tensor, Tensor], seed: int) -> Any:
    """Return parameters and held-out loss of one variant."""
    train_rows, held_out = data
    model = dense_model(args.vocabulary, seed)
    recipe = [] if fields is None else [{**MIXTURE, **fields, "seed": seed}]
    active = model.num_parameters()
    if recipe:
        model = hf_optim.optimize(model, recipe)
        active = hf_optim.run_of(model).record.steps["0"]["active_parameters"]
    train(model, train_rows, args.steps, seed)
    found = perplexity(model.eval(), held_out, BATCH)
    return {"parameters": model.num_parameters(), "active": active, "nll": round(found["nll"], 4)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--data", required=True, type=Path, help="a folder with the three files of texts")
    parser.add_argument("--output", type=Path, default=Path("model_cards/moe"))
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--sequences", type=int, default=48, help="held-out sequences of 256 tokens")
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    args.vocabulary = len(tokenizer)
    rows = torch.cat([sequences(tokenizer, args.data / f"{name}.jsonl") for name in ("train", "calibration")])
    held_out = sequences(tokenizer, args.data / "eval.jsonl", args.sequences)
    rows, held_out = rows.view(-1, LENGTH), held_out.view(-1, LENGTH)
    steps = min(args.steps, len(rows) // BATCH)
    args.steps = steps
    results: dict[str, Any] = {
        "steps": steps,
        "trained_tokens": steps * BATCH * rows.shape[1],
        "held_out_tokens": held_out.numel(),
        "seeds": [],
    }
    for seed in range(args.seeds):
        row = {}
        for name, fields in VARIANTS.items():
            row[name] = measure(fields, args, (rows, held_out), seed)
            print(seed, name, json.dumps(row[name]), flush=True)
        results["seeds"].append(row)
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "pr_moe.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    pr_moe_page.write(args.output)


if __name__ == "__main__":
    main()
