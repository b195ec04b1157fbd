"""The configuration of a smaller model, found by trial.

Fields with the old number get the new one, the model is built from them on the meta device, and the shapes of its
parameters are compared with the target shapes.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

from ...errors import ModelError
from ...trust.bounds import first_line
from .built_models import Shapes, meta_model, require_same_behaviour, shapes_of

Change = tuple[tuple[str, ...], Any]  # path of a field in the configuration, and its new value
# Upper limit on the fields with a matching number that are tried in all combinations.
MAX_FIELDS = 6


def find_config(
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
            smaller = meta_model(model, changed)
        except Exception as error:  # a class may raise anything for numbers that do not match
            reason = reason or f" ({first_line(error, 160, typed=True)})"
            continue
        if shapes_of(smaller) == target:
            return smaller.config
    numbers = ", ".join(f"{old} to {new}" for old, new in sizes.items() if old != new)
    raise ModelError(
        f"no configuration of {type(model).__name__} gives the smaller shapes: changing its fields that hold the old "
        f"number, alone or together, does not ({numbers}){reason}"
    )


def find_shallow_config(
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
            config = find_config(model, deep.config, target, sizes, always=[*named, *more])
            require_same_behaviour(deep, meta_model(model, config), kept_blocks)
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


def common_indices(counts: Mapping[str, int], kept_blocks: Mapping[str, Sequence[int]]) -> dict[int, Sequence[int]]:
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
