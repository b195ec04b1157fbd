"""Structured pruning: take out attention heads, feed-forward neurons and whole layers; a smaller model is left.

A unit ``u`` (a neuron with its row in every projection that makes it and its column in the one that reads it; a head,
or with grouped-query attention a key/value head with all its query heads) goes whole, as LLM-Pruner's coupled
structures do (2305.11627). With a gate ``ξ`` on what the unit adds, ``y = Σ_u ξ_u W_u x_u``, and ``ξ = 1`` in the model
as it is, the units with the least ``s_u`` of each layer are removed::

    magnitude    s_u = ‖θ_u‖²                      all the weights that belong to the unit
    activation   s_u = E_t ‖W_u x_u(t)‖²           what it adds to the residual stream, mean over tokens t
    taylor       s_u = E_x |∂L(x)/∂ξ_u|            the loss's change without it, to first order; mean over samples x

The last is the importance of a head of Michel et al. (1905.10650) and the first-order Taylor score of
Molchanov et al. (1906.10771, taken by sample and with the absolute value in place of the square). For a whole layer
``h_out = h_in + ξ f(h_in)``, ``activation`` is ShortGPT's block influence (2403.03853),
``s = 1 - E_t cos(h_in(t), h_out(t))``; the others are as above. ``L`` is the loss of a causal language model on the
calibration text; for other models, whose calibration data has no labels, ``-log p`` of the class that the model itself
finds most probable.

On babyllama-1m (perplexity 2.26), a quarter of the neurons by ``activation`` leaves 3.05, by ``taylor`` 3.06, by
``magnitude`` 4.01, at random 4.10 to 4.68. Of its five layers ``taylor`` finds the one that costs least (5.28);
``activation`` and ``magnitude`` take out the first (32.2). So unless a ``score`` is asked for, units are ranked by
``activation``, which costs no backward pass, and layers by ``taylor``.

Every layer loses the same number, so that the result is an ordinary model of the same class with another configuration.
What this leaves out: LLM-Pruner and Michel et al. rank units across layers, whose widths then differ, which no class
that ships in transformers can express.
"""

from __future__ import annotations

import logging
from collections.abc import Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_optim import Contract, ModelError, Paper, RecipeError, Reload, Technique, hookimpl, option, technique, traits
from hf_optim.toolkit import topology
from hf_optim.toolkit.modules import main_output, rounding_tolerance
from hf_optim.toolkit.pruning import masks, shrink
from hf_optim.toolkit.statistics import RecordedBatches, importance
from hf_optim.toolkit.topology import HEADS, NEURONS, PrunableGroups, coupled_layers, dummy_inputs, find_prunable_groups

if TYPE_CHECKING:
    from hf_optim import Card, Run, Scope

log = logging.getLogger(__name__)

Scores = dict[str, Tensor]


