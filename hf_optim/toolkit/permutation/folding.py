"""Folding: scale or permute inner channels in the weights, without changing what the model computes.

A scale of the channels between two layers can move from the first to the second. ``topology`` finds the layers that
allow it and the channels that belong together; this module changes the weights, in place. Scales are positive, one per
channel. Products are computed in float32 or wider and rounded once to the dtype of the weights; ``scale_bounds`` clamps
a scale to what that dtype can hold.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..topology.layer_pairs import LinearPair
from ..topology.linear_layers import weight_out_in
from ..topology.norm_groups import NormGroup

# Rows that are scaled at a time, since they are copied into a wider dtype.
STRIP = 4096


@torch.no_grad()
def scale_columns_(module: nn.Module, factor: Tensor) -> None:
    """Multiply column j of the weight ``[out, in]`` of a linear layer by ``factor[j]``, in place."""
    weight = weight_out_in(module)
    factor = factor.to(weight.device, _wide(weight))
    for rows in weight.split(STRIP):
        rows.copy_(rows.to(factor.dtype) * factor)


@torch.no_grad()
def scale_rows_(module: Any, rows: Tensor, factor: Tensor) -> None:
    """Multiply row ``rows[k]`` of the weight ``[out, in]`` and bias of a linear layer by ``factor[k]``, in place."""
    weight = weight_out_in(module)
    rows, factor = rows.to(weight.device), factor.to(weight.device, _wide(weight))
    weight[rows] = (weight[rows].to(factor.dtype) * factor[:, None]).to(weight.dtype)
    if module.bias is not None:
        module.bias[rows] = (module.bias[rows].to(factor.dtype) * factor).to(module.bias.dtype)


@torch.no_grad()
def scale_norm_(module: Any, factor: Tensor, offset: float = 0.0) -> None:
    """Multiply the output of a norm, ``(weight + offset) * n(x) + bias``, by ``factor`` ``[channels]``, in place."""
    weight = module.weight
    factor = factor.to(weight.device, _wide(weight))
    weight.copy_((weight.to(factor.dtype) + offset) * factor - offset)
    if getattr(module, "bias", None) is not None:
        module.bias.copy_(module.bias.to(factor.dtype) * factor)


def move_norm_scale_(group: NormGroup, scale: Tensor) -> None:
    """Divide the output of a norm by ``scale`` ``[d]``, and multiply the columns of its linear layers by it, in place.

    Raises ``ValueError`` for a scale that is not positive or not ``[d]``, and for a group that is not exclusive:
    other readers of the norm would see the change.
    """
    if not group.exclusive:
        raise ValueError(f"{group.name} is also read by {', '.join(group.others)}")
    _check(scale, group.module.get_parameter("weight").numel(), group.name)
    scale_norm_(group.module, 1.0 / scale, group.offset)
    for module in group.linears.values():
        scale_columns_(module, scale)


def move_pair_scale_(pair: LinearPair, scale: Tensor) -> None:
    """Divide the rows of a pair's producer by ``scale`` ``[K]``, and multiply the columns that read them, in place.

    Raises ``ValueError`` for a scale that is not positive or not ``[K]``, and for a pair that is not scalable.
    """
    if not pair.scalable:
        raise ValueError(f"{pair.producer} and {pair.consumer}: the operations between them are not homogeneous")
    _check(scale, pair.groups.numel(), pair.producer)
    scale_rows_(pair.producer_module, pair.rows, 1.0 / scale)
    scale_columns_(pair.consumer_module, expand_to_columns(pair, scale))


def expand_to_columns(pair: LinearPair, values: Tensor) -> Tensor:
    """Expand ``values`` ``[K]``, one per row that is read, to one per column ``[in_features]`` of the consumer."""
    result = values.new_empty(pair.index.numel())
    columns = pair.columns.to(values.device)
    result[columns] = values[:, None].expand(columns.shape)
    return result


def max_over_columns(pair: LinearPair, values: Tensor) -> Tensor:
    """Return the largest of ``values`` ``[in_features]`` over the columns that read a row, for each row ``[K]``."""
    return values[pair.columns.to(values.device)].amax(1)


@torch.no_grad()
def permute_pair_(pair: LinearPair, order: Tensor) -> None:
    """Move row ``rows[order[k]]`` of the producer to ``rows[k]``, in place; columns and partners follow.

    Raises ``ValueError`` if ``order`` ``[K]`` is not a permutation, or moves a row out of its group.
    """
    columns = pair.column_order(order)  # validates the order before anything changes
    for module, rows in _producers(pair):
        weight = weight_out_in(module)
        target = rows.to(weight.device)
        source = target[order.to(weight.device)]
        weight[target] = weight[source]
        if module.bias is not None:
            module.bias[target] = module.bias[source]
    weight = weight_out_in(pair.consumer_module)
    weight.copy_(weight[:, columns.to(weight.device)])


def _wide(weight: Tensor) -> torch.dtype:
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


def _producers(pair: LinearPair) -> list[tuple[Any, Tensor]]:
    return [(pair.producer_module, pair.rows), *((partner.module, partner.rows) for partner in pair.permutable_with)]


def _check(scale: Tensor, channels: int, name: str) -> None:
    if scale.shape != (channels,):
        raise ValueError(f"{name} has {channels} channels, but the scale has shape {tuple(scale.shape)}")
    if not bool((torch.isfinite(scale) & (scale > 0)).all()):
        raise ValueError(f"a scale of {name} must be positive and finite in every channel")
