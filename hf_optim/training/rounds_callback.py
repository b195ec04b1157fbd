"""Iterative pruning in a stock ``Trainer``: one training with a dense phase and retraining phases."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, get_scheduler

from ..errors import CheckpointError, ModelError, RecipeError
from ..toolkit.pruning.rewinding import LRMultiplier, hold_after, require_lambda_lr
from ..toolkit.pruning.rounds import RetrainingPhases, round_sparsity
from .end_of_stage import has_adapters
from .pruning_rounds import Rounds

log = logging.getLogger(__name__)


class RoundTraining(TrainerCallback):
    """Drives ``Rounds``: prunes at the start of each round, and rewinds the learning rate.

    All of it happens right after an optimizer step, before the checkpoint of that step is written, so a resumed
    training finds the round begun. The schedule of the training arguments spans one phase instead of all of training; a
    scheduler passed by the caller is used unchanged as that of one phase. Only checkpoints of the current round compete
    for the best: earlier ones are less sparse.
    """

    def __init__(
        self,
        rounds: Rounds,
        *,
        dense: bool,
        rewind_to: int | float = 0,
        keeps_point: bool = False,
        renew: Callable[[Rounds, Any], None] | None = None,
        held: Callable[[float], float] | None = None,
    ) -> None:
        """Describe how training is divided into phases.

        Args:
            rounds: what is pruned.
            dense: True if a dense phase precedes the first round.
            rewind_to: position in the schedule where rounds begin: a step, or a fraction of one phase.
            keeps_point: True to write a rewind checkpoint ``output_dir/rewind-K`` at that step.
            renew: called with the rounds and the optimizer after each pruning, to restore weights.
            held: for retraining at a constant rate: maps the schedule's last multiplier to that of retraining.
        """
        self.rounds, self.dense, self.rewind_to = rounds, dense, rewind_to
        self.keeps_point, self.renew, self.held = keeps_point, renew, held

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self.rounds.active:
            return
        self._check_model()
        phases = self._phases(state.max_steps)
        self.rounds.home = Path(args.output_dir)
        self._schedule(args, phases, kwargs["lr_scheduler"])
        if state.global_step > 0:
            self._resume(state)
            return
        self.rounds.reset()
        self.rounds.state.max_steps = state.max_steps
        self._announce(phases, args)
        self.rounds.restart(kwargs["lr_scheduler"])
        self._act(args, state, phases, kwargs)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.rounds.active:
            self._act(args, state, self._phases(state.max_steps), kwargs)

    def _act(self, args: Any, state: Any, phases: RetrainingPhases, kwargs: Any) -> None:
        rounds, optimizer = self.rounds, kwargs["optimizer"]
        if self.keeps_point and state.global_step == phases.rewind_step:
            rounds.point(rounds.home / f"rewind-{phases.rewind_step}", optimizer, write=args.should_save)
        if phases.round_at(state.global_step):
            rounds.next()
            if self.renew is not None:
                self.renew(rounds, optimizer)
            rounds.restart(kwargs["lr_scheduler"], phases.rewind_step if self.held is None else phases.length)
            state.best_metric = state.best_global_step = state.best_model_checkpoint = None

    # -- before the first step ------------------------------------------------------------------------------------
    def _phases(self, max_steps: int) -> RetrainingPhases:
        phases = RetrainingPhases.divide(max_steps, self.rounds.rounds, self.dense, self.rewind_to)
        if not phases.rounds_that_fit:
            raise RecipeError(
                f"{self.rounds.label}: a training of {max_steps} steps has no room for a round of retraining after "
                f"{phases.round_start(1)} steps: train longer, or lower rewind_to"
            )
        return phases

    def _check_model(self) -> None:
        if has_adapters(self.rounds.run):
            raise ModelError(
                f"{self.rounds.label}: rounds rank and rewind the weights themselves, which adapters do not change: "
                "train the model without adapters, and add them for recovery"
            )
        if self.keeps_point:
            self.rounds.require_whole()

    def _schedule(self, args: Any, phases: RetrainingPhases, scheduler: Any) -> None:
        scheduler = require_lambda_lr(scheduler, self.rounds.label)
        length, own = phases.length, list(scheduler.lr_lambdas)
        described = _multiplier(args, scheduler, phases.max_steps)
        if all(_same(one, described) for one in own):
            own = [_multiplier(args, scheduler, length)] * len(own)
        held = self.held
        scheduler.lr_lambdas = [
            hold_after(one, length, held(one(length - 1)) if held is not None else None) for one in own
        ]

    def _resume(self, state: Any) -> None:
        planned = getattr(self.rounds.state, "max_steps", None)
        if planned != state.max_steps:
            raise CheckpointError(
                f"{self.rounds.label}: the checkpoint is of a training of {planned} steps, whose rounds begin at other "
                f"steps than those of one of {state.max_steps}: resume with the same max_steps, or start again from "
                "its weights"
            )
        if self.rounds.state.point is not None and self.rounds.left:
            self.rounds.find_point()

    def _announce(self, phases: RetrainingPhases, args: Any) -> None:
        rounds = self.rounds
        if phases.rounds_that_fit < rounds.rounds:
            reached = round_sparsity(rounds.sparsity, phases.rounds_that_fit, rounds.rounds)
            self._warn(
                f"{phases.max_steps} steps have room for {phases.rounds_that_fit} of {rounds.rounds} rounds: "
                f"the model reaches a sparsity of {reached:.4f} instead of {rounds.sparsity:g}; train longer, or lower "
                "rounds"
            )
        warm_up = args.get_warmup_steps(phases.length)
        if phases.length <= warm_up < phases.max_steps:
            self._warn(
                f"a warm-up of {warm_up} steps does not end within a phase of {phases.length}; train longer, or "
                "give the warm-up as a fraction (warmup_steps below 1)"
            )

    def _warn(self, sentence: str) -> None:
        sentence = f"{self.rounds.label}: {sentence}"
        self.rounds.run.record.note(sentence)
        log.warning(sentence)


def _multiplier(args: Any, scheduler: Any, steps: int) -> LRMultiplier:
    """Return the learning-rate multiplier of the training arguments for ``steps`` steps."""
    aside = torch.optim.SGD([torch.zeros(1)], lr=scheduler.optimizer.defaults["lr"])
    made: Any = get_scheduler(
        args.lr_scheduler_type,
        optimizer=aside,
        num_warmup_steps=args.get_warmup_steps(steps),
        num_training_steps=steps,
        scheduler_specific_kwargs=args.lr_scheduler_kwargs,
    )
    return made.lr_lambdas[0]


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, functools.partial) and isinstance(other, functools.partial):
        return (one.func, one.args, one.keywords) == (other.func, other.args, other.keywords)
    return one is other
