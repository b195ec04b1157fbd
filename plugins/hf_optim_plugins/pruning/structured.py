"""Structured pruning: remove attention heads, feed-forward neurons and whole layers, which leaves a smaller model.

A unit ``u`` (a neuron with its row in every projection that makes it and its column in the one that reads it; a head,
or with grouped-query attention a key/value head with all its query heads) is removed as a whole, like LLM-Pruner's
coupled structures (2305.11627). With a gate ``ξ`` on the output of the unit, ``y = Σ_u ξ_u W_u x_u``, and ``ξ = 1`` in
the original model, the units with the smallest ``s_u`` of each layer are removed::

    magnitude    s_u = ‖θ_u‖²                      all the weights that belong to the unit
    activation   s_u = E_t ‖W_u x_u(t)‖²           its contribution to the residual stream, mean over tokens t
    taylor       s_u = E_x |∂L(x)/∂ξ_u|            the first-order change of the loss without it; mean over samples x

The last is the importance of a head of Michel et al. (1905.10650) and the first-order Taylor score of
Molchanov et al. (1906.10771, taken by sample and with the absolute value in place of the square). For a whole layer
``h_out = h_in + ξ f(h_in)``, ``activation`` is ShortGPT's block influence (2403.03853),
``s = 1 - E_t cos(h_in(t), h_out(t))``; the others are as above. ``L`` is the loss of a causal language model on the
calibration text; for other models, whose calibration data has no labels, it is ``-log p`` of the class that the model
itself finds most probable.

On babyllama-1m (perplexity 2.26), removing a quarter of the neurons by ``activation`` gives 3.05, by ``taylor`` 3.06,
by ``magnitude`` 4.01, at random 4.10 to 4.68. Of its five layers ``taylor`` finds the one that costs least (5.28);
``activation`` and ``magnitude`` remove the first (32.2). So unless ``score`` is set, units are ranked by
``activation``, which needs no backward pass, and layers by ``taylor``.

The model card names the papers of the scores that were used beside LLM-Pruner, the paper of the technique.

Every layer loses the same number, so that the result is an ordinary model of the same class with another configuration.
LLM-Pruner and Michel et al. rank units across layers, whose widths then differ; no class that ships in transformers can
express that, so it is not done here.
"""

from __future__ import annotations

import logging
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_optim import Contract, ModelError, Paper, RecipeError, Reload, Technique, hookimpl, option, technique, traits
from hf_optim.toolkit import topology
from hf_optim.toolkit.pruning import masks, shrink
from hf_optim.toolkit.statistics import RecordedBatches, importance
from hf_optim.toolkit.topology import (
    HEADS,
    NEURONS,
    PrunableGroups,
    coupled_layers,
    find_prunable_groups,
)

from . import _recompute
from ._unit_removal import largest, outputs_without, require_equal, slicing

if TYPE_CHECKING:
    from hf_optim import Card, Run, Scope

log = logging.getLogger(__name__)

LAYERS = "layers"
NO_EXPERTS = "neither whole experts nor neurons inside of experts are removed; magnitude and nm prune their weights"
Scores = dict[str, Tensor]
_MICHEL = "Michel et al. ([1905.10650](https://arxiv.org/abs/1905.10650))"
_MOLCHANOV = "Molchanov et al. ([1906.10771](https://arxiv.org/abs/1906.10771))"
# Kind and score -> where the score comes from, for the card.
SOURCES = {
    (HEADS, "taylor"): _MICHEL,
    (NEURONS, "taylor"): _MOLCHANOV,
    (LAYERS, "taylor"): _MOLCHANOV,
    (LAYERS, "activation"): "Men et al., ShortGPT ([2403.03853](https://arxiv.org/abs/2403.03853))",
}


