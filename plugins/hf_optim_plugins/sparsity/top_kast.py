"""Top-KAST: sparse forward and backward passes from the first step to the last (Jayakumar et al., 2106.03517).

In every layer, ``A`` is the share ``D`` of the weights that is largest by magnitude, and ``B ⊇ A`` the share ``D + M``.
The forward computes with ``α = A ∘ θ``; the weights in ``B`` take its gradient, the others keep their values. A weight
of ``B \\ A`` that grows enters ``A``::

    Δθ_i = -γ ∂L(α)/∂α_i   for i ∈ B,   0 elsewhere

So that ``A`` changes during training, a penalty holds weights down, and those that are only explored ``1/D`` times as
hard, which keeps the two sets in competition::

    R = c (Σ_{i ∈ A} r(θ_i) + 1/D Σ_{i ∈ B \\ A} r(θ_i))     r(θ) = θ²/2  (l2)  or |θ|  (l1)

The paper calls the penalty L2 and prints it with ``|θ|``: both are available, and the default follows the name.

The penalty is applied as its gradient, ``c θ`` or ``c sign(θ)``, added to the gradients after the backward pass and
clipping. A stock ``Trainer`` therefore suffices, and the loss it logs is the task's. The memory and time that the
paper's sparse tensors would save are not saved here: masks over dense weights compute the same numbers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from transformers import TrainerCallback

from hf_optim import (
    Contract,
    Paper,
    RecipeError,
    Reload,
    hookimpl,
    option,
    technique,
    traits,
)
from hf_optim.toolkit.checkpoint import NamedTensors
from hf_optim.toolkit.pruning import (
    masked_layers,
    masks,
    schedules,
    sparsity,
)

from ._masked_training import MaskedTraining

if TYPE_CHECKING:
    from hf_optim import Card, Run

Layer = masked_layers.MaskedLayer | masked_layers.MaskedStack
# The supports as a checkpoint saves them, one number per weight; 0 is outside.
EXPLORED, ACTIVE = 1, 2


@technique(
    "top_kast",
    family="sparsity",
    paper=Paper("2106.03517", "Top-KAST: Top-K Always Sparse Training", 2020),
    contract=Contract(
        needs={traits.FLOAT_WEIGHTS},
        adds={traits.SPARSE},
        keeps={traits.SPARSE, traits.SPARSE_NM},
        owns={masked_layers.TRAINING_FORWARD},
    ),
    reload=Reload.STOCK_DENSE,
    trains=True,
    parallel={"data": "yes"},
)
class TopKAST(MaskedTraining):
    """Train with a constant sparsity in forward and backward, and let weights compete for their place.

    Runs in a stock ``Trainer`` with ``hf_optim.callbacks(model)``. A ``checkpoint-N`` also holds the weights outside
    ``A``, and the supports in a file beside them. When training ends, the weights outside ``A`` become zero. Weights
    that an earlier step removed stay removed, and count. No weight outside ``B`` changes, whatever the optimizer does
    (weight decay, running means).

    Attributes:
        sparsity: share of the weights that the forward leaves out, ``1 - D``, in [0, 1).
        backward_sparsity: share that takes no gradient, ``1 - (D + M)``, at most ``sparsity``; if equal to it
            (``M = 0``), the supports are static.
        penalty: ``"l2"`` or ``"l1"``.
        strength: ``c``, the weight of the penalty.
        every: optimizer steps between renewals of the supports. Explored weights change for that long without being
            used: in 240 steps of Adam on a small language model, a renewal every 10 steps did not improve on static
            sparsity, and one at every step was far better.
        end: the end of exploration: a step, or a share of training if a float. From then on ``B = A``, and both stay.
            None explores throughout training.
        targets: linear layers and matrices of experts, by class, name or pattern; output heads only if named exactly.
        skip: patterns of layers to leave dense.
    """

    sparsity: float = option(0.8, low=0.0, below=1.0)
    backward_sparsity: float = option(0.5, low=0.0, below=1.0)
    penalty: Literal["l2", "l1"] = "l2"
    strength: float = option(1e-4, low=0.0)
    every: int = option(1, low=1)
    end: int | float | None = option(None, low=0)
    targets: tuple[str, ...] = ("Linear",)
    skip: tuple[str, ...] = ()

    def validate(self) -> None:
        if self.backward_sparsity > self.sparsity:
            raise RecipeError(
                f"top_kast: backward_sparsity must be <= sparsity (the gradient reaches more weights than the forward "
                f"uses), not {self.backward_sparsity} > {self.sparsity}"
            )
        schedules.check_positions(self.name, end=self.end)

    @hookimpl
    def training_callbacks(self, run: Run) -> list[TrainerCallback]:
        return [Exploration(self, run, self.prepare(run))]

    def supports(self, run: Run, layers: Mapping[str, Layer]) -> dict[str, tuple[Tensor, Tensor]]:
        """Return ``(A, B)`` of every layer for its current weight. Raises ``NumericalError`` for infinite or NaN.

        Each matrix of an expert is a layer of its own; the supports of a stack are those of all its experts.
        """
        found = {}
        for name, layer in layers.items():
            weights = layer.matrices(name)
            masks.require_finite(weights, run.label(self))
            used = masks.layer_masks(weights, self.sparsity, run.masks)
            reached = masks.layer_masks(weights, self.backward_sparsity, run.masks)
            found[name] = (layer.whole(name, used), layer.whole(name, reached))
        return found

    def saved_supports(self, run: Run) -> NamedTensors:
        """Return the supports by layer name that checkpoints save: uint8, ``ACTIVE``, ``EXPLORED`` or 0."""
        return NamedTensors(run.state(self), "support")

    @hookimpl
    def finalize_model(self, run: Run) -> None:
        layers, saved = self.prepare(run), self.saved_supports(run)
        fresh = {} if all(name in saved for name in layers) else self.supports(run, layers)
        last = {name: saved[name] == ACTIVE if name in saved else fresh[name][0] for name in layers}
        saved.clear()
        for name, layer in layers.items():
            parameter = layer.key(name)
            masked_layers.detach_masks(layer)
            masks.prune_(run.model, run.masks, {parameter: last[name]})
        names, _ = run.covered(self) or (set(), {})
        run.report(self, **sparsity.metrics(run.model, names))

    def recompute(self, case: Any) -> dict[str, Any]:
        return case.zeros()

    @hookimpl
    def export(self, run: Run, directory: Path, card: Card) -> None:
        metrics = run.reported(self)
        explored = "throughout" if self.end is None else f"until {self.end} ({_unit(self.end)})"
        card.paragraph(
            "Sparse training (Top-KAST)",
            f"Trained with {100 * (1 - self.sparsity):g} % of each layer's weights in the forward and "
            f"{100 * (1 - self.backward_sparsity):g} % in the backward pass, exploring {explored}, with an "
            f"{self.penalty} penalty of {self.strength:g}; {100 * metrics['sparsity']:.1f} % of the targeted weights "
            f"are zero. The dense layers computed with masks, so training was not cheaper.",
        )
        card.table("Sparsity after Top-KAST", sparsity.TABLE_HEADER, sparsity.table_rows(metrics["counted"]))


def _unit(position: int | float) -> str:
    return "steps" if isinstance(position, int) else "share of training"


class Exploration(TrainerCallback):
    """Renews the supports, adds the penalty's gradient, and restores the weights outside ``B`` after each step."""

    def __init__(self, step: TopKAST, run: Run, layers: Mapping[str, Layer]) -> None:
        self.step, self.run, self.layers = step, run, layers
        self._held: dict[str, Tensor] = {}
        for name, supports in step.supports(run, layers).items():
            layers[name].set_masks(*supports)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        masked_layers.require_unsharded(self.layers, self.run.label(self.step))
        end, last = self._end(state), state.max_steps
        if end > last:
            self.run.warn(
                self.step,
                f"exploration ends at step {end}, but training at step {last}: the supports will be renewed to the "
                "last; train longer, or lower end",
            )
        if state.global_step > 0:
            own, label = self.run.state(self.step), self.run.label(self.step)
            saved = masked_layers.read_layer_state(own, "support", self.layers, label)
            self._set({name: (support == ACTIVE, support >= EXPLORED) for name, support in saved.items()})
        else:
            self._renew(0, end, kwargs.get("optimizer"))

    @torch.no_grad()
    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        step = self.step
        if step.strength:
            penalize_(self.layers.values(), step.strength, 1.0 - step.sparsity, step.penalty)
        self._held = {name: layer.weight.detach().clone() for name, layer in self.layers.items()}

    @torch.no_grad()
    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for name, layer in self.layers.items():
            if name in self._held and layer.backward_mask is not None:
                layer.weight.copy_(torch.where(layer.backward_mask, layer.weight, self._held.pop(name)))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        end = self._end(state)
        due = state.global_step % self.step.every == 0 and state.global_step < end
        if due or (state.global_step == end and self.step.end is not None):
            self._renew(state.global_step, end, kwargs.get("optimizer"))

    def _end(self, state: Any) -> int:
        return state.max_steps if self.step.end is None else schedules.as_step(self.step.end, state.max_steps)

    def _renew(self, now: int, end: int, optimizer: Any) -> None:
        static = self.step.backward_sparsity == self.step.sparsity
        if static and now > 0:
            return
        found = self.step.supports(self.run, self.layers)
        if now >= end:
            found = {name: (used, used) for name, (used, _) in found.items()}
        self._set(found)
        for layer in self.layers.values():
            assert layer.backward_mask is not None
            masked_layers.clear_running_means(optimizer, layer.weight, layer.backward_mask)

    def _set(self, found: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        saved = self.step.saved_supports(self.run)
        for name, layer in self.layers.items():
            used, reached = found[name]
            layer.set_masks(used, reached)
            saved[name] = used.to(torch.uint8) + reached.to(torch.uint8)


@torch.no_grad()
def penalize_(layers: Iterable[Layer], strength: float, density: float, kind: Literal["l2", "l1"]) -> None:
    """Add the penalty's gradient to the gradients: ``c r'(θ)`` in ``A``, ``c/D r'(θ)`` in ``B \\ A``, 0 elsewhere."""
    for layer in layers:
        used, reached = layer.forward_mask, layer.backward_mask
        if layer.weight.grad is None or used is None or reached is None:
            continue
        slope = layer.weight.detach() if kind == "l2" else layer.weight.detach().sign()
        if (targeted := layer.targeted()) is not None:
            slope = slope * targeted
        layer.weight.grad.add_(slope * used, alpha=strength)
        layer.weight.grad.add_(slope * (reached & ~used), alpha=strength / density)


@hookimpl
def register_techniques(register):
    register(TopKAST)
