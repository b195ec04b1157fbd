"""Models that transformers builds from a configuration, without weights, and how two of them differ.

The second may lack blocks of the first: ``kept_blocks`` has, for the name of a block list, the indices of those that
stay, ascending. Names of modules and parameters are then renumbered.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from ...errors import ModelError

Shapes = dict[str, tuple[int, ...]]


def meta_model(model: PreTrainedModel, config: PretrainedConfig) -> PreTrainedModel:
    """Build the model on the meta device from ``config`` after a round trip through its serialized form."""
    read = type(config).from_dict(copy.deepcopy(config).to_dict())
    with torch.device("meta"):
        return type(model)(read)


def shapes_of(model: nn.Module) -> Shapes:
    """Return the shapes of parameters and buffers by name."""
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {name: tuple(tensor.shape) for name, tensor in tensors}


def same_classes(model: nn.Module, other: nn.Module) -> bool:
    """Return True if two models have modules of the same names and classes."""
    one, two = (dict(m.named_modules(remove_duplicate=False)) for m in (model, other))
    return one.keys() == two.keys() and all(type(one[name]) is type(two[name]) for name in one)


def new_name_of(name: str, kept_blocks: Mapping[str, Collection[int]]) -> str | None:
    """Return the name of a module or parameter without the removed blocks; None if it is removed with its block."""
    for stack, kept in kept_blocks.items():
        if name.startswith(stack + "."):
            index, dot, rest = name[len(stack) + 1 :].partition(".")
            return f"{stack}.{list(kept).index(int(index))}{dot}{rest}" if int(index) in kept else None
    return name


def origins(model: nn.Module, kept_blocks: Mapping[str, Sequence[int]]) -> dict[str, nn.Module]:
    """Return new name -> module of the unmodified model, without the removed blocks."""
    found = model.named_modules(remove_duplicate=False)
    return {new: module for name, module in found if (new := new_name_of(name, kept_blocks)) is not None}


def built_differences(
    before: PreTrainedModel, after: PreTrainedModel, kept_blocks: Mapping[str, Sequence[int]]
) -> Iterator[tuple[str, str, Any, Any]]:
    """Yield the plain attributes of modules that differ: name in ``after``, attribute, old value, new value."""
    olds = origins(before, kept_blocks)
    for name, module in after.named_modules(remove_duplicate=False):
        for attribute, value in vars(module).items():
            old = vars(olds[name]).get(attribute)
            if not attribute.startswith("_") and _is_plain(value) and old != value:
                yield name, attribute, old, value


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(map(_is_plain, (*value.keys(), *value.values())))
    if isinstance(value, (list, tuple, set)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (bool, int, float, str))


def require_same_behaviour(
    before: PreTrainedModel, after: PreTrainedModel, kept_blocks: Mapping[str, Sequence[int]]
) -> None:
    """Raise ``ModelError`` if a block is built differently at its new index, other than by the index itself."""
    for name, attribute, old, value in built_differences(before, after, kept_blocks):
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
