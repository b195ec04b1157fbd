"""Measure the gain of SquareHead by training steps: a 2:4 student of its dense self, with and without hidden states.

    python examples/distillation/squarehead.py --model ../shared/models/babyllama-1m \\
        --data ../shared/data/tinystories --output model_cards/measurements/squarehead.json

Trains ``[nm, logit_kd]`` on train.jsonl, once per value of ``alpha_states`` (the weight of the loss on the hidden
states of all blocks), and reports KL(dense ‖ student) in nats per token on calibration.jsonl, which no training uses.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback, default_data_collator

import hf_optim
from hf_optim.runs.record import versions
from hf_optim.toolkit.modules import eval_mode
from hf_optim.training.fit import training_arguments

BATCH, LENGTH, HELD_OUT = 8, 256, 64


def load_sequences(tokenizer: Any, file: Path) -> Tensor:
    """Load the stories of a file, each preceded by bos, joined and cut: token ids ``[n, LENGTH]``, int64."""
    ids: list[int] = []
    for line in file.read_text(encoding="utf-8").splitlines():
        ids += [tokenizer.bos_token_id, *tokenizer(json.loads(line)["text"], add_special_tokens=False)["input_ids"]]
    return torch.tensor(ids[: len(ids) // LENGTH * LENGTH]).view(-1, LENGTH)


@torch.no_grad()
def kl_divergence(dense: Any, student: Any, ids: Tensor) -> float:
    """Compute KL(dense ‖ student), the mean over tokens, in nats."""
    total = 0.0
    with eval_mode(student):
        for part in ids.split(16):
            p, q = (model(part.to(model.device)).logits.double().log_softmax(-1) for model in (dense, student))
            total += float((p.exp() * (p - q)).sum())
    return total / ids.numel()


class DivergenceCallback(TrainerCallback):
    """Measures the divergence from the dense model after the given steps."""

    def __init__(self, steps: list[int], dense: Any, ids: Tensor) -> None:
        self.steps, self.dense, self.ids, self.divergence = steps, dense, ids, dict[str, float]()

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step in self.steps:
            self.divergence[str(state.global_step)] = round(kl_divergence(self.dense, model, self.ids), 5)


def train(weight: float, args: argparse.Namespace, tokenizer: Any) -> dict[str, float]:
    """Train a student with ``alpha_states`` = ``weight``; return its divergence by steps."""
    dense, model = (AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32) for _ in range(2))
    kd = {"technique": "logit_kd", "alpha": 1.0, "temperature": 1.0, "alpha_states": weight}
    model = hf_optim.optimize(model, [{"technique": "nm"}, kd], tokenizer=tokenizer)
    held_out = load_sequences(tokenizer, args.data / "calibration.jsonl")[:HELD_OUT]
    examples = [{"input_ids": ids, "labels": ids} for ids in load_sequences(tokenizer, args.data / "train.jsonl")]
    with tempfile.TemporaryDirectory() as home:
        arguments = training_arguments(
            home,
            {
                "max_steps": args.marks[-1],
                "per_device_train_batch_size": BATCH,
                "learning_rate": 5e-4,
                "lr_scheduler_type": "cosine",
                "warmup_steps": 20,
                "disable_tqdm": True,
                "logging_strategy": "no",
            },
        )
        callback = DivergenceCallback(args.marks, dense.to(arguments.device), held_out)
        trainer = hf_optim.OptimTrainer(
            model=model,
            args=arguments,
            train_dataset=examples,  # type: ignore[arg-type]
            data_collator=default_data_collator,
            callbacks=[callback],
        )
        trainer.train()
    return callback.divergence


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--weights", type=float, nargs="+", default=[0.0, 0.3, 1.0])
    parser.add_argument(
        "--marks", type=int, nargs="+", default=[100, 250, 500], help="steps to measure after, ascending"
    )
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    divergence: dict[str, dict[str, float]] = {}
    for weight in args.weights:
        divergence[str(weight)] = train(weight, args, tokenizer)
        print(weight, divergence[str(weight)], flush=True)
    results: dict[str, Any] = {
        "model": args.model.name,
        "recipe": "nm, logit_kd (alpha 1, T 1)",
        "batch": BATCH,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "versions": versions(),
        "divergence by alpha_states and steps": divergence,
    }
    args.output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
