"""Structural pruning: slice the parameters of a transformer, remove blocks, and update its configuration, in place.

No architecture is hard-coded. The configuration fields that determine the new shapes are found by trial: fields with
the old number get the new one, the model is built from them on the meta device, and the shapes of its parameters are
compared with the target shapes. All other attributes that differ between the meta models built before and after
(widths stored in modules, layer indices for the cache) are copied to the live model, which stays the same object.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from ...errors import ModelError
from ...trust.bounds import first_line
from ..attention import patterns_of
from ..topology.block_lists import blocks

Shapes = dict[str, tuple[int, ...]]
Change = tuple[tuple[str, ...], Any]  # path of a field in the configuration, and its new value

# Upper limit on the fields with a matching number that are tried in all combinations.
MAX_FIELDS = 6


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
        return _new_name(name, self.kept_blocks)

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
    before = _meta_model(model, model.config)
    shapes = _shapes(model)
    if shapes != _shapes(before) or not _same_classes(model, before):
        raise ModelError(
            f"this {type(model).__name__} is not what its configuration builds (adapters, replaced or quantized "
            "modules), so the configuration of a smaller one cannot be found"
        )
    _require_disjoint(slicings)
    config: PretrainedConfig = before.config
    for slicing in slicings:
        shapes = _sliced_shapes(shapes, slicing.kept)
        config = _find_config(model, config, shapes, slicing.sizes, slicing.derived)
    if kept_blocks:
        deep = _meta_model(model, config)
        shapes = {new: shape for name, shape in shapes.items() if (new := _new_name(name, kept_blocks)) is not None}
        sizes = {counts[stack]: len(kept) for stack, kept in kept_blocks.items()}
        config = _find_shallow_config(model, deep, shapes, sizes, _common_indices(counts, kept_blocks), kept_blocks)
    return PruningPlan(tuple(slicings), kept_blocks, before, _meta_model(model, config))


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
    for name, attribute, _, value in _differences(plan.before, plan.after, plan.kept_blocks):
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


# -- the configuration --------------------------------------------------------------------------------------------
def _require_disjoint(slicings: Sequence[Slicing]) -> None:
    seen: set[tuple[str, int]] = set()
    for slicing in slicings:
        dims = {(name, dim) for name, kept in slicing.kept.items() for dim in kept}
        if both := sorted(dims & seen):
            raise ModelError(f"{both[0][0]} holds parts of two kinds along one dimension; remove one kind at a time")
        seen |= dims


def _find_config(
    model: PreTrainedModel,
    config: PretrainedConfig,
    target: Shapes,
    sizes: Mapping[int, int],
    derived: int | None = None,
    always: Sequence[Change] = (),
) -> PretrainedConfig:
    """Return ``config`` with ``always`` and the fewest changes that give ``target``. Raises ``ModelError``."""
    reason = ""
    for changes in _candidates(config, sizes, derived, _missing_fields(model, config) if derived is not None else ()):
        changed = _changed(config, [*always, *changes])
        try:
            smaller = _meta_model(model, changed)
        except Exception as error:  # a class may raise anything for numbers that do not match
            reason = reason or f" ({first_line(error, 160, typed=True)})"
            continue
        if _shapes(smaller) == target:
            return smaller.config
    numbers = ", ".join(f"{old} to {new}" for old, new in sizes.items() if old != new)
    raise ModelError(
        f"no configuration of {type(model).__name__} gives the smaller shapes: changing its fields that hold the old "
        f"number, alone or together, does not ({numbers}){reason}"
    )


def _find_shallow_config(
    model: PreTrainedModel,
    deep: PreTrainedModel,
    target: Shapes,
    sizes: Mapping[int, int],
    lists: Mapping[int, Sequence[int]],
    kept_blocks: Mapping[str, Sequence[int]],
) -> PretrainedConfig:
    """Return the configuration of ``deep`` without the removed blocks. Raises ``ModelError``.

    A list in the configuration that is as long as the block list loses the entries of the removed blocks if its name
    contains "layer" (``layer_types``, ``no_rope_layers``). Any other list may have that length by chance (three EOS ids
    and three layers): it loses entries only if the remaining blocks would otherwise be built differently
    (``activation_sparsity_pattern``).
    """
    changes = list(_list_changes(deep.config, lists))
    named = [change for change in changes if "layer" in change[0][-1]]
    others = [change for change in changes if change not in named][:MAX_FIELDS]
    first = ""
    for more in (subset for count in range(len(others) + 1) for subset in combinations(others, count)):
        try:
            config = _find_config(model, deep.config, target, sizes, always=[*named, *more])
            _require_same_behaviour(deep, _meta_model(model, config), kept_blocks)
            return config
        except ModelError as error:
            first = first or str(error)  # not the exception: it refers to this frame
    raise ModelError(first)


def _candidates(
    config: PretrainedConfig, sizes: Mapping[int, int], derived: int | None, missing: Sequence[str]
) -> Iterator[tuple[Change, ...]]:
    """Yield sets of changes to try, fewest fields first; then the same sets with one more field set to ``derived``.

    That field is None now, or one that the class reads and the configuration does not have (``missing``): Qwen2's
    ``head_dim``.
    """
    fields = list(_fields(config))
    held = [(path, sizes[value]) for path, value in fields if type(value) is int and value in sizes][:MAX_FIELDS]
    subsets = [subset for count in range(len(held) + 1) for subset in combinations(held, count)]
    yield from subsets[1:]
    if derived is not None:
        empty = [(path, derived) for path, value in fields if value is None]
        empty += [((name,), derived) for name in missing]
        yield from ((*subset, extra) for subset in subsets for extra in empty)


def _fields(config: PretrainedConfig, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield the path and value of every field of a configuration and of its sub-configurations."""
    for name, value in vars(config).items():
        if isinstance(value, PretrainedConfig):
            yield from _fields(value, (*path, name))
        elif not name.startswith("_"):
            yield (*path, name), value


