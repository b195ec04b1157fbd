"""Key/value heads made equal within each group: the weights and biases that compute them, and their masks."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hf_optim import Run
from hf_optim.toolkit.topology import KeyValueHeads

MEAN, FIRST, RANDOM = "mean", "first", "random"


def output_dim(layer: nn.Module) -> int:
    """Return the dimension of the outputs in the weight of a linear layer."""
    return 1 if isinstance(layer, Conv1D) else 0


def projections(heads: Iterable[KeyValueHeads]) -> dict[str, list[Tensor]]:
    """Return, for each layer that computes keys or values, the rows of its heads: int64 ``[heads, rows of each]``."""
    found: dict[str, list[Tensor]] = {}
    for one in heads:
        for part in (one.keys, one.values):
            found.setdefault(part.layer, []).append(part.index)
    return found


@torch.no_grad()
def make_equal_(
    model: nn.Module, heads: list[KeyValueHeads], kv_heads: int, pooling: str, std: float, seed: int
) -> None:
    """Make the heads of each group equal, in place: weights and biases of keys and of values.

    Args:
        heads: the attentions.
        kv_heads: groups of each.
        pooling: ``mean`` of the group, its ``first`` head, or a ``random`` one: normal with standard deviation ``std``,
            biases zero.
        seed: of the random heads.

    Means are computed in float64, so that heads that are equal already stay what they are.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parts in projections(heads).items():
        layer = model.get_submodule(name)
        for rows in parts:
            for parameter, dim in ((layer.weight, output_dim(layer)), (layer.bias, 0)):
                if parameter is None:
                    continue
                assert isinstance(parameter, nn.Parameter)
                by_row = parameter.data.transpose(0, dim)
                groups = by_row[rows.to(by_row.device)].unflatten(0, (kv_heads, -1))  # [kv_heads, in group, rows, ...]
                if pooling == MEAN:
                    one = groups.double().mean(1).to(groups.dtype)
                elif pooling == FIRST:
                    one = groups[:, 0]
                else:
                    drawn = torch.randn(groups[:, 0].shape, generator=generator) * (std if parameter.dim() > 1 else 0.0)
                    one = drawn.to(groups)
                by_row[rows.to(by_row.device)] = one.unsqueeze(1).expand_as(groups).flatten(0, 1)


def make_masks_equal(run: Run, heads: list[KeyValueHeads], kv_heads: int, pooling: str) -> None:
    """Give equal heads equal masks: what a mean keeps is what any of its heads keeps; else the mask of the first.

    A mean has zeros where all of its heads have one, so it keeps no N:M pattern.
    """
    for name, parts in projections(heads).items():
        weight = f"{name}.weight"
        if pooling == MEAN:
            run.nm_patterns.pop(weight, None)
        if (mask := run.masks.get(weight)) is None:
            continue
        by_row = mask.clone().transpose(0, output_dim(run.model.get_submodule(name)))
        for rows in parts:
            groups = by_row[rows].unflatten(0, (kv_heads, -1))
            one = groups.any(1) if pooling == MEAN else groups[:, 0]
            by_row[rows] = one.unsqueeze(1).expand_as(groups).flatten(0, 1)
        run.masks[weight] = by_row.transpose(0, output_dim(run.model.get_submodule(name))).contiguous()


@torch.no_grad()
def apply_masks_(run: Run, heads: Iterable[KeyValueHeads]) -> None:
    """Zero what the masks of the projections leave out: random heads are drawn without regard to them."""
    for name in projections(heads):
        weight = run.model.get_parameter(f"{name}.weight")
        if (mask := run.masks.get(f"{name}.weight")) is not None:
            weight.mul_(mask.to(weight.device))


def kept_rows(size: int, parts: list[Tensor], kv_heads: int) -> Tensor:
    """Return the rows of a projection without the second and later heads of each group; int64, ascending."""
    left = torch.ones(size, dtype=torch.bool)
    for rows in parts:
        groups = rows.unflatten(0, (kv_heads, -1))
        left[groups[:, 1:].flatten()] = False
    return left.nonzero().flatten()
