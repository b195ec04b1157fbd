"""Base of the techniques that train noise (gates, variances) with the weights and prune by its parameters.

A penalty on the noise is weighted by a linear schedule, ``r(t) = clamp((t - begin) / (end - begin), 0, 1)``. At step
``settle`` weights are removed for good, and the remaining ones train on without noise. A schedule that does not finish
by then is warned about at the start of training.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import TrainerCallback

from hf_optim import Contract, RecipeError, Scope, Technique, hookimpl, traits
from hf_optim.toolkit import topology
from hf_optim.toolkit.pruning import (
    masked_layers,
    masks,
    noisy_layers,
    schedules,
    sparsity,
)

if TYPE_CHECKING:
    from hf_optim import Card, Run

NO_EXPERTS = (
    "noise is learned in the forward of linear layers, and these experts are stacked matrices; magnitude, nm, gmp, "
    "pruning in rounds, sr_ste and top_kast prune them"
)
CONTRACT = Contract(
    needs={traits.FLOAT_WEIGHTS},
    adds={traits.SPARSE},
    keeps={traits.SPARSE, traits.SPARSE_NM},
    owns={masked_layers.TRAINING_FORWARD},
)


class LearnedNoise(Technique):
    """A technique with the fields ``begin``, ``end``, ``settle``, ``targets`` and ``skip``.

    The state of the step has ``layers`` (name -> layer in training), ``noises`` (name -> the noise of that layer),
    ``ramp`` (the weight of the penalty, 0 to 1) and ``settled`` (True once weights are removed).

    Attributes:
        title: the heading of its paragraph on the card.
        scratch: names in the state of the step that mean nothing after the stage.
    """

    begin: int | float
    end: int | float
    settle: int | float
    targets: tuple[str, ...]
    skip: tuple[str, ...]

    title = ""
    scratch: tuple[str, ...] = ()

    # -- for subclasses -----------------------------------------------------------------------------------------------
    def attach(self, run: Run, layers: Mapping[str, nn.Module], skipped: Mapping[str, list[str]]) -> dict[str, Any]:
        """Attach noise to ``layers`` and record the coverage; return the noise of each layer by name.

        Each noise has a ``layer`` and can be switched off with ``active``. Raises ``ModelError`` if there is none.
        """
        raise NotImplementedError

    def noise_learning_rate(self) -> float | None:
        """Return the learning rate of the noise parameters, or None for that of the weights."""
        raise NotImplementedError

    def remove(self, run: Run) -> None:
        """Remove weights for good, by the parameters of the noise."""
        raise NotImplementedError

    def shortfall(self, share: float) -> str:
        """Return a clause on the effect of a schedule that ends at this share of its height."""
        raise NotImplementedError

    def outcome(self, run: Run) -> dict[str, Any]:
        """Return the metrics for the record, in addition to the sparsity."""
        raise NotImplementedError

    def description(self) -> str:
        """Return the sentence of the card on how weights were chosen."""
        raise NotImplementedError

    # -- shared hooks -------------------------------------------------------------------------------------------------
    def takes(self, module: Any) -> bool:
        return topology.is_linear(module)

    def supported(self, scope: Scope) -> tuple[dict[str, Any], dict[str, list[str]]]:
        """Return the selected layers that noise can be attached to, and the names of the others, by reason."""
        selected = scope.select(self.targets, self.skip, experts=True)
        layers = {name: layer for name, layer in selected.items() if self.takes(layer)}
        found, skipped = masked_layers.select_supported(scope.model, layers)
        return found, skipped | topology.unprunable_experts(scope.model, self.targets, self.skip, NO_EXPERTS)

    def validate(self) -> None:
        schedules.check_positions(self.name, begin=self.begin, end=self.end, settle=self.settle)

    def prepare(self, run: Run) -> dict[str, noisy_layers.NoisyLayer]:
        """Return the layers in training by name; the first call attaches the noise. Raises ``ModelError`` if none."""
        own = run.state(self)
        if not hasattr(own, "layers"):
            found, skipped = self.supported(Scope("", run.model, run.model))
            weights = {name: layer.get_parameter("weight") for name, layer in found.items()}
            masks.require_finite(weights, run.label(self))
            own.noises, own.settled = self.attach(run, found, skipped), False
            own.layers = {name: noise.layer for name, noise in own.noises.items()}
            noisy_layers.store_noise_parameters(own, own.layers)
        return own.layers

    @hookimpl
    def parameter_groups(self, run: Run, model: nn.Module) -> list[dict[str, Any]]:
        found = list(noisy_layers.noise_parameters(self.prepare(run)).values())
        rate = self.noise_learning_rate()
        return [{"params": found, "weight_decay": 0.0, **({} if rate is None else {"lr": rate})}]

    @hookimpl
    def finalize_model(self, run: Run) -> None:
        own, layers = run.state(self), self.prepare(run)
        if not getattr(own, "settled", False):
            self.remove(run)
        noisy_layers.clear_noise_parameters(own, layers)
        for layer in layers.values():
            noisy_layers.detach_noise(layer)
        for key in ("layers", "noises", *self.scratch):
            vars(own).pop(key, None)
        names, _ = run.covered(self) or (set(), {})
        run.report(self, **sparsity.metrics(run.model, names), **self.outcome(run))

    @hookimpl
    def export(self, run: Run, directory: Path, card: Card) -> None:
        metrics = run.reported(self)
        card.paragraph(
            self.title,
            f"{self.description()} {100 * metrics['sparsity']:.1f} % of the targeted weights are zero.",
        )
        card.table(
            f"{self.title}: sparsity of the layers", sparsity.TABLE_HEADER, sparsity.table_rows(metrics["counted"])
        )


class NoiseTraining(TrainerCallback):
    """Raises the weight of the penalty along its schedule, and removes weights at step ``settle``."""

    def __init__(self, step: Any, run: Run) -> None:
        self.step, self.run, self.layers = step, run, step.prepare(run)

    @property
    def own(self) -> SimpleNamespace:
        """The state of the step."""
        return self.run.state(self.step)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        masked_layers.require_unsharded(self.layers)
        self._check_schedule(state.max_steps)
        noisy_layers.lower_adam_epsilon(kwargs.get("optimizer"), self.layers)
        noisy_layers.load_noise_parameters(self.own, self.layers)
        if state.global_step == 0:
            self.own.settled = False
        self._update(state)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._update(state)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self.own.settled and state.global_step == schedules.as_step(self.step.settle, state.max_steps):
            self.step.remove(self.run)
            self.own.settled = True
        self._update(state)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # load_best_model_at_end may have read another checkpoint.
        noisy_layers.load_noise_parameters(self.own, self.layers)

    def _check_schedule(self, max_steps: int) -> None:
        """Raise ``RecipeError`` for a schedule that ends before it begins; warn if it does not finish."""
        step = self.step
        begin, end, settle = (
            schedules.as_step(position, max_steps) for position in (step.begin, step.end, step.settle)
        )
        if begin > end:
            raise RecipeError(
                f"{self.run.label(step)}: the schedule begins at step {begin} and ends at step {end} of {max_steps}; "
                "give begin and end both as steps or both as shares"
            )
        last = min(settle, max_steps)
        if end <= last:
            return
        cut, remedy = f"training at step {max_steps}", "train longer, or lower end"
        if settle < max_steps:
            cut, remedy = f"weights are removed for good at step {settle}", "raise settle, or lower end"
        reached = step.shortfall(schedules.linear_schedule(last, begin, end))
        self.run.warn(step, schedules.cut_schedule_message(end, cut, reached, remedy))

    def _update(self, state: Any) -> None:
        begin, end = (schedules.as_step(position, state.max_steps) for position in (self.step.begin, self.step.end))
        self.own.ramp = schedules.linear_schedule(state.global_step, begin, end)
        for noise in self.own.noises.values():
            noise.active = not self.own.settled
