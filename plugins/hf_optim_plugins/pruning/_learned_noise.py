"""What the techniques share that train noise beside the weights, and remove by it: optimizer group, callback, end.

The weight of the price is a ramp, ``r(t) = clamp((t - begin) / (end - begin), 0, 1)``; at ``settle`` weights are
removed for good, and what is left trains on without noise. A ramp that is not through by then is said at the start.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from hf_optim import RecipeError
from hf_optim.toolkit.pruning import (
    NoisyLayer,
    as_step,
    cut_schedule_message,
    linear_schedule,
    noisy_layers,
    require_unsharded,
)

if TYPE_CHECKING:
    from hf_optim import Run


def optimizer_group(layers: Mapping[str, NoisyLayer], rate: float | None) -> list[dict[str, Any]]:
    """The group of what the noise learns, without weight decay; at ``rate``, or where None at that of the weights."""
    found = list(noisy_layers.noise_parameters(layers).values())
    return [{"params": found, "weight_decay": 0.0, **({} if rate is None else {"lr": rate})}]


def release(own: SimpleNamespace, layers: Mapping[str, NoisyLayer], *keys: str) -> None:
    """Take the noise out of the layers, and out of a step's state together with ``keys``."""
    noisy_layers.clear_noise_parameters(own, layers)
    for layer in layers.values():
        noisy_layers.detach_noise(layer)
    for key in ("layers", *keys):
        vars(own).pop(key, None)


class NoiseTraining(TrainerCallback):
    """Lets the price rise, and removes weights when their time comes."""

    def __init__(self, step: Any, run: Run, layers: Mapping[str, NoisyLayer], noises: Sequence[Any]) -> None:
        """Of a step in a run.

        Args:
            step: has ``begin``, ``end``, ``settle``, ``remove(run)``, and ``cut_off(share)``, which says what comes of
                a ramp that ends at this share of its height.
            run: the run.
            layers: in training, by name.
            noises: each is ``active`` or not.
        """
        self.step, self.run, self.layers, self.noises = step, run, layers, noises

    @property
    def own(self) -> SimpleNamespace:
        """The state of the step."""
        return self.run.state(self.step)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        require_unsharded(self.layers)
        self._look_at_the_ramp(state.max_steps)
        noisy_layers.lower_adam_epsilon(kwargs.get("optimizer"), self.layers)
        noisy_layers.load_noise_parameters(self.own, self.layers)
        if state.global_step == 0:
            self.own.settled = False
        self._move(state)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._move(state)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self.own.settled and state.global_step == as_step(self.step.settle, state.max_steps):
            self.step.remove(self.run)
            self.own.settled = True
        self._move(state)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # load_best_model_at_end may have read another checkpoint.
        noisy_layers.load_noise_parameters(self.own, self.layers)

    def _look_at_the_ramp(self, max_steps: int) -> None:
        step = self.step
        begin, end, settle = (as_step(position, max_steps) for position in (step.begin, step.end, step.settle))
        if begin > end:
            raise RecipeError(
                f"{self.run.label(step)}: the ramp begins at step {begin} and ends at step {end} of {max_steps}; give "
                "begin and end both as steps or both as shares"
            )
        last = min(settle, max_steps)
        if end <= last:
            return
        cut, remedy = f"training at step {max_steps}", "train longer, or lower end"
        if settle < max_steps:
            cut, remedy = f"weights are removed for good at step {settle}", "raise settle, or lower end"
        reached = step.cut_off(linear_schedule(last, begin, end))
        self.run.warn(step, cut_schedule_message(end, cut, reached, remedy))

    def _move(self, state: Any) -> None:
        begin, end = (as_step(position, state.max_steps) for position in (self.step.begin, self.step.end))
        self.own.ramp = linear_schedule(state.global_step, begin, end)
        for noise in self.noises:
            noise.active = not self.own.settled
