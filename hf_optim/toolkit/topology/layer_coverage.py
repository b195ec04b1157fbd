"""How much of a model a technique touched, and what it left out."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from torch import nn

from .block_lists import block_of, blocks
from .experts import expert_linears
from .linear_layers import features, is_codebook_matrix, linears, parameter_names
from .selection import match


@dataclass(frozen=True)
class Skipped:
    """Weights that were left out for the same reason: the `names` and how many numbers they hold."""

    reason: str
    names: tuple[str, ...]
    weights: int


@dataclass(frozen=True)
class Coverage:
    """Numbers of weights; a tied weight counts once.

    `touched`: in the touched modules.  `block_linears`: in the linear layers inside the blocks.
    `block_weights`: in all matrices inside the blocks, experts and routers included.  `total`: in the whole
    model.
    """

    touched: int
    touched_in_blocks: int
    block_linears: int
    block_weights: int
    total: int
    skipped: tuple[Skipped, ...]

    @property
    def fraction(self) -> float:
        """Part of the matrices inside the blocks that was touched, in [0, 1]."""
        return self.touched_in_blocks / self.block_weights if self.block_weights else 0.0

    @property
    def fraction_of_total(self) -> float:
        """Part of all weights that was touched, in [0, 1]."""
        return self.touched / self.total if self.total else 0.0

    def __str__(self) -> str:
        lines = [f"{self.fraction:.1%} of the weights in the blocks, {self.fraction_of_total:.1%} of all"]
        lines += [f"  not touched: {item.reason}, {item.weights:,} weights" for item in self.skipped]
        return "\n".join(lines)


@dataclass(frozen=True)
class _Item:
    """A weight: every name it is registered under, its size, what it is and the reason to leave it out."""

    names: tuple[str, ...]
    weights: int
    matrix: bool
    linear: bool
    in_block: bool
    reason: str


def coverage(model: nn.Module, touched: Iterable[str]) -> Coverage:
    """What the modules or parameters named in `touched` are of all weights of `model`.

    For a module the matrices inside it count; a linear layer has `out_features * in_features` weights,
    however it stores them.  Raises `ValueError` for an unknown name.
    """
    items = _items(model)
    known = dict(model.named_modules(remove_duplicate=False))
    chosen = set(match([*known, *(name for item in items for name in item.names)], touched))
    hit = [_is_chosen(item, chosen) for item in items]
    left: dict[str, list[_Item]] = defaultdict(list)
    for item, is_hit in zip(items, hit, strict=True):
        if not is_hit:
            left[item.reason].append(item)
    touched_items = [item for item, is_hit in zip(items, hit, strict=True) if is_hit]
    matrices = [item for item in items if item.in_block and item.matrix]
    return Coverage(
        touched=_sum(touched_items),
        touched_in_blocks=_sum(item for item in touched_items if item.in_block and item.matrix),
        block_linears=_sum(item for item in matrices if item.linear),
        block_weights=_sum(matrices),
        total=_sum(items),
        skipped=tuple(
            Skipped(reason, tuple(dict.fromkeys(item.names[0] for item in group)), _sum(group))
            for reason, group in left.items()
        ),
    )


def _sum(items: Iterable[_Item]) -> int:
    return sum(item.weights for item in items)


def _is_chosen(item: _Item, chosen: set[str]) -> bool:
    """Whether one of the item's names was chosen, or, for a matrix, a module that it lies in."""
    prefixes = [name[:end] for name in item.names for end, letter in enumerate(name) if letter == "."]
    return not chosen.isdisjoint(item.names) or (item.matrix and not chosen.isdisjoint(prefixes))


def _items(model: nn.Module) -> list[_Item]:
    """Every weight of the model once; linear layers by their features, everything else by its parameters."""
    found = blocks(model)
    layers = linears(model) | {name: module for name, module in model.named_modules() if is_codebook_matrix(module)}
    names = parameter_names(model)
    items = []
    seen: set[int] = set()
    for name, layer in layers.items():
        # A weight that is no parameter (packed, parametrized) is made when it is read: it has no identity.
        weight = layer._parameters.get("weight")
        key = id(layer) if weight is None else id(weight)
        aliases = names.get(key, [f"{name}.weight"])
        if key not in seen:
            seen.add(key)
            inside = block_of(found, name) is not None
            reason = f"{type(layer).__name__} {'in' if inside else 'outside'} the blocks"
            first = dict.fromkeys([f"{name}.weight", *aliases])
            items.append(_Item(tuple(first), math.prod(features(layer)), True, True, inside, reason))
    for name, parameter, experts in _rest(model):
        if id(parameter) not in seen:
            owner = name.rpartition(".")[0]
            matrix = parameter.dim() >= 2 and owner not in layers
            kind = f"{parameter.dim()}-D parameter of {type(model.get_submodule(owner)).__name__}"
            items += [
                _Item(
                    names=(*names[id(parameter)], *own),
                    weights=parameter.numel() // len(experts),
                    matrix=matrix,
                    linear=False,
                    in_block=block_of(found, name) is not None,
                    reason=kind if matrix else "norms, biases and other vectors",
                )
                for own in experts
            ]
    return items


def _rest(model: nn.Module) -> Iterator[tuple[str, nn.Parameter, list[tuple[str, ...]]]]:
    """Every parameter by name; for what is counted in it piece by piece, the names of each (`ExpertLinear`)."""
    views: dict[str, list[tuple[str, ...]]] = defaultdict(list)
    for name, view in expert_linears(model).items():
        views[view.parameter_name].append((name,))
    for name, parameter in model.named_parameters():
        yield name, parameter, views.get(name, [()])
