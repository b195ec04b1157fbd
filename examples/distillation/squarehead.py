"""What SquareHead is worth, by steps: a 2:4 student of its dense self, with and without the hidden states of blocks.

    python examples/distillation/squarehead.py --model ../shared/models/babyllama-1m \\
        --data ../shared/data/tinystories --output model_cards/measurements/squarehead.json

Trains `[nm, logit_kd]` on train.jsonl, once for every weight of `alpha_states`, and tells the divergence of the dense
model from the student, KL(dense ‖ student) in nats a token, on calibration.jsonl, which nothing is trained on.
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

BATCH, WIDTH, HELD_OUT = 8, 256, 64


def windows(tokenizer: Any, file: Path) -> Tensor:
    """The stories of a file one behind the other, each after bos: token ids [n, WIDTH], int64."""
    ids: list[int] = []
    for line in file.read_text(encoding="utf-8").splitlines():
        ids += [tokenizer.bos_token_id, *tokenizer(json.loads(line)["text"], add_special_tokens=False)["input_ids"]]
    return torch.tensor(ids[: len(ids) // WIDTH * WIDTH]).view(-1, WIDTH)


@torch.no_grad()
def divergence(dense: Any, student: Any, ids: Tensor) -> float:
    """KL(dense ‖ student), the mean over tokens, in nats."""
    total = 0.0
    with eval_mode(student):
        for part in ids.split(16):
            p, q = (model(part.to(model.device)).logits.double().log_softmax(-1) for model in (dense, student))
            total += float((p.exp() * (p - q)).sum())
    return total / ids.numel()


class Marks(TrainerCallback):
    """The divergence after some of the steps."""

    def __init__(self, marks: list[int], dense: Any, ids: Tensor) -> None:
        self.marks, self.dense, self.ids, self.found = marks, dense, ids, dict[str, float]()

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step in self.marks:
            self.found[str(state.global_step)] = round(divergence(self.dense, model, self.ids), 5)


def train(weight: float, args: argparse.Namespace, tokenizer: Any) -> dict[str, float]:
    dense, model = (AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32) for _ in range(2))
    kd = {"technique": "logit_kd", "alpha": 1.0, "temperature": 1.0, "alpha_states": weight}
    model = hf_optim.optimize(model, [{"technique": "nm"}, kd], tokenizer=tokenizer)
    ids = windows(tokenizer, args.data / "calibration.jsonl")[:HELD_OUT]
    rows = [{"input_ids": row, "labels": row} for row in windows(tokenizer, args.data / "train.jsonl")]
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
        marks = Marks(args.marks, dense.to(arguments.device), ids)
        trainer = hf_optim.OptimTrainer(
            model=model, args=arguments, train_dataset=rows, data_collator=default_data_collator, callbacks=[marks]
        )  # type: ignore[arg-type]
        trainer.train()
    return marks.found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--weights", type=float, nargs="+", default=[0.0, 0.3, 1.0])
    parser.add_argument("--marks", type=int, nargs="+", default=[100, 250, 500], help="steps, ascending")
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    found: dict[str, Any] = {
        "model": args.model.name,
        "recipe": "nm, logit_kd (alpha 1, T 1)",
        "batch": BATCH,
    }
    found |= {"device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU", "versions": versions()}
    found["divergence by alpha_states and steps"] = {}
    for weight in args.weights:
        found["divergence by alpha_states and steps"][str(weight)] = train(weight, args, tokenizer)
        print(weight, found["divergence by alpha_states and steps"][str(weight)], flush=True)
    args.output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
