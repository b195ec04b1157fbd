"""Make a transformer smaller in place: parts of its parameters, whole blocks, and the configuration that says so.

Nothing is known about the configuration of an architecture. Which of its fields express the new shapes is found by
trying: those that hold the old number get the new one, a model without weights is built from them, and its parameters
must have the shapes that are wanted. Whatever else differs between the models built before and after (widths that
modules remember, the layers' numbers for the cache) is set on the live model, which stays the object that it is.
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
from ..topology.block_lists import blocks

Shapes = dict[str, tuple[int, ...]]
Change = tuple[tuple[str, ...], Any]  # path of a field in the configuration, and its new value

MAX_FIELDS = 6
"""So many fields that hold a number are tried in all combinations."""


@dataclass(frozen=True)
class Slicing:
    """Parts of parameters that stay.

    Attributes:
        kept: parameter name -> dimension -> indices that stay, ascending int64.
        sizes: number that a field of the configuration may hold now -> the one that it has to hold then.
        unset: what a field may have to say that is None now, where the old numbers gave it (a head's width).
    """

    kept: Mapping[str, Mapping[int, Tensor]]
    sizes: Mapping[int, int]
    unset: int | None = None


@dataclass(frozen=True)
class PruningPlan:
    """How a model becomes smaller: ``plan`` makes one, ``apply_`` carries it out.

    Attributes:
        narrowings: parts of parameters that stay, in steps that have fields of the configuration of their own.
        depth: name of a stack of blocks -> the positions that stay, ascending.
        before, after: models on the meta device, as transformers builds them.
    """

    narrowings: tuple[Slicing, ...]
    depth: Mapping[str, Sequence[int]]
    before: PreTrainedModel = field(repr=False)
    after: PreTrainedModel = field(repr=False)

    def rename(self, name: str) -> str | None:
        """What a module or parameter of that name is called afterwards; None where it went with its block."""
        return _renamed(name, self.depth)

    def renamed(self, name: str) -> list[str]:
        """``rename`` as ``Run.rename`` asks for it: the one name, or none."""
        return [new] if (new := self.rename(name)) is not None else []

    def narrow(self, name: str, tensor: Tensor) -> Tensor:
        """What stays of a tensor in the shape of the parameter ``name`` (its old name), such as its mask."""
        for narrowing in self.narrowings:
            for dim, kept in narrowing.kept.get(name, {}).items():
                tensor = tensor.index_select(dim, kept.to(tensor.device))
        return tensor


def plan(
    model: PreTrainedModel, narrowings: Sequence[Slicing], depth: Mapping[str, Sequence[int]] | None = None
) -> PruningPlan:
    """Find the configuration of the smaller model. The model is not changed.

    Raises ``ModelError`` where no configuration of this class gives the shapes, where the model is not what its
    configuration builds, and where blocks would do something else at their new places.
    """
    depth = {stack: tuple(kept) for stack, kept in (depth or {}).items()}
    counts = {stack: len(model.get_submodule(stack)) for stack in depth}  # type: ignore[arg-type]
    depth = {stack: kept for stack, kept in depth.items() if len(kept) < counts[stack]}
    before = _twin(model, model.config)
    shapes = _shapes(model)
    if shapes != _shapes(before) or not _same_classes(model, before):
        raise ModelError(
            f"this {type(model).__name__} is not what its configuration builds (adapters, replaced or quantized "
            "modules), so no configuration of a smaller one is known"
        )
    _require_apart(narrowings)
    config: PretrainedConfig = before.config
    for narrowing in narrowings:
        shapes = _narrowed(shapes, narrowing.kept)
        config = _fit(model, config, shapes, narrowing.sizes, narrowing.unset)
    if depth:
        wide = _twin(model, config)
        shapes = {new: shape for name, shape in shapes.items() if (new := _renamed(name, depth)) is not None}
        sizes = {counts[stack]: len(kept) for stack, kept in depth.items()}
        config = _fit_depth(model, wide, shapes, sizes, _agreed(counts, depth), depth)
    return PruningPlan(tuple(narrowings), depth, before, _twin(model, config))


@torch.no_grad()
def apply_(model: PreTrainedModel, shrinking: PruningPlan) -> None:
    """Carry out a plan: parameters, modules and configuration stay the objects that they are; removed blocks go."""
    for name, parameter in model.named_parameters():
        narrowed = shrinking.narrow(name, parameter.data)
        if narrowed is not parameter.data:
            parameter.data = narrowed
            parameter.grad = None
    for stack, kept in shrinking.depth.items():
        module = model.get_submodule(stack)
        members = list(module._modules.values())
        module._modules = {str(place): members[index] for place, index in enumerate(kept)}
    modules = dict(model.named_modules(remove_duplicate=False))
    for name, attribute, _, value in _differences(shrinking.before, shrinking.after, shrinking.depth):
        setattr(modules[name], attribute, value)
    _update_configs(model, shrinking)


def removable_blocks(model: PreTrainedModel) -> dict[str, list[int]]:
    """The positions in each stack of blocks that may be removed: those that hold no parameter which another lacks."""
    stacks: dict[str, dict[int, set[str]]] = {}
    for block in blocks(model):
        stacks.setdefault(block.list_name, {})[block.index] = {name for name, _ in block.module.named_parameters()}
    common = {stack: set.intersection(*members.values()) for stack, members in stacks.items()}
    return {
        stack: [index for index, names in members.items() if names == common[stack]]
        for stack, members in stacks.items()
    }


# -- the configuration --------------------------------------------------------------------------------------------
def _require_apart(narrowings: Sequence[Slicing]) -> None:
    seen: set[tuple[str, int]] = set()
    for narrowing in narrowings:
        places = {(name, dim) for name, dims in narrowing.kept.items() for dim in dims}
        if both := sorted(places & seen):
            raise ModelError(f"{both[0][0]} holds parts of two kinds along one dimension; remove one kind at a time")
        seen |= places


def _fit(
    model: PreTrainedModel,
    config: PretrainedConfig,
    wanted: Shapes,
    sizes: Mapping[int, int],
    unset: int | None = None,
    always: Sequence[Change] = (),
) -> PretrainedConfig:
    """``config`` with ``always`` and the fewest changes that give the ``wanted`` shapes. Raises ``ModelError``."""
    reason = ""
    for changes in _choices(config, sizes, unset, _asked_for(model, config) if unset is not None else ()):
        changed = _changed(config, [*always, *changes])
        try:
            twin = _twin(model, changed)
        except Exception as error:  # whatever a class says to numbers that do not go together
            reason = reason or f" ({type(error).__name__}: {_first_line(error)})"
            continue
        if _shapes(twin) == wanted:
            return twin.config
    numbers = ", ".join(f"{old} to {new}" for old, new in sizes.items() if old != new)
    raise ModelError(
        f"no configuration of {type(model).__name__} gives the smaller shapes: none of its fields that hold the old "
        f"number does, nor any of them together ({numbers}){reason}"
    )


def _fit_depth(
    model: PreTrainedModel,
    wide: PreTrainedModel,
    wanted: Shapes,
    sizes: Mapping[int, int],
    lists: Mapping[int, Sequence[int]],
    depth: Mapping[str, Sequence[int]],
) -> PretrainedConfig:
    """The configuration of ``wide`` without the blocks that go. Raises ``ModelError``.

    A list as long as the stack loses their places if its name speaks of layers (``layer_types``,
    ``no_rope_layers``). Any other may be as long by chance (three ids that end a text, beside three layers): it loses
    them only if the blocks that stay are not built as they were without that (``activation_sparsity_pattern``).
    """
    changes = list(_list_changes(wide.config, lists))
    named = [change for change in changes if "layer" in change[0][-1]]
    others = [change for change in changes if change not in named][:MAX_FIELDS]
    first: ModelError | None = None
    for more in (subset for count in range(len(others) + 1) for subset in combinations(others, count)):
        try:
            config = _fit(model, wide.config, wanted, sizes, always=[*named, *more])
            _require_same_behaviour(wide, _twin(model, config), depth)
            return config
        except ModelError as error:
            first = first or error
    assert first is not None
    raise first


def _choices(
    config: PretrainedConfig, sizes: Mapping[int, int], unset: int | None, asked: Sequence[str]
) -> Iterator[tuple[Change, ...]]:
    """Sets of changes to try, fewest fields first; after them, those with one field more.

    That is one which is None now, or which the class asks for and does not find (``asked``): Qwen2's ``head_dim``.
    """
    fields = list(_fields(config))
    held = [(path, sizes[value]) for path, value in fields if type(value) is int and value in sizes][:MAX_FIELDS]
    subsets = [subset for count in range(len(held) + 1) for subset in combinations(held, count)]
    yield from subsets[1:]
    if unset is not None:
        empty = [(path, unset) for path, value in fields if value is None]
        empty += [((name,), unset) for name in asked]
        yield from ((*subset, extra) for subset in subsets for extra in empty)


def _fields(config: PretrainedConfig, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """The fields of a configuration and of those inside it, by path."""
    for name, value in vars(config).items():
        if isinstance(value, PretrainedConfig):
            yield from _fields(value, (*path, name))
        elif not name.startswith("_"):
            yield (*path, name), value


def _list_changes(config: PretrainedConfig, lists: Mapping[int, Sequence[int]]) -> Iterator[Change]:
    for path, value in _fields(config):
        # Ids of tokens have nothing to do with layers, however many there are.
        if isinstance(value, (list, tuple)) and len(value) in lists and "token" not in path[-1]:
            yield path, type(value)(value[index] for index in lists[len(value)])


def _agreed(counts: Mapping[str, int], depth: Mapping[str, Sequence[int]]) -> dict[int, Sequence[int]]:
    """For each number of blocks the positions that stay, where all stacks of so many blocks keep the same."""
    found: dict[int, set[tuple[int, ...]]] = {}
    for stack, kept in depth.items():
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


def _twin(model: PreTrainedModel, config: PretrainedConfig) -> PreTrainedModel:
    """The model that transformers builds from ``config`` after writing and reading it, without weights."""
    read = type(config).from_dict(copy.deepcopy(config).to_dict())
    with torch.device("meta"):
        return type(model)(read)


def _asked_for(model: PreTrainedModel, config: PretrainedConfig) -> list[str]:
    """The fields that the model's class looks for in its configuration and does not find."""
    missed: dict[str, None] = {}

    def miss(self: Any, name: str) -> Any:
        missed[name] = None
        raise AttributeError(name)

    watched = copy.deepcopy(config)
    watched.__class__ = type(type(config).__name__, (type(config),), {"__getattr__": miss})
    with torch.device("meta"):
        type(model)(watched)
    return [name for name in missed if not name.startswith("_")]


def _shapes(model: nn.Module) -> Shapes:
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {name: tuple(tensor.shape) for name, tensor in tensors}


def _narrowed(shapes: Shapes, kept: Mapping[str, Mapping[int, Tensor]]) -> Shapes:
    return {
        name: tuple(len(kept.get(name, {}).get(dim, range(size))) for dim, size in enumerate(shape))
        for name, shape in shapes.items()
    }


# -- what else depends on it --------------------------------------------------------------------------------------
def _differences(
    before: PreTrainedModel, after: PreTrainedModel, depth: Mapping[str, Sequence[int]]
) -> Iterator[tuple[str, str, Any, Any]]:
    """Plain attributes in which a model differs from the module it was: name in ``after``, attribute, old, new."""
    olds = _origins(before, depth)
    for name, module in after.named_modules(remove_duplicate=False):
        for attribute, value in vars(module).items():
            old = vars(olds[name]).get(attribute)
            if not attribute.startswith("_") and _is_plain(value) and old != value:
                yield name, attribute, old, value


def _origins(model: nn.Module, depth: Mapping[str, Sequence[int]]) -> dict[str, nn.Module]:
    """New name -> module of the model as it was, without the blocks that go."""
    found = model.named_modules(remove_duplicate=False)
    return {new: module for name, module in found if (new := _renamed(name, depth)) is not None}


def _require_same_behaviour(
    before: PreTrainedModel, after: PreTrainedModel, depth: Mapping[str, Sequence[int]]
) -> None:
    """Raise ``ModelError`` if a block is built in another way at its new place; its number may differ."""
    for name, attribute, old, value in _differences(before, after, depth):
        stack = next((stack for stack in depth if name.startswith(stack + ".")), None)
        if stack is None:
            continue
        place = int(name[len(stack) + 1 :].split(".")[0])
        if type(old) is int and type(value) is int and old - value == depth[stack][place] - place:
            continue
        raise ModelError(
            f"block {depth[stack][place]} of {stack} would be another at place {place}: {attribute} is {old!r} and "
            f"would become {value!r}; remove other blocks, or none"
        )


def _update_configs(model: PreTrainedModel, shrinking: PruningPlan) -> None:
    live, old = _origins(model, {}), _origins(shrinking.before, shrinking.depth)
    for name, module in shrinking.after.named_modules(remove_duplicate=False):
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


def _same_classes(model: nn.Module, twin: nn.Module) -> bool:
    one, two = (dict(m.named_modules(remove_duplicate=False)) for m in (model, twin))
    return one.keys() == two.keys() and all(type(one[name]) is type(two[name]) for name in one)


def _renamed(name: str, depth: Mapping[str, Collection[int]]) -> str | None:
    for stack, kept in depth.items():
        if name.startswith(stack + "."):
            index, dot, rest = name[len(stack) + 1 :].partition(".")
            return f"{stack}.{list(kept).index(int(index))}{dot}{rest}" if int(index) in kept else None
    return name


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:160] if lines else ""
