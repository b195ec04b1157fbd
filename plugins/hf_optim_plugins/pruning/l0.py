r"""L0 regularization: gates that close while the model trains, paid for by the number that are open (1712.01312).

``L = E_z[task loss with z ∘ W] + λ Σ_j |θ_j| P(z_j ≠ 0) / |θ|`` (Louizos et al., section 2.2), where ``z_j`` is the
hard concrete gate of a weight, a neuron or a head and ``|θ_j|`` the number of weights it governs. Gates are exactly 0
or 1 part of the time, and ``P(z ≠ 0)`` has a closed form (``hf_optim.toolkit.hard_concrete``). At the end the weights
are multiplied by the gates at test time, and what has a gate of 0 is removed. The paper's λ is ours divided by ``|θ|``.

With a target sparsity ``t`` the price is found by training (Wang et al., 1910.04732): with ``s`` the expected share of
closed gates, ``λ₁ (t - s) + λ₂ (t - s)²`` is added to the loss instead; the optimizer lowers it in the gates, gradient
ascent raises it in ``λ₁`` and ``λ₂``, and ``t`` grows from 0 over the ramp.

While training lasts, the gated layers have another class and the parameters they had. A ``checkpoint-N`` is therefore
an ordinary checkpoint (of the weights without gates); the gates travel in the files that hf_optim's callbacks write
beside it. Unlike the paper, gates of units are drawn once for a batch, not for each of its rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from hf_optim import Contract, ModelError, Paper, Reload, Technique, hookimpl, option, technique, traits
from hf_optim.toolkit import topology
from hf_optim.toolkit.pruning import (
    TRAINING_FORWARD,
    Gates,
    NoisyLayer,
    UnitGates,
    WeightGates,
    check_positions,
    hard_concrete,
    masks,
    noisy_layers,
    select_supported,
    sparsity,
)
from hf_optim.toolkit.topology import find_prunable_groups

from ._learned_noise import NoiseTraining, optimizer_group, release

if TYPE_CHECKING:
    from hf_optim import Card, Run


@technique(
    "l0",
    family="pruning",
    paper=Paper("1712.01312", "Learning Sparse Neural Networks through L0 Regularization", 2018),
    contract=Contract(
        needs={traits.FLOAT_WEIGHTS},
        adds={traits.SPARSE},
        keeps={traits.SPARSE, traits.SPARSE_NM},
        owns={TRAINING_FORWARD},
    ),
    reload=Reload.STOCK_DENSE,
    trains=True,
)
class L0(Technique):
    """Learn which weights, neurons or heads to keep, with random gates whose expected number has a price.

    Runs in ``hf_optim.OptimTrainer``: the price is the loss term ``l0``. In evaluation mode the gates are those of test
    time. Neurons and heads are found by looking (``toolkit.structures``); with grouped-query attention a unit is a
    key/value head with its query heads. Their weights become zeros: the model keeps its shape.

    Attributes:
        on: what has a gate of its own: ``"weights"``, ``"neurons"`` of feed-forward layers, or attention ``"heads"``.
        sparsity: share of the gates to close: the price is found by training, and at the end the gates with the
            largest ``log α`` are kept (less, if more are closed already). None: ``weight`` is the price.
        weight: ``λ``, the price of all the weights under gates; unused with ``sparsity``.
        multiplier_rate: learning rate of ``λ₁`` and ``λ₂`` with ``sparsity``: too high, and the target is overshot; too
            low, and gates are still open when the time comes to close them.
        begin: where the price (or the target) begins to rise: a step, or a share of training.
        end: where it has risen fully, in a straight line.
        settle: where gates are closed for good: a step, or a share of training. What is left trains on without gates;
            1.0 is the end of training, as in the paper.
        initial: ``sigmoid(log α)`` of every gate at the beginning: 1 minus the paper's dropout rate.
        gate_learning_rate: of ``log α``; None takes that of the weights, too little for short training: a gate closes
            when ``log α`` has come some five units down.
        temperature: ``β`` of the gates, in (0, 1).
        targets: which linear layers, by class, name or pattern; for units, the layers that read them (output and down
            projections). Output heads only where named exactly, and no weight that another module shares.
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

    def validate(self) -> None:
        check_positions(self.name, begin=self.begin, end=self.end, settle=self.settle)

    def cut_off(self, share: float) -> str:
        """What comes of a ramp that ends at this share of its height."""
        if self.sparsity is None:
            return f"the price reaches {share * self.weight:.4g} instead of {self.weight:g}"
        return (
            f"the target reaches a sparsity of {share * self.sparsity:.4f} instead of {self.sparsity:g}, and the gates "
            "that are missing are closed at once"
        )

    # -- hooks --------------------------------------------------------------------------------------------------------
    @hookimpl
    def training_callbacks(self, run: Run) -> list[TrainerCallback]:
        layers = self.prepare(run)
        return [GateTraining(self, run, layers, run.state(self).gates)]

    @hookimpl
    def parameter_groups(self, run: Run, model: nn.Module) -> list[dict[str, Any]]:
        return optimizer_group(self.prepare(run), self.gate_learning_rate)

    @hookimpl
    def training_loss(self, run: Run, model: nn.Module, inputs: Mapping[str, Any], outputs: Any) -> dict[str, Any]:
        own = run.state(self)
        heard = [gates for gates in own.gates if gates.heard]
        if own.settled or not heard:
            return {}
        share = open_share(heard, run.masks)
        if self.sparsity is None:
            return {"l0": own.ramp * self.weight * share}
        missing = self.sparsity * own.ramp - (1.0 - share)
        own.missing = missing.detach()
        first, second = own.multipliers.to(share.device)
        return {"l0": first * missing + second * missing.square()}

    @hookimpl
    def finalize_model(self, run: Run) -> None:
        own, layers = run.state(self), self.prepare(run)
        if not getattr(own, "settled", False):
            self.remove(run)
        release(own, layers, "gates", "missing", "multipliers")
        names, _ = run.covered(self) or (set(), {})
        run.report(self, **sparsity.metrics(run.model, names), closed=own.closed)

    @hookimpl
    def export(self, run: Run, directory: Path, card: Card) -> None:
        names, _ = run.covered(self) or (set(), {})
        share = sparsity.overall(sparsity.layer_sparsity(run.model, names))
        price = f"λ = {self.weight:g}" if self.sparsity is None else f"a target sparsity of {100 * self.sparsity:g} %"
        card.paragraph(
            "L0 regularization",
            f"Trained with a hard concrete gate on each of the {self.on} and {price}; the gates are folded into the "
            f"weights, and {100 * share:.1f} % of the targeted weights are zero. {sparsity.NO_SPEED_UP}",
        )
        card.table("Sparsity after L0 regularization", sparsity.TABLE_HEADER, sparsity.table_rows(run.model, names))

    # -- the layers ---------------------------------------------------------------------------------------------------
    def prepare(self, run: Run) -> dict[str, NoisyLayer]:
        """The layers in training, by name; made at the first call. Raises ``ModelError`` if there are none."""
        own = run.state(self)
        if hasattr(own, "layers"):
            return own.layers
        chosen = run.select(self.targets, self.skip)
        found, skipped = select_supported(run.model, chosen)
        units = [] if self.on == "weights" else find_prunable_groups(topology.trace(run.model))
        units = [one for one in units if one.kind == self.on and one.reader in found]
        if not (found if self.on == "weights" else units):
            raise ModelError(
                f"{run.label(self)}: {type(run.model).__name__} has no {self.on} that could have gates; check targets "
                "and skip" + "".join(f". {', '.join(names[:3])}: {reason}" for reason, names in skipped.items())
            )
        masks.require_finite({name: layer.get_parameter("weight") for name, layer in found.items()}, run.label(self))
        start = hard_concrete.initial_log_alpha(self.initial)
        if self.on == "weights":
            own.gates = [WeightGates(name, layer, start, self.temperature) for name, layer in found.items()]
            run.cover(self, found, skipped)
        else:
            own.gates = [UnitGates(run.model, one, start, self.temperature) for one in units]
            run.cover(self, {name.rpartition(".")[0] for gates in own.gates for name in gates.entries}, skipped)
        own.layers, own.settled = {gates.name: gates.layer for gates in own.gates}, False
        noisy_layers.store_noise_parameters(own, own.layers)
        return own.layers

    @torch.no_grad()
    def remove(self, run: Run) -> None:
        """Fold the gates into the weights, for good, and mask what they close."""
        own = run.state(self)
        scores = {gates.name: gates.log_alpha.detach() for gates in own.gates}
        masks.require_finite(scores, run.label(self))
        final = {name: hard_concrete.deterministic_gates(alpha) for name, alpha in scores.items()}
        if self.sparsity is not None:
            alive = {gates.name: gates.sizes(run.masks) > 0 for gates in own.gates}
            kept = masks.global_masks({name: alpha.exp() for name, alpha in scores.items()}, self.sparsity, alive)
            final = {name: gate * kept[name] for name, gate in final.items()}
        own.closed = round(sum(int((g == 0).sum()) for g in final.values()) / sum(g.numel() for g in final.values()), 6)
        for gates in own.gates:
            masks.prune_(run.model, run.masks, gates.fold(final[gates.name]))


class GateTraining(NoiseTraining):
    """Finds the price too, where a sparsity is the target."""

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


def open_share(gates: list[Gates], kept: Mapping[str, Tensor]) -> Tensor:
    """The expected share of the weights under these gates that is used, in [0, 1]; masked weights count on no side."""
    counts = [one.open_count(kept) for one in gates]
    used, size = (torch.stack(parts).sum() for parts in zip(*counts, strict=True))
    return used / size.clamp(min=1)


@hookimpl
def register_techniques(register):
    register(L0)