@technique(
    "structured",
    family="pruning",
    paper=Paper("2305.11627", "LLM-Pruner: On the Structural Pruning of Large Language Models", 2023),
    contract=Contract(needs={traits.FLOAT_WEIGHTS}, keeps={traits.SPARSE}),
    reload=Reload.STOCK_DENSE,
    parallel={"data": "yes"},
)
class Structured(Technique):
    """Remove attention heads, neurons and layers, which makes the model smaller and faster.

    ``heads``, ``neurons`` and ``layers`` are shares in [0, 1) if floats, and numbers if whole: ``layers: 1`` removes
    one layer, ``layers: 0.5`` half of them. The removed weights are gone at once; training afterwards, best towards the
    outputs of the original model, recovers quality.

    At least one of the three has to be set.

    Attributes:
        heads: how many heads of each attention to remove; of key/value heads, each with its query heads. Llama's
            configuration requires that the number of remaining query heads divides the hidden size.
        neurons: how many neurons of each feed-forward layer to remove.
        layers: how many blocks of each block list to remove (of encoder and decoder each, unless ``skip`` has all
            blocks of one).
        score: how units and layers are ranked, see above: ``"activation"`` and ``"taylor"`` need data, the latter a
            backward pass and its memory; ``"magnitude"`` needs none. None: heads and neurons by ``"activation"``,
            layers by ``"taylor"`` (by ``"activation"`` if the model has no loss to differentiate, with a warning).
        round_to: the number of remaining neurons is a multiple of this; fewer neurons may be removed for it.
        skip: patterns of blocks to keep (``model.layers.0``); heads and neurons must be equally many in all blocks.
    """

    heads: int | float = option(0, low=0)
    neurons: int | float = option(0, low=0)
    layers: int | float = option(0, low=0)
    score: str | None = option(None, choices=("magnitude", "activation", "taylor"))
    round_to: int = option(8, low=1)
    skip: tuple[str, ...] = ()

    def validate(self) -> None:
        for name in ("heads", "neurons", "layers"):
            value = getattr(self, name)
            if isinstance(value, float) and value >= 1.0:
                raise RecipeError(f"structured: {name} is a share in [0, 1) or a whole number, not {value!r}")
        if not (self.heads or self.neurons or self.layers):
            raise RecipeError(
                "structured: set what to remove: heads, neurons or layers, each a share or a number (neurons: 0.25)"
            )
        if self.skip and not self.layers:
            raise RecipeError("structured: skip names layers that stay, but no layers are removed")

    @classmethod
    def for_testing(cls) -> Technique:
        return cls.from_dict({"neurons": 0.25})

    def contract(self) -> Contract:
        # Removing columns moves the others across the groups of an N:M pattern; removing layers does not.
        keeps = {traits.SPARSE} if self.heads or self.neurons else {traits.SPARSE, traits.SPARSE_NM}
        return Contract(needs={traits.FLOAT_WEIGHTS}, keeps=keeps)

    def needs_data(self) -> bool:
        return self.score != "magnitude"

    def needs_whole_model(self) -> bool:
        return True

    def changes_architecture(self) -> bool:
        return True

    def check_model(self, model: PreTrainedModel, label: str) -> None:
        prunable = self._prunable(model, label)
        blocks = self._removable_blocks(model, label)
        removed = self._select_blocks(model, dict.fromkeys(blocks, 0.0), label)
        # Which layers go is not known yet; those that stay have the widths of all.
        for units in prunable if not removed else ():
            self._n_keep(units, label)

    @hookimpl
    def calibrate(self, run: Run, scope: Scope) -> Iterator[None]:
        model, label = scope.model, run.label(self)
        prunable = self._prunable(model, label)
        before = model.num_parameters()
        blocks = self._removable_blocks(model, label)
        unit_scores, block_scores, ranked_by = yield from self._scores(model, prunable, blocks, label)
        removed_blocks = self._select_blocks(model, block_scores, label)
        kept_units = self._select_units(prunable, unit_scores, removed_blocks, label)
        plan = self._plan(model, prunable, kept_units, removed_blocks, label)
        expected = outputs_without(model, prunable, kept_units, removed_blocks)
        shrink.apply_(model, plan)
        require_equal(model, expected, label)
        run.masks.update({name: plan.slice(name, mask) for name, mask in run.masks.items()})
        run.rename(plan.new_names)
        widths = {units.consumer: [len(units), len(kept_units[units.consumer])] for units in prunable}
        self._report(run, prunable, widths, plan, before, removed_blocks, ranked_by)

    # -- candidates ---------------------------------------------------------------------------------------------------
    def _prunable(self, model: PreTrainedModel, label: str) -> list[PrunableGroups]:
        """Return the heads and neurons of every layer, of the kinds to remove."""
        wanted = [kind for kind, share in ((HEADS, self.heads), (NEURONS, self.neurons)) if share]
        found = find_prunable_groups(topology.trace(model)) if wanted else []
        found = [units for units in found if units.kind in wanted]
        for kind in wanted:
            if not any(units.kind == kind for units in found):
                why = "; its feed-forward layers are experts" if topology.has_experts(model) and kind == NEURONS else ""
                raise ModelError(
                    f"{label}: {type(model).__name__} has no {kind} that can be removed{why}. Set {kind}: 0, and "
                    "remove something else"
                )
        return found

    def _removable_blocks(self, model: PreTrainedModel, label: str) -> dict[str, nn.Module]:
        """Return the blocks that may be removed, by name."""
        if not self.layers:
            return {}
        if not topology.blocks(model):
            raise ModelError(f"{label}: {type(model).__name__} has no sequence of layers")
        try:
            shrink.require_equal_patterns(model)
        except ModelError as error:
            raise ModelError(f"{label}: {error}") from error
        skipped = self._skipped_blocks(model, label)
        removable = shrink.removable_blocks(model)
        return {
            block.name: block.module
            for block in topology.blocks(model)
            if block.index in removable[block.list_name] and block.name not in skipped
        }

    def _skipped_blocks(self, model: PreTrainedModel, label: str) -> set[str]:
        found = {block.name: block.module for block in topology.blocks(model)}
        try:
            return set(topology.match(found, self.skip)) if self.skip else set()
        except ValueError as error:
            raise RecipeError(f"{label}: skip: {error}") from error

    # -- scoring ------------------------------------------------------------------------------------------------------
    def _scores(
        self, model: PreTrainedModel, prunable: Sequence[PrunableGroups], blocks: Mapping[str, nn.Module], label: str
    ) -> Generator[None, None, tuple[Scores, dict[str, float], dict[str, str]]]:
        """Score units and blocks on one pass of the data.

        Returns:
            Consumer -> score of each of its units ``[units]``; block -> score; kind -> the score by which it is ranked.
        """
        units_by, blocks_by = self.score or "activation", self.score or "taylor"
        observes, differentiates = units_by == "activation", units_by == "taylor" or (blocks_by == "taylor" and blocks)
        recorder: Any = RecordedBatches(model) if differentiates else nullcontext([])
        with (
            importance.OutputContributions(model, prunable if observes else (), label) as contributions,
            importance.BlockInfluence(blocks if observes else {}, label) as influence,
            recorder as batches,
        ):
            yield
        unit_scores, block_scores = contributions, {n: float(total / count) for n, (total, count) in influence.items()}
        if self.score == "magnitude":
            masks.require_finite(dict(model.named_parameters()), label)
            unit_scores = {units.consumer: importance.group_magnitude(model, units) for units in prunable}
            block_scores = {name: importance.block_magnitude(block) for name, block in blocks.items()}
        if differentiates:
            gated_units = prunable if units_by == "taylor" else ()
            try:
                gradients = importance.gate_gradients(model, batches, gated_units, blocks, label)
            except ModelError as error:
                if self.score is not None:
                    raise
                log.warning("%s: layers are ranked by activation, since taylor needs a loss (%s)", label, error)
                blocks_by = "activation"
            else:
                block_scores = {name: float(gradients.get(name, torch.zeros(1))) for name in blocks}
                unit_scores = gradients if gated_units else unit_scores
        ranked_by = dict.fromkeys((units.kind for units in prunable), units_by)
        return unit_scores, block_scores, {**ranked_by, **({LAYERS: blocks_by} if blocks else {})}

    # -- selection ----------------------------------------------------------------------------------------------------
    def _select_blocks(self, model: PreTrainedModel, scores: Mapping[str, float], label: str) -> set[str]:
        """Return the names of the blocks to remove: those of the smallest score in each block list."""
        found = topology.blocks(model) if self.layers else []
        removed: set[str] = set()
        skipped = self._skipped_blocks(model, label) if found else set()
        for list_name in dict.fromkeys(block.list_name for block in found):
            members = [block.name for block in found if block.list_name == list_name]
            removable = [name for name in members if name in scores]
            if skipped.issuperset(members):
                continue
            count = _count(self.layers, len(members))
            if not 0 < count < len(members) or count > len(removable):
                raise ModelError(
                    f"{label}: {count} of {len(members)} layers of {list_name} cannot be removed: {len(removable)} may "
                    "be removed (the others hold something that another layer lacks, or are in skip), and one must "
                    "stay; set another number"
                )
            ranking = torch.tensor([scores[name] for name in removable], dtype=torch.float64)
            kept = largest(ranking, len(removable) - count)
            removed |= set(removable) - {removable[index] for index in kept.tolist()}
        return removed

    def _select_units(
        self, prunable: Sequence[PrunableGroups], scores: Scores, removed_blocks: set[str], label: str
    ) -> dict[str, Tensor]:
        """Return the units to keep of each consumer, ascending.

        Layers that share parameters of their units keep the same units, by the sum of their scores.
        """
        kept = {}
        for coupled in coupled_layers(prunable):
            counted = [units for units in coupled if units.block not in removed_blocks] or coupled
            missing = [units.consumer for units in counted if units.consumer not in scores]
            if missing:
                raise ModelError(f"{label}: no calibration input reached {missing[0]}; calibrate with other data")
            total = torch.stack([scores[units.consumer].double().cpu() for units in counted]).sum(0)
            for units in coupled:
                kept[units.consumer] = largest(total, self._n_keep(units, label))
        return kept

    def _n_keep(self, units: PrunableGroups, label: str) -> int:
        """Return the number of units to keep. Raises ``ModelError`` if that is none or all."""
        size = len(units)
        count = _count(self.heads if units.kind == HEADS else self.neurons, size)
        n_keep, stated = size - count, f"{count} of {size} {units.kind}"
        if units.kind == NEURONS:
            n_keep = -(-n_keep // self.round_to) * self.round_to
            stated += f" (a multiple of {self.round_to} stays)"
        if not 0 < n_keep < size:
            raise ModelError(
                f"{label}: {stated} of {units.consumer} cannot be removed: at least one must go and one must stay; set "
                f"another number of {units.kind}"
            )
        return n_keep

    def _plan(
        self,
        model: PreTrainedModel,
        prunable: Sequence[PrunableGroups],
        kept_units: Mapping[str, Tensor],
        removed_blocks: set[str],
        label: str,
    ) -> shrink.PruningPlan:
        kept_blocks: dict[str, list[int]] = {}
        for block in topology.blocks(model) if removed_blocks else ():
            kept_blocks.setdefault(block.list_name, [])
            if block.name not in removed_blocks:
                kept_blocks[block.list_name].append(block.index)
        kinds = dict.fromkeys(units.kind for units in prunable)
        try:
            slicings = [slicing(model, [u for u in prunable if u.kind == kind], kept_units) for kind in kinds]
            return shrink.plan(model, slicings, kept_blocks)
        except ModelError as error:
            remedy = (
                ". Some configurations admit only numbers of query heads that divide the hidden size: set another "
                "number of heads. Where the width of a head follows from these two, no stock model has fewer heads of "
                "the same width: leave heads at 0, and remove neurons and layers"
                if self.heads
                else ""
            )
            raise ModelError(f"{label}: {error}{remedy}") from error

    # -- reporting ----------------------------------------------------------------------------------------------------
    def _report(
        self,
        run: Run,
        prunable: Sequence[PrunableGroups],
        widths: Mapping[str, list[int]],
        plan: shrink.PruningPlan,
        before: int,
        removed_blocks: set[str],
        ranked_by: dict[str, str],
    ) -> None:
        """Record coverage and sizes; ``widths`` are the numbers of units of each consumer, before and after."""
        widths_by_kind: dict[str, list[list[int]]] = {}
        for units in prunable:
            known = widths_by_kind.setdefault(units.kind, [])
            if widths[units.consumer] not in known:
                known.append(widths[units.consumer])
        depths = {name: [len(plan.before.get_submodule(name)), len(kept)] for name, kept in plan.kept_blocks.items()}  # type: ignore[arg-type]
        changed = {name.rpartition(".")[0] for units in prunable for name in units.entries}
        experts = topology.unprunable_experts(run.model, ("Linear",), (), NO_EXPERTS) if prunable else {}
        run.cover(self, [*filter(None, map(plan.new_name, changed)), *plan.kept_blocks], experts)
        run.report(
            self,
            parameters_before=before,
            parameters_after=run.model.num_parameters(),
            widths=widths_by_kind,
            layers=depths,
            removed_layers=sorted(removed_blocks),
            ranked_by=ranked_by,
        )

    def recompute(self, case: Any) -> dict[str, Any]:
        return _recompute.structured(case)

    @hookimpl
    def export(self, run: Run, directory: Path, card: Card) -> None:
        metrics = run.reported(self)
        if not metrics:
            return
        before, after = metrics["parameters_before"], metrics["parameters_after"]
        ranked, widths = metrics["ranked_by"], metrics["widths"]
        by = ", ".join(f"{kind} by {ranked[kind]}" for kind in (HEADS, NEURONS, LAYERS) if kind in ranked)
        cited = "; ".join(dict.fromkeys(SOURCES[key] for key in ranked.items() if key in SOURCES))
        sources = f" Scores after {cited}." if cited else ""
        removed = f" Removed layers: {', '.join(metrics['removed_layers'])}." if metrics["removed_layers"] else ""
        own = card.when(
            "The result is an ordinary model of its class with a smaller configuration.",
            lacks=[traits.QUANTIZED],
            reload=[Reload.STOCK_DENSE],
        )
        card.paragraph(
            "Structured pruning",
            f"Parts of the model were removed as a whole, those of the smallest score first ({by}), equally many in "
            f"every layer: {before:,} parameters became {after:,} ({100 * (1 - after / before):.1f} % fewer). What was "
            f"removed is not computed, on any kernel.{own}{sources}{removed}",
        )
        rows = [["parameters", f"{before:,}", f"{after:,}"]]
        rows += [[f"{kind} in a layer", str(a), str(b)] for kind in (HEADS, NEURONS) for a, b in widths.get(kind, ())]
        rows += [[f"layers of `{name}`", str(a), str(b)] for name, (a, b) in metrics["layers"].items()]
        card.table("What structured pruning removed", ["", "before", "after"], rows)


def _count(wanted: int | float, size: int) -> int:
    return wanted if isinstance(wanted, int) else masks.removed_count(size, wanted)


@hookimpl
def register_techniques(register):
    register(Structured)
