"""Training runs shared by the tests of pruning in rounds, with a record of every step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from toy_training import arguments, sentences
from transformers import Trainer, TrainerCallback

import hf_optim


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
    """Train a model in a training stage, or a plain one, in a stock Trainer."""
    run = hf_optim.runs.run.find_run(model)
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
