r"""L0 regularization: gates that close during training, with a price on the number of open ones (1712.01312).

``L = E_z[task loss with z ∘ W] + λ Σ_j |θ_j| P(z_j ≠ 0) / |θ|`` (Louizos et al., section 2.2), where ``z_j`` is the
hard concrete gate of a weight, a neuron or a head and ``|θ_j|`` the number of weights it governs. Gates are exactly 0
or 1 part of the time, and ``P(z ≠ 0)`` has a closed form (``hf_optim.toolkit.pruning.hard_concrete``). At the end the
weights are multiplied by the deterministic gates of test time, and the weights of gates that are 0 are removed. The
paper's λ is ours divided by ``|θ|``.

With a target sparsity ``t`` the price is learned (Wang et al., 1910.04732): with ``s`` the expected share of closed
gates, ``λ₁ (t - s) + λ₂ (t - s)²`` is added to the loss instead; the optimizer minimizes it in the gates, gradient
ascent maximizes it in ``λ₁`` and ``λ₂``, and ``t`` grows from 0 over the ramp.

During training the gated layers have another class and their own parameters. A ``checkpoint-N`` is therefore an
ordinary checkpoint (of the weights without gates); the gates are saved in the files that hf_optim's callbacks write
beside it. Unlike in the paper, gates of units are drawn once for a batch, not for each of its rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from hf_optim import ModelError, Paper, Reload, Scope, hookimpl, option, technique
from hf_optim.toolkit import topology
from hf_optim.toolkit.pruning import (
    gated_layers,
    hard_concrete,
    masks,
)
from hf_optim.toolkit.topology import PrunableGroups, find_prunable_groups

from . import _recompute
from ._learned_noise import CONTRACT, LearnedNoise, NoiseTraining

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from hf_optim import Run


@technique(
    "l0",
    family="pruning",
    paper=Paper("1712.01312", "Learning Sparse Neural Networks through L0 Regularization", 2018),
    contract=CONTRACT,
    reload=Reload.STOCK_DENSE,
    trains=True,
    parallel={"data": "yes"},
)
class L0(LearnedNoise):
    """Learn which weights, neurons or heads to keep, by L0 regularization with hard concrete gates.

    Runs in ``hf_optim.OptimTrainer``: the price is the loss term ``l0``. In evaluation mode the gates are those of test
    time. Neurons and heads are found by tracing the model (``hf_optim.toolkit.topology.prunable_groups``); with
    grouped-query attention a unit is a key/value head with its query heads. Their weights become zeros: the model keeps
    its shape.

    Attributes:
        on: the parts with a gate each: ``"weights"``, ``"neurons"`` of feed-forward layers, or attention ``"heads"``.
        sparsity: share of the gates to close: the price is learned, and at the end the gates with the largest
            ``log α`` are kept (fewer, if more are closed already). None: ``weight`` is the price.
        weight: ``λ``, the price of all the weights under gates; unused with ``sparsity``.
        multiplier_rate: learning rate of ``λ₁`` and ``λ₂`` with ``sparsity``: too high, and the target is overshot; too
            low, and gates are still open at ``settle``.
        begin: when the price (or the target) starts to rise: a step, or a share of training.
        end: when it reaches its full height, after a linear rise.
        settle: when gates are closed for good: a step, or a share of training. The remaining weights train on without
            gates; 1.0 is the end of training, as in the paper.
        initial: ``sigmoid(log α)`` of every gate at the start: 1 minus the paper's dropout rate.
        gate_learning_rate: of ``log α``; None uses that of the weights, too low for short training: a gate closes
            when ``log α`` has fallen by about five units.
        temperature: ``β`` of the gates, in (0, 1).
        targets: linear layers, by class, name or pattern; for units, the layers that read them (output and down
            projections). Output heads only if named exactly, and no weight that another module shares.
        skip: patterns of layers to leave dense.
    """

    on: Literal["weights", "neurons", "heads"] = "weights"
    sparsity: float | None = option(None, low=0.0, below=1.0)
    weight: float = option(1.0, low=0.0)
    multiplier_rate: float = option(1.0, above=0.0)
    begin: int | float = option(0, low=0)
    end: int | float = option(0.5, low=0)
    settle: int | float = option(1.0, above=0)
    initial: float = option(0.95, above=0.0, below=1.0)
    gate_learning_rate: float | None = option(0.05, low=0.0)
    temperature: float = option(hard_concrete.TEMPERATURE, above=0.0, below=1.0)
    targets: tuple[str, ...] = ("Linear",)
    skip: tuple[str, ...] = ()

    title = "L0 regularization"
    scratch = ("missing", "multipliers")

    # -- hooks --------------------------------------------------------------------------------------------------------
    @hookimpl
    def training_callbacks(self, run: Run) -> list[TrainerCallback]:
        return [GateTraining(self, run)]

    @hookimpl
    def training_loss(self, run: Run, model: nn.Module, inputs: Mapping[str, Any], outputs: Any) -> dict[str, Any]:
        own = run.state(self)
        sampled = [gates for gates in own.noises.values() if gates.sampled]
        if own.settled or not sampled:
            return {}
        share = open_share(sampled, run.masks)
        if self.sparsity is None:
            return {"l0": own.ramp * self.weight * share}
        missing = self.sparsity * own.ramp - (1.0 - share)
        own.missing = missing.detach()
        first, second = own.multipliers.to(share.device)
        return {"l0": first * missing + second * missing.square()}

    def loss_items(self, run: Run, inputs: Mapping[str, Any]) -> dict[str, Any]:
        return {"l0": 1}  # of the weights, not of the batch

    # -- gates --------------------------------------------------------------------------------------------------------
    def check_model(self, model: PreTrainedModel, label: str) -> None:
        self._units(model, *self.supported(Scope("", model, model)), label)

    def _units(
        self,
        model: PreTrainedModel,
        layers: Mapping[str, nn.Module],
        skipped: Mapping[str, list[str]],
        label: str,
    ) -> list[PrunableGroups]:
        """Return the groups that get gates, if not the weights get them. Raises ``ModelError`` if nothing would."""
        units = [] if self.on == "weights" else find_prunable_groups(topology.trace(model))
        units = [group for group in units if group.kind == self.on and group.consumer in layers]
        if not (layers if self.on == "weights" else units):
            why = topology.summarize(skipped)
            raise ModelError(
                f"{label}: {type(model).__name__} has no {self.on} that could have gates; check targets and skip"
                f"{f' ({why})' if why else ''}"
            )
        return units

    def attach(self, run: Run, layers: Mapping[str, nn.Module], skipped: Mapping[str, list[str]]) -> dict[str, Any]:
        units = self._units(run.model, layers, skipped, run.label(self))
        start = hard_concrete.initial_log_alpha(self.initial)
        if self.on == "weights":
            run.cover(self, layers, skipped)
            return {
                name: gated_layers.WeightGates(name, layer, start, self.temperature) for name, layer in layers.items()
            }
        gates = {group.consumer: gated_layers.GroupGates(run.model, group, start, self.temperature) for group in units}
        run.cover(self, {name.rpartition(".")[0] for each in gates.values() for name in each.entries}, skipped)
        return gates

    def noise_learning_rate(self) -> float | None:
        return self.gate_learning_rate

    def shortfall(self, share: float) -> str:
        if self.sparsity is None:
            return f"the price reaches {share * self.weight:.4g} instead of {self.weight:g}"
        return (
            f"the target reaches a sparsity of {share * self.sparsity:.4f} instead of {self.sparsity:g}, and the gates "
            "that are missing are closed at once"
        )

    @torch.no_grad()
    def remove(self, run: Run) -> None:
        """Fold the gates into the weights for good, and mask the weights of closed gates."""
        own = run.state(self)
        scores = {name: gates.log_alpha.detach() for name, gates in own.noises.items()}
        masks.require_finite(scores, run.label(self))
        final = {name: hard_concrete.deterministic_gates(alpha) for name, alpha in scores.items()}
        if self.sparsity is not None:
            alive = {name: gates.sizes(run.masks) > 0 for name, gates in own.noises.items()}
            kept = masks.global_masks({name: alpha.exp() for name, alpha in scores.items()}, self.sparsity, alive)
            final = {name: gate * kept[name] for name, gate in final.items()}
        own.closed = round(sum(int((g == 0).sum()) for g in final.values()) / sum(g.numel() for g in final.values()), 6)
        for name, gates in own.noises.items():
            masks.prune_(run.model, run.masks, gates.fold(final[name]))

    def outcome(self, run: Run) -> dict[str, Any]:
        return {"closed": run.state(self).closed}

    def recompute(self, case: Any) -> dict[str, Any]:
        return {"closed": _recompute.closed_gates(case, self.on), **case.zeros()}

    def description(self) -> str:
        price = f"λ = {self.weight:g}" if self.sparsity is None else f"a target sparsity of {100 * self.sparsity:g} %"
        return (
            f"Trained with a hard concrete gate on each of the {self.on} and {price}; the gates are folded into the "
            "weights."
        )


class GateTraining(NoiseTraining):
    """Also learns the price, if a sparsity is the target."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        if state.global_step == 0:
            self.own.multipliers = torch.zeros(2)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        missing = vars(self.own).pop("missing", None)
        if missing is not None:
            # Gradient ascent: of λ₁ m + λ₂ m², the derivatives are m and m².
            slope = torch.stack([missing, missing.square()])
            self.own.multipliers = self.own.multipliers.to(slope.device) + self.step.multiplier_rate * slope
        super().on_step_end(args, state, control, **kwargs)


def open_share(gates: list[gated_layers.Gates], kept: Mapping[str, Tensor]) -> Tensor:
    """Return the expected share of the gated weights that is used, in [0, 1]; masked weights do not count."""
    counts = [each.expected_open(kept) for each in gates]
    used, size = (torch.stack(parts).sum() for parts in zip(*counts, strict=True))
    return used / size.clamp(min=1)


@hookimpl
def register_techniques(register):
    register(L0)
