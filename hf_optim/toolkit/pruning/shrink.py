"""Structural pruning: slice the parameters of a transformer, remove blocks, and update its configuration, in place.

No architecture is hard-coded. The configuration fields that determine the new shapes are found by trial
(``smaller_config.py``). All other attributes that differ between the meta models built before and after
(widths stored in modules, layer indices for the cache) are copied to the live model, which stays the same object.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from ...errors import ModelError
from ..attention import patterns_of
from ..topology.block_lists import blocks
from .built_models import Shapes, built_differences, meta_model, new_name_of, origins, same_classes, shapes_of
from .smaller_config import common_indices, find_config, find_shallow_config


@dataclass(frozen=True)
class Slicing:
    """The parts of parameters to keep.

    Attributes:
        kept: parameter name -> dimension -> indices to keep, ascending int64.
        sizes: old number in a field of the configuration -> new number.
        derived: the value to give a field that is None now, if the old numbers determine it (a head's width).
    """

    kept: Mapping[str, Mapping[int, Tensor]]
    sizes: Mapping[int, int]
    derived: int | None = None


@dataclass(frozen=True)
class PruningPlan:
    """A plan to make a model smaller: made by ``plan``, executed by ``apply_``.

    Attributes:
        slicings: the parts of parameters to keep, one slicing for each set of configuration fields.
        kept_blocks: name of a block list -> the indices of the blocks to keep, ascending.
        before, after: models on the meta device, as transformers builds them.
    """

    slicings: tuple[Slicing, ...]
    kept_blocks: Mapping[str, Sequence[int]]
    before: PreTrainedModel = field(repr=False)
    after: PreTrainedModel = field(repr=False)

    def new_name(self, name: str) -> str | None:
        """Return the new name of a module or parameter; None if it is removed with its block."""
        return new_name_of(name, self.kept_blocks)

    def new_names(self, name: str) -> list[str]:
        """Return ``new_name`` as a list with at most one name, as ``Run.rename`` takes it."""
        return [new] if (new := self.new_name(name)) is not None else []

    def slice(self, name: str, tensor: Tensor) -> Tensor:
        """Slice a tensor in the shape of the parameter ``name`` (its old name), such as its mask."""
        for slicing in self.slicings:
            for dim, kept in slicing.kept.get(name, {}).items():
                tensor = tensor.index_select(dim, kept.to(tensor.device))
        return tensor


def plan(
    model: PreTrainedModel, slicings: Sequence[Slicing], kept_blocks: Mapping[str, Sequence[int]] | None = None
) -> PruningPlan:
    """Find the configuration of the smaller model. The model is not changed.

    Raises ``ModelError`` if no configuration of this class gives the shapes, if the model is not what its configuration
    builds, or if a block would compute something else at its new index.
    """
    kept_blocks = {stack: tuple(kept) for stack, kept in (kept_blocks or {}).items()}
    counts = {stack: len(model.get_submodule(stack)) for stack in kept_blocks}  # type: ignore[arg-type]
    kept_blocks = {stack: kept for stack, kept in kept_blocks.items() if len(kept) < counts[stack]}
    if kept_blocks:
        require_equal_patterns(model)
    before = meta_model(model, model.config)
    shapes = shapes_of(model)
    if shapes != shapes_of(before) or not same_classes(model, before):
        raise ModelError(
            f"this {type(model).__name__} is not what its configuration builds (adapters, replaced or quantized "
            "modules), so the configuration of a smaller one cannot be found"
        )
    _require_disjoint(slicings)
    config: PretrainedConfig = before.config
    for slicing in slicings:
        shapes = _sliced_shapes(shapes, slicing.kept)
        config = find_config(model, config, shapes, slicing.sizes, slicing.derived)
    if kept_blocks:
        deep = meta_model(model, config)
        shapes = {new: shape for name, shape in shapes.items() if (new := new_name_of(name, kept_blocks)) is not None}
        sizes = {counts[stack]: len(kept) for stack, kept in kept_blocks.items()}
        config = find_shallow_config(model, deep, shapes, sizes, common_indices(counts, kept_blocks), kept_blocks)
    return PruningPlan(tuple(slicings), kept_blocks, before, meta_model(model, config))


@torch.no_grad()
def apply_(model: PreTrainedModel, plan: PruningPlan) -> None:
    """Execute a plan in place: parameters, remaining modules and the configuration stay the same objects."""
    for name, parameter in model.named_parameters():
        sliced = plan.slice(name, parameter.data)
        if sliced is not parameter.data:
            parameter.data = sliced
            parameter.grad = None
    for stack, kept in plan.kept_blocks.items():
        module = model.get_submodule(stack)
        members = list(module._modules.values())
        module._modules = {str(new): members[old] for new, old in enumerate(kept)}
    modules = dict(model.named_modules(remove_duplicate=False))
    for name, attribute, _, value in built_differences(plan.before, plan.after, plan.kept_blocks):
        setattr(modules[name], attribute, value)
    _update_configs(model, plan)


def require_equal_patterns(model: PreTrainedModel) -> None:
    """Raise ``ModelError`` if the attention pattern of a layer follows from its index, which removal changes."""
    try:
        patterns = patterns_of(model.config)
    except ValueError:  # no pattern by layer, such as compressed attention
        return
    if len(set(patterns or ())) > 1:
        raise ModelError(
            f"the attention pattern differs between layers of {type(model).__name__}, and a layer that gets another "
            "number would get another pattern: remove layers first, in a recipe of its own, then change the attention"
        )


def removable_blocks(model: PreTrainedModel) -> dict[str, list[int]]:
    """Return the indices, per block list, of the blocks that may be removed.

    A block may not be removed if it has parameters that another block of the list does not have (T5's position biases).
    """
    stacks: dict[str, dict[int, set[str]]] = {}
    for block in blocks(model):
        stacks.setdefault(block.list_name, {})[block.index] = {name for name, _ in block.module.named_parameters()}
    common = {stack: set.intersection(*members.values()) for stack, members in stacks.items()}
    return {
        stack: [index for index, names in members.items() if names == common[stack]]
        for stack, members in stacks.items()
    }


def _require_disjoint(slicings: Sequence[Slicing]) -> None:
    seen: set[tuple[str, int]] = set()
    for slicing in slicings:
        dims = {(name, dim) for name, kept in slicing.kept.items() for dim in kept}
        if both := sorted(dims & seen):
            raise ModelError(f"{both[0][0]} holds parts of two kinds along one dimension; remove one kind at a time")
        seen |= dims


def _sliced_shapes(shapes: Shapes, kept: Mapping[str, Mapping[int, Tensor]]) -> Shapes:
    return {
        name: tuple(len(kept.get(name, {}).get(dim, range(size))) for dim, size in enumerate(shape))
        for name, shape in shapes.items()
    }


def _update_configs(model: PreTrainedModel, plan: PruningPlan) -> None:
    live, old = origins(model, {}), origins(plan.before, plan.kept_blocks)
    for name, module in plan.after.named_modules(remove_duplicate=False):
        config = vars(module).get("config")
        if isinstance(config, PretrainedConfig) and isinstance(vars(live[name]).get("config"), PretrainedConfig):
            _update(vars(live[name])["config"], vars(old[name])["config"], config)


def _update(live: PretrainedConfig, before: PretrainedConfig, after: PretrainedConfig) -> None:
    for name, value in vars(after).items():
        if isinstance(value, PretrainedConfig):
            _update(getattr(live, name), getattr(before, name), value)
        elif value != vars(before).get(name):
            vars(live)[name] = copy.deepcopy(value)
