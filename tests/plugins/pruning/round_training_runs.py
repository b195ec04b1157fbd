"""Trainings that the tests of pruning in rounds share: what happened at every step, and a small real model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from toy_training import arguments, sentences
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainerCallback

import hf_optim
from hf_optim import run_of

WIDTH = 48


class Watch(TrainerCallback):
    """Learning rates of the steps, and weights and masks after them; placed after the callbacks of the run."""

    def __init__(self, run: Any) -> None:
        self.run = run
        self.rates: list[float] = []
        self.weights: dict[int, dict[str, torch.Tensor]] = {}
        self.masks: dict[int, dict[str, torch.Tensor]] = {}
        self.before: dict[int, dict[str, torch.Tensor]] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.on_step_end(args, state, control, **kwargs)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.rates.append(kwargs["optimizer"].param_groups[0]["lr"])

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.before[state.global_step + 1] = self._weights()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.weights[state.global_step] = self._weights()
        self.masks[state.global_step] = dict(self.run.masks)

    def _weights(self) -> dict[str, torch.Tensor]:
        return {name: p.detach().clone() for name, p in self.run.model.named_parameters()}


def train(model: Any, folder: Path, steps: int, **changes: Any) -> Watch:
    """Train a model that waits for it, or a plain one, in a stock Trainer."""
    run = hf_optim.run.find_run(model)
    watch = Watch(run) if run is not None else None
    callbacks = [*hf_optim.callbacks(model), watch] if watch is not None else []
    args = arguments(folder, max_steps=steps, **changes)
    Trainer(model=model, args=args, train_dataset=sentences(), callbacks=callbacks).train()
    return watch


def original_rates(model: Any, folder: Path, steps: int, **changes: Any) -> list[float]:
    """The learning rates of a plain training."""

    class Rates(TrainerCallback):
        def __init__(self) -> None:
            self.seen: list[float] = []

        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.seen.append(kwargs["optimizer"].param_groups[0]["lr"])

    args = arguments(folder, max_steps=steps, **changes)
    Trainer(model=model, args=args, train_dataset=sentences(), callbacks=[rates := Rates()]).train()
    return rates.seen


class Stories:
    """The small story model with data to train and to judge it on."""

    def __init__(self, models: Path, data: Path) -> None:
        self.home = models / "stories260k"
        self.tokenizer = AutoTokenizer.from_pretrained(self.home)
        self.rows = [
            {"input_ids": row, "labels": row} for row in self._windows(data / "tinystories" / "train.jsonl", 960)
        ]
        self.held_out = self._windows(data / "tinystories" / "eval.jsonl", 192)

    def _windows(self, path: Path, count: int) -> torch.Tensor:
        ids: list[int] = []
        for line in path.read_text(encoding="utf-8").splitlines():
            ids.append(self.tokenizer.bos_token_id)
            ids += self.tokenizer(json.loads(line)["text"], add_special_tokens=False, verbose=False)["input_ids"]
            if len(ids) >= count * WIDTH:
                break
        return torch.tensor(ids[: len(ids) // WIDTH * WIDTH]).view(-1, WIDTH)[:count]

    def loss_after(self, recipe: Any, folder: Path, steps: int, **changes: Any) -> float:
        """Cross-entropy on the held-out windows after training with one thread, which is fastest for this size."""
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            model = AutoModelForCausalLM.from_pretrained(self.home, optim_config=recipe, dtype=torch.float32)
            args = arguments(
                folder, **{"max_steps": steps, "per_device_train_batch_size": 4, "learning_rate": 3e-3, **changes}
            )
            Trainer(model=model, args=args, train_dataset=self.rows, callbacks=hf_optim.callbacks(model)).train()
            found = run_of(model).masks.values()
            self.sparsity = 1 - sum(int(m.sum()) for m in found) / sum(m.numel() for m in found)
            with torch.no_grad():
                return model.eval()(self.held_out, labels=self.held_out).loss.item()
        finally:
            torch.set_num_threads(threads)