def _list_changes(config: PretrainedConfig, lists: Mapping[int, Sequence[int]]) -> Iterator[Change]:
    """Yield the changes that slice the lists of a configuration; ``lists``: length -> indices to keep."""
    for path, value in _fields(config):
        # Lists of token ids do not depend on the layers, whatever their length.
        if isinstance(value, (list, tuple)) and len(value) in lists and "token" not in path[-1]:
            yield path, type(value)(value[index] for index in lists[len(value)])


def _common_indices(counts: Mapping[str, int], kept_blocks: Mapping[str, Sequence[int]]) -> dict[int, Sequence[int]]:
    """Return length -> indices to keep, for the lengths whose block lists all keep the same indices."""
    found: dict[int, set[tuple[int, ...]]] = {}
    for stack, kept in kept_blocks.items():
        found.setdefault(counts[stack], set()).add(tuple(kept))
    return {count: next(iter(kept)) for count, kept in found.items() if len(kept) == 1}


def _changed(config: PretrainedConfig, changes: Sequence[Change]) -> PretrainedConfig:
    changed = copy.deepcopy(config)
    for path, value in changes:
        owner: Any = changed
        for name in path[:-1]:
            owner = getattr(owner, name)
        vars(owner)[path[-1]] = value
    return changed


def _meta_model(model: PreTrainedModel, config: PretrainedConfig) -> PreTrainedModel:
    """Build the model on the meta device from ``config`` after a round trip through its serialized form."""
    read = type(config).from_dict(copy.deepcopy(config).to_dict())
    with torch.device("meta"):
        return type(model)(read)


def _missing_fields(model: PreTrainedModel, config: PretrainedConfig) -> list[str]:
    """Return the fields that the model's class reads and that its configuration does not have."""
    missing: dict[str, None] = {}

    def record(self: Any, name: str) -> Any:
        missing[name] = None
        raise AttributeError(name)

    # ``__getattr__`` is called only for attributes that are not found otherwise.
    watched = copy.deepcopy(config)
    watched.__class__ = type(type(config).__name__, (type(config),), {"__getattr__": record})
    with torch.device("meta"):
        type(model)(watched)
    return [name for name in missing if not name.startswith("_")]


def _shapes(model: nn.Module) -> Shapes:
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {name: tuple(tensor.shape) for name, tensor in tensors}


def _sliced_shapes(shapes: Shapes, kept: Mapping[str, Mapping[int, Tensor]]) -> Shapes:
    return {
        name: tuple(len(kept.get(name, {}).get(dim, range(size))) for dim, size in enumerate(shape))
        for name, shape in shapes.items()
    }


# -- other attributes that depend on it ---------------------------------------------------------------------------
def _differences(
    before: PreTrainedModel, after: PreTrainedModel, kept_blocks: Mapping[str, Sequence[int]]
) -> Iterator[tuple[str, str, Any, Any]]:
    """Yield the plain attributes of modules that differ: name in ``after``, attribute, old value, new value."""
    olds = _origins(before, kept_blocks)
    for name, module in after.named_modules(remove_duplicate=False):
        for attribute, value in vars(module).items():
            old = vars(olds[name]).get(attribute)
            if not attribute.startswith("_") and _is_plain(value) and old != value:
                yield name, attribute, old, value


def _origins(model: nn.Module, kept_blocks: Mapping[str, Sequence[int]]) -> dict[str, nn.Module]:
    """Return new name -> module of the unmodified model, without the removed blocks."""
    found = model.named_modules(remove_duplicate=False)
    return {new: module for name, module in found if (new := _new_name(name, kept_blocks)) is not None}


def _require_same_behaviour(
    before: PreTrainedModel, after: PreTrainedModel, kept_blocks: Mapping[str, Sequence[int]]
) -> None:
    """Raise ``ModelError`` if a block is built differently at its new index, other than by the index itself."""
    for name, attribute, old, value in _differences(before, after, kept_blocks):
        stack = next((stack for stack in kept_blocks if name.startswith(stack + ".")), None)
        if stack is None:
            continue
        index = int(name[len(stack) + 1 :].split(".")[0])
        if type(old) is int and type(value) is int and old - value == kept_blocks[stack][index] - index:
            continue
        raise ModelError(
            f"block {kept_blocks[stack][index]} of {stack} would change at index {index}: {attribute} is {old!r} and "
            f"would become {value!r}; remove other blocks, or none"
        )


def _update_configs(model: PreTrainedModel, plan: PruningPlan) -> None:
    live, old = _origins(model, {}), _origins(plan.before, plan.kept_blocks)
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


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(map(_is_plain, (*value.keys(), *value.values())))
    if isinstance(value, (list, tuple, set)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (bool, int, float, str))


def _same_classes(model: nn.Module, other: nn.Module) -> bool:
    one, two = (dict(m.named_modules(remove_duplicate=False)) for m in (model, other))
    return one.keys() == two.keys() and all(type(one[name]) is type(two[name]) for name in one)


def _new_name(name: str, kept_blocks: Mapping[str, Collection[int]]) -> str | None:
    for stack, kept in kept_blocks.items():
        if name.startswith(stack + "."):
            index, dot, rest = name[len(stack) + 1 :].partition(".")
            return f"{stack}.{list(kept).index(int(index))}{dot}{rest}" if int(index) in kept else None
    return name
