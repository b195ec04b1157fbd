"""SR-STE: learn N:M sparse weights in training, with a mask renewed at each step (Zhou et al., 2102.04010).

Every forward computes with ``W̃ = M(W) ∘ W``, where ``M(W)`` keeps the ``N`` largest weights by magnitude of every
``M`` along the input. Every weight takes the gradient ``g = ∂L/∂W̃`` (the straight-through estimator, STE), so that a
weight that is masked out now may come back. STE alone changes masks too often; the sparse-refined estimator lets the
weights that are masked out decay::

    W_{t+1} = W_t - γ_t (g_t + λ ((1 - M(W_t)) ∘ W_t))

``γ`` is the learning rate, and ``λ = 0`` is STE. (One survey prints the term with the other sign and without ``γ``.)
The formula is that of plain gradient descent. Under an optimizer with running means, such as Adam, it can be read in
two ways: see ``term``.

The paper's ``λ = 2e-4`` belongs to SGD at a rate of 0.1 over the half million steps of its ImageNet training: a step
takes off the share ``γ λ = 2e-5``, and all steps together, at the highest rate, ten times the weight. With the rates of
Adam and a few thousand steps the same ``λ`` takes off nothing. So the default keeps the total instead of ``λ``: ``γ λ =
10 / steps`` at the highest rate, which is the paper's value in the paper's training, and at most 0.1.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
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
    decay_checks,
    masked_layers,
    masks,
    nm_groups,
    schedules,
    sparsity,
)

from ._masked_training import MaskedTraining

if TYPE_CHECKING:
    from hf_optim import Card, Run


log = logging.getLogger(__name__)
Layer = masked_layers.MaskedLayer | masked_layers.MaskedStack
# λ of the paper, for its optimizer.
PAPER_DECAY = 2e-4


@technique(
    "sr_ste",
    family="sparsity",
    paper=Paper("2102.04010", "Learning N:M Fine-grained Structured Sparse Neural Networks From Scratch", 2021),
    contract=Contract(
        needs={traits.FLOAT_WEIGHTS},
        adds={traits.SPARSE, traits.SPARSE_NM},
        keeps={traits.SPARSE, traits.SPARSE_NM},
        owns={masked_layers.TRAINING_FORWARD},
    ),
    reload=Reload.STOCK_DENSE,
    trains=True,
    parallel={"data": "yes"},
)
class SRSTE(MaskedTraining):
    """Train with N:M sparse weights whose mask follows the dense weights behind them.

    Runs in a stock ``Trainer`` with ``hf_optim.callbacks(model)``. During training the model computes with sparse
    weights, in evaluation too, and keeps dense ones: a ``checkpoint-N`` is an ordinary dense checkpoint. When training
    ends, the weights that are masked out become zero. Weights that an earlier step removed stay removed. Steps are
    optimizer steps if whole numbers, and shares of training if floats.

    The term is added after the gradients are clipped (it does not add to their norm) and unscaled.

    Attributes:
        keep: weights kept in a group (the N of N:M).
        group: consecutive input weights in a group (the M); sparse tensor cores support 2 of 4.
        decay: ``λ``; 0 is the straight-through estimator. None follows the learning rate, so that the term has an
            effect under any optimizer: a step at the highest rate takes off the share ``γ λ = min(0.1, 10 / steps)`` of
            a weight (with ``term: gradient`` and an optimizer other than SGD, the paper's ``λ = 2e-4``). A value that
            takes off less than 1 % in the whole training is reported in a warning. A share above 1 turns the sign of a
            weight at every step, and above 2 lets it grow without bound: it is refused at the start of training, under
            SGD for both places of the term.
        term: where the decay is applied. ``"update"`` subtracts ``γ λ W`` from the weights that are masked out, apart
            from the optimizer's step, as decoupled weight decay does; ``"gradient"`` adds ``λ W`` to their gradient, so
            that it passes through the running means. With SGD without momentum both are the formula.
        begin: when sparsity starts, after training without it.
        end: the last renewal of the mask, which then stays; None renews it throughout training.
        every: optimizer steps between renewals.
        targets: linear layers and matrices of experts, by class, name or pattern; output heads only if named exactly.
        skip: patterns of layers to leave dense.
    """

    keep: int = option(2, low=1)
    group: int = option(4, low=2)
    decay: float | None = option(None, low=0.0)
    term: Literal["update", "gradient"] = "update"
    begin: int | float = option(0, low=0)
    end: int | float | None = option(None, low=0)
    every: int = option(1, low=1)
    targets: tuple[str, ...] = ("Linear",)
    skip: tuple[str, ...] = ()

    def validate(self) -> None:
        if self.keep >= self.group:
            raise RecipeError(f"sr_ste: keep must be < group, not {self.keep} of {self.group}: that removes nothing")
        schedules.check_positions(self.name, begin=self.begin, end=self.end)

    @property
    def masks_follow_weights(self) -> bool:
        """True if the current masks always follow from the current weights, so that checkpoints need not save them."""
        return self.every == 1 and self.end is None

    @hookimpl
    def training_callbacks(self, run: Run) -> list[TrainerCallback]:
        return [SparseRefinement(self, run, self.prepare(run))]

    def eligible(self, layers: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, list[str]]]:
        return nm_groups.select_divisible(layers, self.group)

    def mask(self, run: Run, name: str, layer: Layer) -> Tensor:
        """Return ``M(W)`` of a layer for its current weight, in the layout in which the weight is stored.

        Experts of a stack that are not targets keep all their weights.
        """
        kept = run.masks.get(layer.key(name))
        rows = masks.nm_mask(layer.out_in(), self.keep, self.group, None if kept is None else layer.stored(kept))
        mask, targeted = layer.stored(rows), layer.targeted()
        return mask if targeted is None else mask | ~targeted

    def saved_masks(self, run: Run) -> NamedTensors:
        """Return the masks by layer name that checkpoints save; empty if they follow from the weights."""
        return NamedTensors(run.state(self), "mask")

    @hookimpl
    def finalize_model(self, run: Run) -> None:
        layers, saved = self.prepare(run), self.saved_masks(run)
        last = {name: saved[name] if name in saved else self.mask(run, name, layer) for name, layer in layers.items()}
        saved.clear()
        for name, layer in layers.items():
            parameter, whole = layer.key(name), layer.targeted() is None
            masked_layers.detach_masks(layer)
            masks.prune_(run.model, run.masks, {parameter: last[name]})
            if whole:
                nm_groups.record_pattern(run.nm_patterns, parameter, self.keep, self.group)
        names, _ = run.covered(self) or (set(), {})
        run.report(self, pattern=f"{self.keep}:{self.group}", **sparsity.metrics(run.model, names))

    def recompute(self, case: Any) -> dict[str, Any]:
        return {"pattern": case.pattern(self.keep, self.group), **case.zeros()}

    @hookimpl
    def export(self, run: Run, directory: Path, card: Card) -> None:
        metrics, (_, skipped) = run.reported(self), run.covered(self) or (set(), {})
        decay = "a λ that follows the learning rate" if self.decay is None else f"λ = {self.decay:g}"
        layers = sparsity.counted_phrase(metrics)
        left = "".join(f" Left dense ({why}): {len(which)} layers." for why, which in sorted(skipped.items()))
        card.paragraph(
            f"{self.keep}:{self.group} sparsity learned in training (SR-STE)",
            f"{layers} were trained with at most {self.keep} of every {self.group} consecutive weights along the "
            "input; the mask followed the weights, and masked-out weights decayed with "
            f"{decay} ({self.term}).{left}",
        )
        card.table(
            f"Sparsity of the {self.keep}:{self.group} layers",
            sparsity.TABLE_HEADER,
            sparsity.table_rows(metrics["counted"]),
        )


class SparseRefinement(TrainerCallback):
    """Renews the masks after optimizer steps, and lets the weights that are masked out decay."""

    def __init__(self, step: SRSTE, run: Run, layers: Mapping[str, Layer]) -> None:
        self.step, self.run, self.layers = step, run, layers
        self.decay = step.decay or 0.0
        if step.begin == 0:
            for name, layer in layers.items():
                layer.set_masks(step.mask(run, name, layer))

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        masked_layers.require_unsharded(self.layers, self.run.label(self.step))
        begin, _ = self._span(state)
        if begin > state.max_steps:
            self.run.warn(
                self.step,
                f"sparsity begins at step {begin}, but training ends at step {state.max_steps}: the model will be "
                "pruned once, at the end, and not trained sparse; train longer, or lower begin",
            )
        self._set_decay(kwargs.get("optimizer"), kwargs.get("lr_scheduler"), state.max_steps)
        if state.global_step < begin:
            self._set({})
        elif state.global_step == 0 or self.step.masks_follow_weights:
            self._renew()
        else:
            self._set(
                masked_layers.read_layer_state(
                    self.run.state(self.step), "mask", self.layers, self.run.label(self.step)
                )
            )

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        optimizer = kwargs.get("optimizer")
        if self.decay and not (self.step.term == "update" and masked_layers.will_skip_step(optimizer)):
            apply_decay_(self.layers.values(), self.decay, self.step.term, masked_layers.learning_rates(optimizer))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        begin, end = self._span(state)
        if begin <= state.global_step <= end and (state.global_step - begin) % self.step.every == 0:
            self._renew()

    def _span(self, state: Any) -> tuple[int, int]:
        step, last = self.step, state.max_steps
        return schedules.as_step(step.begin, last), last if step.end is None else schedules.as_step(step.end, last)

    def _renew(self) -> None:
        self._set({name: self.step.mask(self.run, name, layer) for name, layer in self.layers.items()})

    def _set(self, found: Mapping[str, Tensor]) -> None:
        saved = self.step.saved_masks(self.run)
        for name, layer in self.layers.items():
            layer.set_masks(found.get(name))
            if layer.forward_mask is not None and not self.step.masks_follow_weights:
                saved[name] = layer.forward_mask

    def _set_decay(self, optimizer: Any, scheduler: Any, max_steps: int) -> None:
        """Choose the decay by the highest learning rate, or check the one that is given."""
        # W -= γ λ W, whatever the gradient: under SGD in both places of the term (momentum only adds to it), and under
        # any optimizer where the term is part of the update.
        sgd = isinstance(getattr(optimizer, "optimizer", optimizer), torch.optim.SGD)
        decays = sgd or self.step.term == "update"
        weights = [layer.weight for layer in self.layers.values()]
        peak = decay_checks.peak_rate(optimizer, scheduler, weights, max_steps) if decays else 0.0
        given = self.step.decay
        if given is None:
            self.decay = decay_checks.following_decay(peak, max_steps) if decays else PAPER_DECAY
            log.info("%s: decay is %.3g", self.run.label(self.step), self.decay)
        elif decays:
            decay_checks.check_decay_stability(peak, given, self.run.label(self.step))
            warning = decay_checks.negligible_decay(peak, given, max_steps)
            if warning and self.step.term == "update":
                self.run.warn(self.step, warning)


@torch.no_grad()
def apply_decay_(
    layers: Iterable[Layer],
    decay: float,
    term: Literal["update", "gradient"],
    rates: Mapping[int, float],
) -> None:
    """Add the refined term before an optimizer step: ``g += λ ¬M ∘ W``, or ``W -= γ λ ¬M ∘ W``.

    Args:
        layers: in sparse training; those without a mask, or whose weight is not trained, are skipped.
        decay: ``λ``.
        term: ``"gradient"`` or ``"update"``.
        rates: ``γ`` of the coming step, by the ``id`` of the parameter.
    """
    for layer in layers:
        weight: nn.Parameter = layer.weight
        if layer.forward_mask is None or weight.grad is None or id(weight) not in rates:
            continue
        masked_out = weight.detach().masked_fill(layer.forward_mask, 0.0)
        if term == "gradient":
            weight.grad.add_(masked_out, alpha=decay)
        else:
            weight.sub_(masked_out, alpha=rates[id(weight)] * decay)


@hookimpl
def register_techniques(register):
    register(SRSTE)
