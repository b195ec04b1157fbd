"""Steps and a trainer's surroundings for the tests of training. The steps are on no catalogue."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainingArguments

from hf_optim import Contract, OptimConfig, Reload, Run, Technique, hookimpl, option, technique
from hf_optim.lifecycle.stages import start_run
from hf_optim.recipes.traits import SPARSE
from hf_optim.runs.run import StageState, traits_of


def toy(name: str, **settings: Any) -> Callable[[type], type]:
    contract = settings.pop("contract", Contract(keeps=frozenset({SPARSE})))
    return technique(name, family="toy", contract=contract, reload=Reload.STOCK_DENSE, trains=True, **settings)


@toy("toy_ramp", contract=Contract(adds=frozenset({SPARSE}), keeps=frozenset({SPARSE})))
class ToyRamp(Technique):
    """Masks a random tenth more of the parameters whose name holds ``of`` after every step."""

    of: str = "mlp"
    at: str = "on_step_end"

    @hookimpl
    def training_callbacks(self, run: Run) -> list[TrainerCallback]:
        callback = TrainerCallback()

        def update(args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            own = run.state(self)
            own.calls = getattr(own, "calls", 0) + 1
            for name, parameter in run.model.named_parameters():
                name = name.replace(".base_layer", "")
                if self.of in name and parameter.dim() == 2 and "lora_" not in name:
                    generator = torch.Generator().manual_seed(own.calls)
                    drop = torch.rand(parameter.shape, generator=generator) < 0.1
                    old = run.masks.get(name, torch.ones_like(drop))
                    run.masks[name] = old & ~drop
            own.trace = torch.cat([getattr(own, "trace", torch.zeros(0)), torch.tensor([float(state.global_step)])])

        setattr(callback, self.at, update)
        return [callback]

    @hookimpl
    def finalize_model(self, run: Run) -> None:
        run.report(self, finalized=True)


@toy("toy_loss")
class ToyLoss(Technique):
    """Adds a fixed multiple of the mean square of the scored logits."""

    weight: float = 0.5
    task_scale: float = 1.0
    term: str = "square"

    @hookimpl
    def training_loss(self, run: Run, model: nn.Module, inputs: Any, outputs: Any) -> dict[str, Any]:
        scored = inputs["labels"][..., 1:] != -100
        value = outputs.logits[..., :-1, :][scored].float().square().mean()
        return {self.term: self.weight * value, "task_scale": self.task_scale}


@toy("toy_groups")
class ToyGroups(Technique):
    """Claims the parameters whose name holds ``of``, with a learning rate of their own."""

    of: str = "mlp"
    rate: float = option(0.5, above=0.0)
    extra: bool = False

    @hookimpl
    def parameter_groups(self, run: Run, model: nn.Module) -> list[dict[str, Any]]:
        chosen = [p for n, p in model.named_parameters() if self.of in n]
        if self.extra:
            run.state(self).own = nn.Parameter(torch.ones(3))
            chosen.append(run.state(self).own)
        return [{"params": chosen, "lr": self.rate}]


def begin(model: Any, *steps: Technique) -> Run:
    """A run that waits for training, made by hand."""
    run = start_run(OptimConfig(steps=steps), model.config)
    run.model = model
    run.traits = traits_of(model)
    run.stage_state = StageState.ENTERED
    return run


def arguments(folder: Path, **changes: Any) -> TrainingArguments:
    settings = {
        "output_dir": str(folder),
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "report_to": [],
        "use_cpu": True,
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "seed": 3,
    }
    return TrainingArguments(**{**settings, **changes})


def sentences(count: int = 16, length: int = 12, seed: int = 0, ragged: bool = False) -> list[dict[str, torch.Tensor]]:
    """Random token ids with labels; ``ragged`` leaves out a different part of the labels in every row."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for i in range(count):
        ids = torch.randint(3, 64, (length,), generator=generator)
        labels = ids.clone()
        if ragged:
            labels[2 + (i * 3) % (length - 2) :] = -100
        rows.append({"input_ids": ids, "labels": labels})
    return rows
