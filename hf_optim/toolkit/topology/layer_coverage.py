"""Coverage: which part of a model's weights a technique modified, and what it left out."""

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

# Parameters that quantization puts beside the weights of a layer: they are not weights of the model.
QUANTIZATION = ("_scale", "_zero_point", "_g_idx")


@dataclass(frozen=True)
class Skipped:
    """Weights that were left out for the same reason.

    Attributes:
        reason: why.
        names: one name of each.
        weights: number of weights.
    """

    reason: str
    names: tuple[str, ...]
    weights: int


@dataclass(frozen=True)
class Coverage:
    """Numbers of weights; a tied weight counts once.

    Attributes:
        covered: weights in the covered modules.
        covered_in_blocks: those of them that are in matrices inside the blocks.
        block_linears: weights in the linear layers inside the blocks.
        block_weights: weights in all matrices inside the blocks, including experts and routers.
        total: weights of the whole model.
        skipped: the weights that are not covered, by reason.
    """

    covered: int
    covered_in_blocks: int
    block_linears: int
    block_weights: int
    total: int
    skipped: tuple[Skipped, ...]

    @property
    def fraction(self) -> float:
        """Covered fraction of the matrices inside the blocks, in [0, 1]."""
        return self.covered_in_blocks / self.block_weights if self.block_weights else 0.0

    @property
    def fraction_of_total(self) -> float:
        """Covered fraction of all weights, in [0, 1]."""
        return self.covered / self.total if self.total else 0.0

    def __str__(self) -> str:
        lines = [f"{self.fraction:.1%} of the weights in the blocks, {self.fraction_of_total:.1%} of all"]
        lines += [f"  not covered: {item.reason}, {item.weights:,} weights" for item in self.skipped]
        return "\n".join(lines)


@dataclass(frozen=True)
class Item:
    """A weight: every name under which it is registered, its size and kind, and the reason if it is left out."""

    names: tuple[str, ...]
    weights: int
    matrix: bool
    linear: bool
    in_block: bool
    reason: str
    is_vector: bool = False  # one row, or one column, whatever its number of dimensions


def coverage(model: nn.Module, covered: Iterable[str]) -> Coverage:
    """Count which part of a model's weights the modules or parameters named in ``covered`` are.

    For a module the matrices inside it count; a linear layer has ``out_features * in_features`` weights, regardless of
    how it stores them. Raises ``ValueError`` for an unknown name.
    """
    found = covered_items(model, covered)
    items = [item for item, _ in found]
    hit = [item for item, is_hit in found if is_hit]
    left: dict[str, list[Item]] = defaultdict(list)
    for item, is_hit in found:
        if not is_hit:
            left[item.reason].append(item)
    matrices = [item for item in items if item.in_block and item.matrix]
    return Coverage(
        covered=_sum(hit),
        covered_in_blocks=_sum(item for item in hit if item.in_block and item.matrix),
        block_linears=_sum(item for item in matrices if item.linear),
        block_weights=_sum(matrices),
        total=_sum(items),
        skipped=tuple(
            Skipped(reason, tuple(dict.fromkeys(item.names[0] for item in group)), _sum(group))
            for reason, group in left.items()
        ),
    )


def covered_items(model: nn.Module, covered: Iterable[str]) -> list[tuple[Item, bool]]:
    """Return every weight of a model, and whether it is in a module or parameter named in ``covered``."""
    items = _items(model)
    known = dict(model.named_modules(remove_duplicate=False))
    chosen = set(match([*known, *(name for item in items for name in item.names)], covered))
    return [(item, _is_chosen(item, chosen)) for item in items]


def _sum(items: Iterable[Item]) -> int:
    return sum(item.weights for item in items)


def _is_chosen(item: Item, chosen: set[str]) -> bool:
    """Return True if one of the item's names was chosen, or, for a matrix, a module that contains it."""
    prefixes = [name[:end] for name in item.names for end, letter in enumerate(name) if letter == "."]
    return not chosen.isdisjoint(item.names) or (item.matrix and not chosen.isdisjoint(prefixes))


def _items(model: nn.Module) -> list[Item]:
    """Return every weight of the model once: linear layers by their features, everything else by its parameters."""
    found = blocks(model)
    layers = linears(model) | {name: module for name, module in model.named_modules() if is_codebook_matrix(module)}
    names = parameter_names(model)
    items = []
    seen: set[int] = set()
    for name, layer in layers.items():
        # A weight that is not a parameter (packed, parametrized) is computed on access: it has no identity.
        weight = layer._parameters.get("weight")
        key = id(layer) if weight is None else id(weight)
        aliases = names.get(key, [f"{name}.weight"])
        if key not in seen:
            seen.add(key)
            inside = block_of(found, name) is not None
            reason = f"{type(layer).__name__} {'in' if inside else 'outside'} the blocks"
            first = dict.fromkeys([f"{name}.weight", *aliases])
            items.append(Item(tuple(first), math.prod(features(layer)), True, True, inside, reason))
    for name, parameter, parts in _parameters_in_parts(model):
        owner, _, own = name.rpartition(".")
        if id(parameter) not in seen and not (own.endswith(QUANTIZATION) and _is_quantized(model, owner)):
            matrix = parameter.dim() >= 2 and owner not in layers
            kind = f"{parameter.dim()}-D parameter of {type(model.get_submodule(owner)).__name__}"
            items += [
                Item(
                    names=(*names[id(parameter)], *own_names),
                    weights=parameter.numel() // len(parts),
                    matrix=matrix,
                    linear=False,
                    in_block=block_of(found, name) is not None,
                    reason=kind if matrix else "norms, biases and other vectors",
                    is_vector=parameter.numel() == max(parameter.shape, default=1),
                )
                for own_names in parts
            ]
    return items


def _is_quantized(model: nn.Module, name: str) -> bool:
    return getattr(model.get_submodule(name), "quantization_scheme", None) is not None


def _parameters_in_parts(model: nn.Module) -> Iterator[tuple[str, nn.Parameter, list[tuple[str, ...]]]]:
    """Yield every parameter with its name, and the names of each part that counts separately (``ExpertLinear``)."""
    views: dict[str, list[tuple[str, ...]]] = defaultdict(list)
    for name, view in expert_linears(model).items():
        views[view.parameter_name].append((name,))
    for name, parameter in model.named_parameters():
        yield name, parameter, views.get(name, [()])