@technique(
    "structured",
    family="pruning",
    paper=Paper("2305.11627", "LLM-Pruner: On the Structural Pruning of Large Language Models", 2023),
    contract=Contract(needs={traits.FLOAT_WEIGHTS}, keeps={traits.SPARSE}),
    reload=Reload.STOCK_DENSE,
)
class Structured(Technique):
    """Remove heads, neurons and layers: the model gets smaller, and faster by as much.

    ``heads``, ``neurons`` and ``layers`` are shares in [0, 1) when floats and numbers when whole: ``layers: 1`` removes
    one layer, ``layers: 0.5`` half of them. The removed units' weights are gone at once; training afterwards, best
    towards the outputs of the model as it was, wins quality back.

    At least one of the three has to be asked for.

    Attributes:
        heads: how many heads of each attention to remove; of key/value heads, each with its query heads. Llama's
            configuration wants the query heads that stay to divide the hidden size.
        neurons: how many neurons of each feed-forward layer to remove.
        layers: how many blocks of each stack to remove (of encoder and decoder each, unless ``skip`` has all of one).
        score: what ranks units and layers, see above: ``"activation"`` and ``"taylor"`` need data, the latter a
            backward pass and its memory; ``"magnitude"`` needs none. None: heads and neurons by ``"activation"``,
            layers by ``"taylor"`` (by ``"activation"`` where the model has no loss to differentiate, with a warning).
        round_to: the neurons that stay are a multiple of this, at the price of removing fewer.
        skip: patterns of blocks that stay (``model.layers.0``); heads and neurons have to be as many everywhere.
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
                "structured: say what to remove: heads, neurons or layers, each a share or a number (neurons: 0.25)"
            )
        if self.skip and not self.layers:
            raise RecipeError("structured: skip names layers that stay, but no layers are removed")

    @classmethod
    def for_testing(cls) -> Technique:
        return cls.from_dict({"neurons": 0.25})

    def contract(self) -> Contract:
        # Taking columns out moves what is left across the groups of an N:M pattern; taking layers out does not.
        keeps = {traits.SPARSE} if self.heads or self.neurons else {traits.SPARSE, traits.SPARSE_NM}
        return Contract(needs={traits.FLOAT_WEIGHTS}, keeps=keeps)

    def needs_data(self) -> bool:
        return self.score != "magnitude"

    def needs_whole_model(self) -> bool:
        return True

    def changes_architecture(self) -> bool:
        return True

    @hookimpl
    def calibrate(self, run: Run, scope: Scope) -> Iterator[None]:
        model, label = scope.model, run.label(self)
        units = self._units(model, label)
        before = model.num_parameters()
        unit_scores, block_scores, ranked_by = yield from self._scores(model, units, self._blocks(model, label), label)
        gone = self._gone(model, block_scores, label)
        kept = self._kept(units, unit_scores, gone, label)
        plan = self._plan(model, units, kept, gone, label)
        expected = outputs_without(model, units, kept, gone)
        shrink.apply_(model, plan)
        require_equal(model, expected, label)
        run.masks.update({name: plan.slice(name, mask) for name, mask in run.masks.items()})
        run.rename(plan.new_names)
        self._report(run, units, kept, gone, plan, before, ranked_by)

    # -- what there is ------------------------------------------------------------------------------------------------
    def _units(self, model: PreTrainedModel, label: str) -> list[PrunableGroups]:
        wanted = {HEADS: self.heads, NEURONS: self.neurons}
        found = (
            [one for one in find_prunable_groups(topology.trace(model)) if wanted[one.kind]]
            if any(wanted.values())
            else []
        )
        for kind in (kind for kind, share in wanted.items() if share):
            if not any(one.kind == kind for one in found):
                why = "; its feed-forward layers are experts" if topology.has_experts(model) and kind == NEURONS else ""
                raise ModelError(
                    f"{label}: {type(model).__name__} has no {kind} that can be removed{why}. Set {kind}: 0, and "
                    "remove something else"
                )
        return found

    def _blocks(self, model: PreTrainedModel, label: str) -> dict[str, nn.Module]:
        """The blocks that may go, by name."""
        if not self.layers:
            return {}
        if not topology.blocks(model):
            raise ModelError(f"{label}: {type(model).__name__} has no sequence of layers")
        stay = self._staying_blocks(model, label)
        free = shrink.removable_blocks(model)
        return {
            block.name: block.module
            for block in topology.blocks(model)
            if block.index in free[block.list_name] and block.name not in stay
        }

    def _staying_blocks(self, model: PreTrainedModel, label: str) -> set[str]:
        found = {block.name: block.module for block in topology.blocks(model)}
        try:
            return set(topology.match(found, self.skip)) if self.skip else set()
        except ValueError as error:
            raise RecipeError(f"{label}: skip: {error}") from error

    # -- what it is worth ---------------------------------------------------------------------------------------------
    def _scores(
        self, model: PreTrainedModel, units: Sequence[PrunableGroups], blocks: Mapping[str, nn.Module], label: str
    ) -> Generator[None, None, tuple[Scores, dict[str, float], dict[str, str]]]:
        """Reader -> score of each of its units, block -> its score, and by which score each kind was ranked."""
        kinds = [*dict.fromkeys(one.kind for one in units), *(["layers"] if blocks else [])]
        if self.score is None and blocks:
            return (yield from self._scores_by_default(model, units, blocks, label))
        score = self.score or "activation"
        named = dict.fromkeys(kinds, score)
        if score == "taylor":
            with RecordedBatches(model) as batches:
                yield
            found = importance.gate_gradients(model, batches, units, blocks, label)
            return found, {name: float(found.get(name, torch.zeros(1))) for name in blocks}, named
        if score == "activation":
            with (
                importance.OutputContributions(model, units, label) as added,
                importance.BlockInfluence(blocks, label) as influence,
            ):
                yield
            return added, _mean(influence), named
        yield
        masks.require_finite(dict(model.named_parameters()), label)
        magnitudes = {one.consumer: importance.group_magnitude(model, one) for one in units}
        return magnitudes, {name: importance.block_magnitude(block) for name, block in blocks.items()}, named

    def _scores_by_default(
        self, model: PreTrainedModel, units: Sequence[PrunableGroups], blocks: Mapping[str, nn.Module], label: str
    ) -> Generator[None, None, tuple[Scores, dict[str, float], dict[str, str]]]:
        """Units by what they add, layers by the gradient of their gates, on one pass of the data."""
        named = dict.fromkeys((one.kind for one in units), "activation")
        with (
            importance.OutputContributions(model, units, label) as added,
            importance.BlockInfluence(blocks, label) as influence,
            RecordedBatches(model) as batches,
        ):
            yield
        try:
            found = importance.gate_gradients(model, batches, (), blocks, label)
        except ModelError as error:
            log.warning("%s: layers are ranked by activation, since taylor takes a loss (%s)", label, error)
            return added, _mean(influence), {**named, "layers": "activation"}
        gradients = {name: float(found.get(name, torch.zeros(1))) for name in blocks}
        return added, gradients, {**named, "layers": "taylor"}

    # -- what goes ----------------------------------------------------------------------------------------------------
    def _gone(self, model: PreTrainedModel, scores: Mapping[str, float], label: str) -> set[str]:
        """The names of the blocks that go: those of the least score in each stack."""
        found = topology.blocks(model) if self.layers else []
        gone: set[str] = set()
        stay_all = self._staying_blocks(model, label) if found else set()
        for stack in dict.fromkeys(block.list_name for block in found):
            members = [block.name for block in found if block.list_name == stack]
            free = [name for name in members if name in scores]
            if stay_all.issuperset(members):
                continue
            asked = _count(self.layers, len(members))
            if not 0 < asked < len(members) or asked > len(free):
                raise ModelError(
                    f"{label}: {asked} of {len(members)} layers of {stack} cannot be removed: {len(free)} may go (the "
                    "others hold what another layer lacks, or stand in skip), and one must stay; ask for another number"
                )
            stay = largest(torch.tensor([scores[name] for name in free], dtype=torch.float64), len(free) - asked)
            gone |= set(free) - {free[place] for place in stay.tolist()}
        return gone

    def _kept(self, units: Sequence[PrunableGroups], scores: Scores, gone: set[str], label: str) -> dict[str, Tensor]:
        """Reader -> the units that stay, ascending. Layers that share parameters of their units keep the same."""
        kept = {}
        for together in coupled_layers(units):
            counted = [one for one in together if one.block not in gone] or together
            missing = [one.consumer for one in counted if one.consumer not in scores]
            if missing:
                raise ModelError(f"{label}: no calibration input reached {missing[0]}; calibrate with other data")
            total = torch.stack([scores[one.consumer].double().cpu() for one in counted]).sum(0)
            for one in together:
                kept[one.consumer] = largest(total, self._staying(one, label))
        return kept

    def _staying(self, units: PrunableGroups, label: str) -> int:
        size = len(units)
        asked = _count(self.heads if units.kind == HEADS else self.neurons, size)
        stay, stated = size - asked, f"{asked} of {size} {units.kind}"
        if units.kind == NEURONS:
            stay = -(-stay // self.round_to) * self.round_to
            stated += f" (a multiple of {self.round_to} stays)"
        if not 0 < stay < size:
            raise ModelError(
                f"{label}: {stated} of {units.consumer} cannot be removed: at least one must go and one must stay; ask "
                f"for another number of {units.kind}"
            )
        return stay

    def _plan(
        self,
        model: PreTrainedModel,
        units: Sequence[PrunableGroups],
        kept: Mapping[str, Tensor],
        gone: set[str],
        label: str,
    ) -> shrink.PruningPlan:
        present = {one.kind: None for one in units}
        depth: dict[str, list[int]] = {}
        for block in topology.blocks(model) if gone else ():
            depth.setdefault(block.list_name, [])
            if block.name not in gone:
                depth[block.list_name].append(block.index)
        try:
            steps = [narrowing(model, [one for one in units if one.kind == kind], kept) for kind in present]
            return shrink.plan(model, steps, depth)
        except ModelError as error:
            remedy = (
                ". Some configurations admit only numbers of query heads that divide the hidden size: ask for another "
                "number of heads. Where the width of a head follows from these two, no stock model has fewer heads of "
                "the same width: leave heads at 0, and remove neurons and layers"
                if self.heads
                else ""
            )
            raise ModelError(f"{label}: {error}{remedy}") from error

    # -- what is said of it -------------------------------------------------------------------------------------------
    def _report(
        self,
        run: Run,
        units: Sequence[PrunableGroups],
        kept: Mapping[str, Tensor],
        gone: set[str],
        plan: shrink.PruningPlan,
        before: int,
        ranked_by: dict[str, str],
    ) -> None:
        widths: dict[str, list[list[int]]] = {}
        for one in units:
            pair = [len(one), len(kept[one.consumer])]
            if pair not in widths.setdefault(one.kind, []):
                widths[one.kind].append(pair)
        stacks = {stack: [len(plan.before.get_submodule(stack)), len(stay)] for stack, stay in plan.kept_blocks.items()}  # type: ignore[arg-type]
        worked_on = {name.rpartition(".")[0] for one in units for name in one.entries}
        run.cover(self, [*filter(None, map(plan.new_name, worked_on)), *plan.kept_blocks])
        run.report(
            self,
            parameters_before=before,
            parameters_after=run.model.num_parameters(),
            widths=widths,
            layers=stacks,
            removed_layers=sorted(gone),
            ranked_by=ranked_by,
        )

    @hookimpl
    def export(self, run: Run, directory: Path, card: Card) -> None:
        figures = run.reported(self)
        if not figures:
            return
        before, after = figures["parameters_before"], figures["parameters_after"]
        by = ", ".join(f"{kind} by {score}" for kind, score in figures["ranked_by"].items())
        gone = f" Removed layers: {', '.join(figures['removed_layers'])}." if figures["removed_layers"] else ""
        card.paragraph(
            "Structured pruning",
            f"Parts of the model were taken out whole, those of the least score first ({by}), as many in every "
            f"layer: {before:,} parameters became {after:,} ({100 * (1 - after / before):.1f} % fewer). It is an "
            f"ordinary {type(run.model).__name__} with a smaller configuration, and needs nothing to run faster.{gone}",
        )
        rows = [["parameters", f"{before:,}", f"{after:,}"]]
        rows += [[f"{kind} in a layer", str(a), str(b)] for kind, pairs in figures["widths"].items() for a, b in pairs]
        rows += [[f"layers of `{stack}`", str(a), str(b)] for stack, (a, b) in figures["layers"].items()]
        card.table("What structured pruning removed", ["", "before", "after"], rows)


def _mean(sums: Mapping[str, Tensor]) -> dict[str, float]:
    return {name: float(pair[0] / pair[1]) for name, pair in sums.items()}


def narrowing(model: nn.Module, units: Sequence[PrunableGroups], kept: Mapping[str, Tensor]) -> shrink.Slicing:
    """What stays of every parameter, and the numbers that the configuration then has, for units of one kind."""
    stays: dict[str, dict[int, Tensor]] = {}
    sizes: dict[int, int] = {}
    for one in units:
        left = kept[one.consumer]
        sizes |= {len(one): len(left), len(one) * one.query_heads: len(left) * one.query_heads}
        gone = torch.ones(len(one), dtype=torch.bool).index_fill(0, left, False)
        for name, (dim, entries) in one.entries.items():
            everything = torch.ones(model.get_parameter(name).shape[dim], dtype=torch.bool)
            everything[entries[gone].flatten()] = False
            stays.setdefault(name, {})[dim] = everything.nonzero().flatten()
    return shrink.Slicing(stays, sizes, len(left) if one.kind == NEURONS else one.width)


def largest(scores: Tensor, count: int) -> Tensor:
    """The indices of the ``count`` largest scores [n], ascending; of equal ones the lower index."""
    return scores.sort(descending=True, stable=True).indices[:count].sort().values


def outputs_without(
    model: PreTrainedModel, units: Sequence[PrunableGroups], kept: Mapping[str, Tensor], gone: set[str]
) -> Tensor:
    """What the whole model gives for dummy inputs when gates close on all that is to go."""
    gates = {}
    for one in units:
        gone_units = torch.ones(len(one), dtype=torch.bool).index_fill(0, kept[one.consumer], False)
        gates[one.consumer] = one.columns[gone_units].flatten()

    def gate(name: str, tensor: Tensor) -> Tensor | None:
        if name in gone:
            return tensor.new_zeros(())
        return tensor.new_ones(tensor.shape[-1]).index_fill(0, gates[name].to(tensor.device), 0.0)

    readers = {name: model.get_submodule(name) for name in gates}
    with importance.apply_gates(readers, {name: model.get_submodule(name) for name in gone}, gate):
        return main_output(model, dummy_inputs(model))


def require_equal(model: PreTrainedModel, expected: Tensor, label: str) -> None:
    """Raise ``ModelError`` unless the smaller model gives what the whole one gave with its gates closed."""
    found = main_output(model, dummy_inputs(model))
    gap = float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-30))
    if not gap <= rounding_tolerance(model):
        raise ModelError(
            f"{label}: the smaller {type(model).__name__} does not compute what the whole one computes without the "
            f"removed parts (relative difference {gap:.1e}): something in it depends on how many there are. Load the "
            "model again, and remove parts of another kind"
        )


def _count(asked: int | float, size: int) -> int:
    return asked if isinstance(asked, int) else masks.removed_count(size, asked)


@hookimpl
def register_techniques(register):
    register(Structured)
