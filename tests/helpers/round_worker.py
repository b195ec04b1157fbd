"""A step that prunes in rounds, for the tests of rounds; run as a program, one of two ranks that train with it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from tiny_models import tiny_llama
from toy_training import arguments, begin, sentences, toy
from transformers import Trainer, TrainerCallback

import hf_optim
from hf_optim import Contract, Rounds, RoundTraining, Run, Technique, hookimpl
from hf_optim.recipes.traits import SPARSE
from hf_optim.toolkit.distributed import collectives


@toy("toy_rewinder", contract=Contract(adds=frozenset({SPARSE}), keeps=frozenset({SPARSE})))
class Rewinder(Technique):
    """Prunes to a half in rounds; weights are rewound, kept, or drawn anew for the last round."""

    rounds: int = 2
    rewind_to: int | float = 0
    dense: bool = True
    weights: str = "rewind"
    rate: float | None = None
    scope: str = "layer"

    @hookimpl
    def training_callbacks(self, run: Run) -> list[TrainerCallback]:
        rounds = Rounds(run, sparsity=0.5, rounds=self.rounds, scope=self.scope, step=self)
        rate = self.rate
        return [
            RoundTraining(
                rounds,
                dense=self.dense,
                rewind_to=self.rewind_to,
                keeps_point=self.weights != "keep",
                renew=None if self.weights == "keep" else self.renew,
                held=None if rate is None else lambda last: rate,
            )
        ]

    def renew(self, rounds: Rounds, optimizer: Any) -> None:
        if self.weights == "draw" and not rounds.left:
            rounds.reinitialize(0, optimizer)
        else:
            rounds.rewind(optimizer)


def rounds_of(run: Run) -> Any:
    return run.state(run.recipe.steps[0])


class Check(TrainerCallback):
    """After the rewinding at step 6 the weights are those of step 2, under the masks."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.early: dict[str, torch.Tensor] = {}

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        now = {name: p.detach().clone() for name, p in self.run.model.named_parameters()}
        if state.global_step == 2:
            self.early = now
        if state.global_step == 6:
            for name, early in self.early.items():
                assert torch.equal(now[name], early * self.run.masks.get(name, torch.ones_like(early)))


def main() -> int:
    model = tiny_llama()
    run = begin(model, Rewinder(rewind_to=2))
    trainer = Trainer(
        model=model,
        args=arguments(Path(sys.argv[1]), max_steps=14, ddp_backend="gloo"),
        train_dataset=sentences(64),
        callbacks=[*hf_optim.callbacks(model), Check(run)],
    )
    trainer.train()
    assert collectives.world_size() == 2
    sums = torch.stack([p.detach().double().abs().sum() for p in model.parameters()])
    found = [collectives.all_reduce_(sums.clone(), how) for how in ("min", "max")]
    assert torch.equal(*found)
    assert rounds_of(run).done == 2
    print("agreed")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
