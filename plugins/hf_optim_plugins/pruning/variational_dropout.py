r"""Sparse variational dropout: learn how much noise each weight tolerates, and remove the noisiest (1701.05369).

``L = -(1/N) Σ log p(y | x, w̃) + (λ/N) Σ_ij KL(α_ij)``, ``w̃ = w + σ ε``, ``α = σ² / w²`` (Molchanov et al., equations
2, 3 and 14). The first term is the task loss with noise in the weights, the second the divergence of their posterior
from a log-uniform prior, which rewards large ``α``. A weight with ``log α > 3`` is 95 % noise: it is removed. Noise is
drawn for the outputs of a layer rather than for its weights, for every token by itself, where the paper draws it for an
image; see ``hf_optim.toolkit.pruning.sparse_variational``.

Gale et al. (1902.09574) raise λ gradually and choose it, and the threshold, for a sparsity: ``weight``, ``begin``,
``end`` and ``sparsity`` do that here.

During training the targeted layers have another class and their own parameters. A ``checkpoint-N`` is therefore an
ordinary checkpoint (of the means); the variances are saved in the files that hf_optim's callbacks write beside it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from hf_optim import Paper, Reload, hookimpl, option, technique
from hf_optim.toolkit.pruning import WeightNoise, masks
from hf_optim.toolkit.topology import require_layers

from ._learned_noise import CONTRACT, LearnedNoise, NoiseTraining

if TYPE_CHECKING:
    from hf_optim import Run


@technique(
    "variational_dropout",
    family="pruning",
    paper=Paper("1701.05369", "Variational Dropout Sparsifies Deep Neural Networks", 2017),
    contract=CONTRACT,
    reload=Reload.STOCK_DENSE,
    trains=True,
    parallel={"data": "yes"},
)
class VariationalDropout(LearnedNoise):
    """Learn a noise level for each weight while training, and remove the weights that are mostly noise.

    Runs in ``hf_optim.OptimTrainer``: the divergence is the loss term ``kl``. In evaluation mode layers compute with
    the means that would currently be kept, without noise. A step costs two matrix products for each forward product of
    a targeted layer, and the optimizer holds twice the targeted weights.

    The ``N`` of the paper is the number of items over which the task loss is a mean: tokens with a label for a language
    model, rows for a classifier. A model with more weights than the data has tokens is pruned hard at ``weight: 1``,
    which is the paper's bound; less weight trades sparsity for loss.

    Attributes:
        sparsity: share of the weights to remove, those with the largest α; None removes those above ``threshold``.
        threshold: of ``log α``.
        weight: ``λ``, of the divergence; 1 is the evidence lower bound.
        examples: ``N``; None: the labels of the first batch times the batches of an epoch.
        begin: when the divergence starts to count: a step, or a share of training.
        end: when it counts fully, after a linear rise.
        settle: when weights are removed for good: a step, or a share of training. The remaining weights train on
            without noise; 1.0 is the end of training, as in the paper.
        initial: ``log σ²`` of every weight at the start; ``-inf`` means without noise.
        variance_learning_rate: of ``log σ²``; None uses that of the weights, too low for short training: a weight is
            removed when ``log σ²`` has risen by about ten units.
        scope: with ``sparsity``: ``"global"`` ranks all targets together, ``"layer"`` removes this share of each layer.
        targets: linear layers, by class, name or pattern; output heads only if named exactly, and no weight
            that another module shares.
        skip: patterns of layers to leave dense.
    """

    sparsity: float | None = option(None, low=0.0, below=1.0)
    threshold: float = 3.0
    weight: float = option(1.0, low=0.0)
    examples: int | None = option(None, low=1)
    begin: int | float = option(0, low=0)
    end: int | float = option(0.5, low=0)
    settle: int | float = option(1.0, above=0)
    initial: float = option(-10.0, below=math.inf, infinite=True)
    variance_learning_rate: float | None = option(0.05, low=0.0)
    scope: Literal["layer", "global"] = "global"
    targets: tuple[str, ...] = ("Linear",)
    skip: tuple[str, ...] = ()

    title = "Sparse variational dropout"
    scratch = ("chosen", "first_step")

    # -- hooks --------------------------------------------------------------------------------------------------------
    @hookimpl
    def training_callbacks(self, run: Run) -> list[TrainerCallback]:
        return [VariationalTraining(self, run)]

    @hookimpl
    def training_loss(self, run: Run, model: nn.Module, inputs: Mapping[str, Any], outputs: Any) -> dict[str, Any]:
        own = run.state(self)
        if own.settled:
            return {}
        if self.examples is None and own.examples is None:
            first = own.first_step or [labelled(inputs)]
            own.examples = max(1, round(sum(first) / len(first) * own.batches))
        scale = own.ramp * self.weight / (self.examples or own.examples)
        terms = [noise.divergence() for noise in own.noises.values() if noise.sampled]
        return {"kl": scale * torch.stack(terms).sum()} if terms else {}

    def loss_items(self, run: Run, inputs: Mapping[str, Any]) -> dict[str, Any]:
        own = run.state(self)
        if self.examples is None and own.examples is None:
            own.first_step = [*own.first_step, labelled(inputs)]
        return {"kl": 1}  # of the weights, not of the batch

    # -- noise --------------------------------------------------------------------------------------------------------
    def attach(self, run: Run, layers: Mapping[str, nn.Module], skipped: Mapping[str, list[str]]) -> dict[str, Any]:
        require_layers(layers, run.model, run.label(self), skipped)
        run.cover(self, layers, skipped)
        return {
            name: WeightNoise(layer, f"{name}.weight", run.masks, lambda: self.choose(run), self.initial)
            for name, layer in layers.items()
        }

    def noise_learning_rate(self) -> float | None:
        return self.variance_learning_rate

    def shortfall(self, share: float) -> str:
        made = "" if self.sparsity is None else f", and the ranking so far gives a sparsity of {self.sparsity:g}"
        return f"the weight of the divergence reaches {share * self.weight:.4g} instead of {self.weight:g}{made}"

    @torch.no_grad()
    def choose(self, run: Run) -> masks.Masks:
        """Return the masks that would be kept now, by parameter name. Computed once for each optimizer step."""
        own = run.state(self)
        if getattr(own, "chosen", None) is None:
            alphas = {noise.parameter: noise.log_alpha() for noise in own.noises.values()}
            if self.sparsity is None:
                own.chosen = {name: alpha <= self.threshold for name, alpha in alphas.items()}
            else:
                rank = masks.layer_masks if self.scope == "layer" else masks.global_masks
                # The signal-to-noise ratio |w| / σ, which orders weights as 1/α does.
                ratio = {name: (-0.5 * alpha).exp() for name, alpha in alphas.items()}
                own.chosen = rank(ratio, self.sparsity, run.masks)
        return own.chosen

    def remove(self, run: Run) -> None:
        """Remove the weights that ``choose`` does not keep, for good."""
        own = run.state(self)
        weights = {noise.parameter: noise.layer.weight.detach() for noise in own.noises.values()}
        masks.require_finite(weights, run.label(self))
        above = sum(int((noise.log_alpha() > self.threshold).sum()) for noise in own.noises.values())
        own.above_threshold = round(above / sum(weight.numel() for weight in weights.values()), 6)
        masks.prune_(run.model, run.masks, self.choose(run))

    def outcome(self, run: Run) -> dict[str, Any]:
        return {"above_threshold": run.state(self).above_threshold}

    def recompute(self, case: Any) -> dict[str, Any]:
        # With the threshold as the rule, the weights above it are those that were removed.
        return {"above_threshold": case.zeros()["sparsity"], **case.zeros()}

    def description(self) -> str:
        rule = f"log α > {self.threshold:g}" if self.sparsity is None else "the largest α"
        return (
            f"Trained with Gaussian noise of a learned variance on every targeted weight (KL weight {self.weight:g}); "
            f"the weights with {rule} were removed."
        )


class VariationalTraining(NoiseTraining):
    """Also counts the examples, and discards the masks of ``choose`` when weights have changed."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        if state.global_step == 0:
            self.own.examples = None
        self.own.first_step = []
        self.own.batches = batches(args, state, kwargs.get("train_dataloader"))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.own.chosen = None
        super().on_step_end(args, state, control, **kwargs)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_train_end(args, state, control, **kwargs)
        self.own.chosen = None


def labelled(inputs: Mapping[str, Any]) -> int:
    """Return how many items of a batch have a label other than -100, or its rows without labels. Reads the device."""
    labels = inputs.get("labels")
    if isinstance(labels, Tensor):
        return int(labels.ne(-100).sum()) if labels.dim() > 1 and not labels.is_floating_point() else len(labels)
    return len(next(value for value in inputs.values() if isinstance(value, Tensor)))


def batches(args: Any, state: Any, loader: Any) -> int:
    """Return the micro-batches of an epoch over all processes; of the whole training, if the data has no length."""
    try:
        count = len(loader)
    except TypeError:
        count = state.max_steps * args.gradient_accumulation_steps
    return max(1, count) * args.world_size


@hookimpl
def register_techniques(register):
    register(VariationalDropout)
