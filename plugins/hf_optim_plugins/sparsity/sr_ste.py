"""SR-STE: learn N:M sparse weights in training, with a mask made anew at each step (Zhou et al., 2102.04010).

Every forward computes with ``W̃ = M(W) ∘ W``, where ``M(W)`` keeps the ``N`` largest weights by magnitude of every
``M`` along the input. Every weight takes the gradient ``g = ∂L/∂W̃`` (the straight-through estimator, STE), so that one
which is left out now may come back. STE alone changes masks too often; the sparse-refined estimator lets the
weights that are left out decay::

    W_{t+1} = W_t - γ_t (g_t + λ ((1 - M(W_t)) ∘ W_t))

``γ`` is the learning rate; ``λ = 2e-4``, and ``λ = 0`` is STE. (One survey prints the term with the other sign and
without ``γ``.) The formula is that of plain gradient descent. Under an optimizer with running means, such as Adam, it
can be read in two ways: see ``term``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from hf_optim import (
    Contract,
    ModelError,
    Paper,
    RecipeError,
    Reload,
    Technique,
    hookimpl,
    option,
    technique,
    traits,
)
from hf_optim.toolkit.checkpoint import NamedTensors
from hf_optim.toolkit.pruning import (
    MaskedLayer,
    as_step,
    check_decay_stability,
    check_positions,
    masked_layers,
    masks,
    negligible_decay,
    nm_groups,
    peak_rate,
    sparsity,
)
from hf_optim.toolkit.topology import require_layers, weight_out_in

if TYPE_CHECKING:
    from hf_optim import Card, Run


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
)
class SRSTE(Technique):
    """Train with N:M sparse weights whose mask follows the dense weights behind them.

    Runs in a stock ``Trainer`` with ``hf_optim.callbacks(model)``. While training lasts the model computes with sparse
    weights, in evaluation too, and keeps dense ones: a ``checkpoint-N`` is an ordinary dense checkpoint. When training
    ends, what the mask leaves out becomes zero. Weights that an earlier step removed stay removed. Steps are optimizer
    steps, or shares of training where floats.

    The term is added after the gradients are clipped (it adds nothing to their norm) and unscaled.

    Attributes:
        keep: weights kept in a group (the N of N:M).
        group: consecutive input weights in a group (the M); 2 and 4 is what sparse tensor cores run.
        decay: ``λ``; 0 is the straight-through estimator. The paper's value is for SGD. With ``term: update`` a step
            takes off a share ``γ λ``, which the small rates of Adam make nothing (said at the start of training):
            with AdamW at a rate of 3e-3, 10 to 100 did best on a small language model. A share above
            1 turns the sign of a weight at every step, and above 2 lets it grow without end: it is refused at the start
            of training, under SGD for both places of the term.
        term: where the decay goes. ``"update"`` subtracts ``γ λ W`` from the weights that are left out, beside the
            optimizer's step as decoupled weight decay does; ``"gradient"`` adds ``λ W`` to their gradient, so that it
            passes through the running means. With SGD without momentum both are the formula.
        begin: where sparsity starts, after training without it.
        end: the last renewal of the mask, which then stays; None renews it as long as training lasts.
        every: optimizer steps between renewals.
        targets: which linear layers, by class, name or pattern; output heads only where named exactly.
        skip: patterns of layers to leave dense.
    """

    keep: int = option(2, low=1)
    group: int = option(4, low=2)
    decay: float = option(2e-4, low=0.0)
    term: Literal["update", "gradient"] = "update"
    begin: int | float = option(0, low=0)
    end: int | float | None = option(None, low=0)
    every: int = option(1, low=1)
    targets: tuple[str, ...] = ("Linear",)
    skip: tuple[str, ...] = ()

    def validate(self) -> None:
        if self.keep >= self.group:
            raise RecipeError(f"sr_ste: keep must be < group, not {self.keep} of {self.group}: that removes nothing")
        check_positions(self.name, begin=self.begin, end=self.end)

    @property
    def masks_follow_weights(self) -> bool:
        """Whether the masks of any moment can be made from the weights of that moment."""
        return self.every == 1 and self.end is None

    @hookimpl
    def training_callbacks(self, run: Run) -> list[TrainerCallback]:
        return [SparseRefinement(self, run, self.prepare(run))]

    def prepare(self, run: Run) -> dict[str, MaskedLayer]:
        """The layers in training, by name; made at the first call. Raises ``ModelError`` if there are none."""
        if layers := masked_layers.masked_layers(run.model):
            return layers
        label = run.label(self)
        selected = run.select(self.targets, self.skip)
        found, skipped = nm_groups.select_divisible(selected, self.group)
        try:
            found, others = masked_layers.select_supported(run.model, found)
        except ModelError as error:
            raise ModelError(f"{label}: {error}") from error
        skipped |= others
        run.cover(self, found, skipped)
        require_layers(found, run.model, label, skipped)
        masks.require_finite({f"{name}.weight": weight_out_in(layer) for name, layer in found.items()}, label)
        return {name: masked_layers.attach_masks(layer) for name, layer in found.items()}

    def mask(self, run: Run, name: str, layer: MaskedLayer) -> Tensor:
        """``M(W)`` of a layer as its weight is now, the way round that it is stored."""
        kept = masks.mask_out_in(layer, run.masks, f"{name}.weight")
        return masks.as_stored(layer, masks.nm_mask(weight_out_in(layer), self.keep, self.group, kept))

    def saved_masks(self, run: Run) -> NamedTensors:
        """Return the masks by layer name that checkpoints save; empty if they follow from the weights."""
        return NamedTensors(run.state(self), "mask")

    @hookimpl
    def finalize_model(self, run: Run) -> None:
        layers, saved = self.prepare(run), self.saved_masks(run)
        last = {name: saved[name] if name in saved else self.mask(run, name, layer) for name, layer in layers.items()}
        saved.clear()
        for name, layer in layers.items():
            masked_layers.detach_masks(layer)
            masks.prune_(run.model, run.masks, {f"{name}.weight": last[name]})
            nm_groups.record_pattern(run.nm_patterns, f"{name}.weight", self.keep, self.group)
        run.report(self, pattern=f"{self.keep}:{self.group}", **sparsity.metrics(run.model, layers))

    @hookimpl
    def export(self, run: Run, directory: Path, card: Card) -> None:
        names, skipped = run.covered(self) or (set(), {})
        left = "".join(f" Left dense ({why}): {len(which)} layers." for why, which in sorted(skipped.items()))
        card.paragraph(
            f"{self.keep}:{self.group} sparsity learned in training (SR-STE)",
            f"{len(names)} linear layers were trained with at most {self.keep} of every {self.group} consecutive "
            f"weights along the input; the mask followed the weights, and what it left out decayed with λ = "
            f"{self.decay:g} ({self.term}).{left} {sparsity.NO_SPEED_UP}",
        )
        card.table(
            f"Sparsity of the {self.keep}:{self.group} layers",
            sparsity.TABLE_HEADER,
            sparsity.table_rows(run.model, names),
        )


class SparseRefinement(TrainerCallback):
    """Renews the masks after optimizer steps, and lets the weights that are left out decay."""

    def __init__(self, step: SRSTE, run: Run, layers: Mapping[str, MaskedLayer]) -> None:
        self.step, self.run, self.layers = step, run, layers
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
        self._warn_if_decay_negligible(args.learning_rate, state.max_steps)
        self._check_decay_stability(kwargs.get("optimizer"), kwargs.get("lr_scheduler"), state.max_steps)
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
        if self.step.decay and not (self.step.term == "update" and masked_layers.will_skip_step(optimizer)):
            apply_decay_(self.layers.values(), self.step.decay, self.step.term, masked_layers.learning_rates(optimizer))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        begin, end = self._span(state)
        if begin <= state.global_step <= end and (state.global_step - begin) % self.step.every == 0:
            self._renew()

    def _span(self, state: Any) -> tuple[int, int]:
        step, last = self.step, state.max_steps
        return as_step(step.begin, last), last if step.end is None else as_step(step.end, last)

    def _renew(self) -> None:
        self._set({name: self.step.mask(self.run, name, layer) for name, layer in self.layers.items()})

    def _set(self, found: Mapping[str, Tensor]) -> None:
        saved = self.step.saved_masks(self.run)
        for name, layer in self.layers.items():
            layer.set_masks(found.get(name))
            if layer.forward_mask is not None and not self.step.masks_follow_weights:
                saved[name] = layer.forward_mask

    def _warn_if_decay_negligible(self, rate: float, max_steps: int) -> None:
        warning = negligible_decay(rate, self.step.decay, max_steps)
        if warning and self.step.term == "update":
            self.run.warn(self.step, warning)

    def _check_decay_stability(self, optimizer: Any, scheduler: Any, max_steps: int) -> None:
        # W -= γ λ W, whatever the gradient: under SGD in both places of the term (momentum only adds to it), and under
        # any optimizer where the term is part of the update.
        sgd = isinstance(getattr(optimizer, "optimizer", optimizer), torch.optim.SGD)
        if sgd or self.step.term == "update":
            peak = peak_rate(optimizer, scheduler, [layer.weight for layer in self.layers.values()], max_steps)
            check_decay_stability(peak, self.step.decay, self.run.label(self.step))


@torch.no_grad()
def apply_decay_(
    layers: Iterable[MaskedLayer], decay: float, term: Literal["update", "gradient"], rates: Mapping[int, float]
) -> None:
    """Add the refined term, before an optimizer step: ``g += λ ¬M ∘ W``, or ``W -= γ λ ¬M ∘ W``.

    Args:
        layers: in sparse training; those without a mask, or whose weight is not trained, are left alone.
        decay: ``λ``.
        term: ``"gradient"`` or ``"update"``.
        rates: ``γ`` of the step that comes, by the identity of the parameter.
    """
    for layer in layers:
        weight: nn.Parameter = layer.weight
        if layer.forward_mask is None or weight.grad is None or id(weight) not in rates:
            continue
        left_out = weight.detach().masked_fill(layer.forward_mask, 0.0)
        if term == "gradient":
            weight.grad.add_(left_out, alpha=decay)
        else:
            weight.sub_(left_out, alpha=rates[id(weight)] * decay)


@hookimpl
def register_techniques(register):
    register(SRSTE)
