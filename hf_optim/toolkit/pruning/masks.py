"""Masks over weights: unstructured by rank, and N:M along the input dimension.

A mask is a bool tensor, True = kept. Rankings are exact: exactly the requested number of weights is removed, and of two
equal scores the one with the lower index is kept (index in the flattened parameter, parameters in the given order). A
weight that an earlier mask removed stays removed, and counts. A weight is that of a linear layer or one matrix of one
expert; ``matrices`` says under which names.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ...errors import ModelError, NumericalError
from ..distributed import fsdp
from ..topology.linear_layers import is_linear, weight_out_in
from .matrices import (
    MaskParts,
    MatrixWeights,
    as_stored,
    locate,
    mask_out_in,
    parameters_of,
    weight_name,
    weight_names,
    whole_masks,
)

__all__ = [
    "Masks",
    "MatrixWeights",
    "as_stored",
    "global_masks",
    "has_nm_pattern",
    "keep_largest",
    "layer_masks",
    "mask_has_nm_pattern",
    "mask_out_in",
    "nm_mask",
    "parameter_has_nm_pattern",
    "parameters_of",
    "prune_",
    "removed_count",
    "require_finite",
    "row_masks",
    "weight_name",
    "weight_names",
    "zero_masked_",
]

Masks = dict[str, Tensor]

# On a CPU, a single tensor of up to this many weights is ranked with ``kthvalue``: several times faster, with a copy.
KTHVALUE_LIMIT = 1 << 24
# Rows that are sorted at a time.
STRIP = 2048


def removed_count(size: int, sparsity: float) -> int:
    """Return how many of ``size`` weights a sparsity in [0, 1] removes: the nearest whole number, halves up."""
    return min(size, math.floor(size * sparsity + 0.5))


def layer_masks(scores: Mapping[str, Tensor], sparsity: float, kept: Mapping[str, Tensor] | None = None) -> Masks:
    """Keep the largest scores within each tensor.

    Args:
        scores: name -> scores, any shape. Compared by absolute value, so that the weights may be passed directly.
        sparsity: share of each tensor to remove, in [0, 1].
        kept: parameter name -> earlier mask; a weight without one was never pruned.

    Returns:
        name -> mask, with ``removed_count`` weights removed, or more where ``kept`` had removed more.
    """
    kept = MaskParts(kept or {})
    masks: Masks = {}
    for name, score in scores.items():
        masks |= keep_largest({name: score}, removed_count(score.numel(), sparsity), kept)
    return masks


def row_masks(scores: Mapping[str, Tensor], sparsity: float, kept: Mapping[str, Tensor] | None = None) -> Masks:
    """Keep the largest scores within each row ``[in]`` of each tensor ``[out, in]``.

    Arguments and result as ``layer_masks``, with ``removed_count`` weights removed from every row.
    """
    kept = MaskParts(kept or {})
    masks: Masks = {}
    for name, score in scores.items():
        _require_whole(score)
        size = score.detach().abs()
        if name in kept:
            size = size.masked_fill(~kept[name].to(size.device), -1.0)
        count = size.shape[1] - removed_count(size.shape[1], sparsity)
        mask = torch.zeros_like(size, dtype=torch.bool)
        for begin in range(0, len(size), STRIP):
            rows = slice(begin, begin + STRIP)
            first = size[rows].sort(dim=1, descending=True, stable=True).indices[:, :count]
            mask[rows] = mask[rows].scatter(1, first, True)
        masks[name] = mask & (size >= 0)
    return masks


def global_masks(scores: Mapping[str, Tensor], sparsity: float, kept: Mapping[str, Tensor] | None = None) -> Masks:
    """Keep the largest scores of all tensors together; arguments and result as ``layer_masks``."""
    scores = dict(scores.items())  # shards are gathered once
    return keep_largest(scores, removed_count(sum(s.numel() for s in scores.values()), sparsity), kept)


def keep_largest(scores: Mapping[str, Tensor], remove: int, kept: Mapping[str, Tensor] | None = None) -> Masks:
    """Remove exactly ``remove`` weights (or all that ``kept`` removed, if more): those of the smallest scores.

    The threshold is found by counting, without a sorted copy, so that the ranking may span all weights of a large
    model. Ties at the threshold are kept in order of their index.
    """
    kept = MaskParts(kept or {})
    wide = any(score.dtype == torch.float64 for score in scores.values())
    if len(scores) == 1:
        (name, score), *_ = scores.items()
        if score.is_cuda:
            rank = _ranks(score, kept.get(name), wide)
            return {name: _largest(rank, score.numel() - remove).view(score.shape)}
    left = sum(int(kept[n].sum()) if n in kept else s.numel() for n, s in scores.items())
    keep = min(left, sum(s.numel() for s in scores.values()) - remove)
    ranks = {name: _ranks(score, kept.get(name), wide) for name, score in scores.items()}
    threshold = _threshold(list(ranks.values()), keep, 63 if wide else 31)
    ties = keep - sum(int((rank > threshold).sum()) for rank in ranks.values())
    masks: Masks = {}
    for name, rank in ranks.items():
        tied = rank == threshold
        first = tied & (tied.cumsum(0) <= ties)
        ties -= int(first.sum())
        masks[name] = ((rank > threshold) | first).view(scores[name].shape)
    return masks


def _largest(rank: Tensor, keep: int) -> Tensor:
    """Return where the ``keep`` largest of ranks [n] are, of equal ones the first, and none that is -1.

    There is no synchronization between host and device.
    """
    count = torch.clamp((rank >= 0).sum(), max=keep)
    threshold = rank.sort().values.index_select(0, (rank.numel() - count).clamp(max=rank.numel() - 1).view(1))
    tied = rank == threshold
    return (rank > threshold) | (tied & (tied.cumsum(0) <= count - (rank > threshold).sum()))


def _ranks(score: Tensor, kept: Tensor | None, wide: bool) -> Tensor:
    """Return integers [n] in the order of ``|score|``, the bit patterns of non-negative floats; -1 = removed."""
    _require_whole(score)
    size = score.detach().abs().reshape(-1).to(torch.float64 if wide else torch.float32)
    ranks = size.view(torch.int64 if wide else torch.int32)
    return ranks if kept is None else ranks.masked_fill(~kept.to(ranks.device).reshape(-1), -1)


def _require_whole(score: Tensor) -> None:
    if fsdp.is_sharded(score):
        raise ModelError(
            "weights that are sharded over ranks (FSDP2) cannot be ranked part by part, and this step does not gather "
            "them: train it with DDP or on one device (a step that gathers reads toolkit.distributed.FullWeights)"
        )


def _threshold(ranks: list[Tensor], keep: int, bits: int) -> int:
    """Return the largest rank that at least ``keep`` entries reach, by bisection on its bits."""
    if len(ranks) == 1 and keep > 0 and ranks[0].device.type == "cpu" and ranks[0].numel() <= KTHVALUE_LIMIT:
        return int(ranks[0].kthvalue(ranks[0].numel() - keep + 1).values)
    threshold = 0
    for bit in reversed(range(bits)):
        higher = threshold | (1 << bit)
        if sum(int((rank >= higher).sum()) for rank in ranks) >= keep:
            threshold = higher
    return threshold


def nm_mask(score: Tensor, keep: int, group: int, kept: Tensor | None = None) -> Tensor:
    """Keep the ``keep`` largest of every ``group`` consecutive scores along the last dimension.

    Of all masks that keep ``keep`` of a group this one has the largest sum of absolute scores (2104.08378, section 3).

    Args:
        score: ``[..., in]``, ``in`` a multiple of ``group``; compared by absolute value.
        keep, group: 2 and 4 for the pattern of sparse tensor cores.
        kept: an earlier mask of the same shape, or None.

    Returns:
        bool, the shape of ``score``; at most ``keep`` True in a group. Raises ``ValueError`` if the width is
        not a multiple of ``group``.
    """
    _check_group(score.shape[-1], keep, group)
    _require_whole(score)
    size = score.detach().abs()
    if kept is not None:
        size = size.masked_fill(~kept.to(size.device), -1.0)
    # Compare every pair of a group, and keep the weights that lose fewer than ``keep`` times.
    columns = size.unflatten(-1, (-1, group)).movedim(-1, 0).contiguous()
    lost = torch.zeros_like(columns, dtype=torch.int16)
    for i in range(group - 1):
        wins = columns[i] >= columns[i + 1 :]
        lost[i + 1 :] += wins
        lost[i] += (group - 1 - i) - wins.sum(0, dtype=torch.int16)
    mask = (lost < keep).movedim(0, -1).flatten(-2)
    return mask if kept is None else mask & kept.to(mask.device)


def has_nm_pattern(weight: Tensor, keep: int, group: int) -> bool:
    """Return True if every ``group`` consecutive weights along the last dimension have at most ``keep`` non-zeros.

    Args:
        weight: ``[out, in]``. The parameter of a ``Conv1D`` is ``[in, out]``: pass it transposed, or use
            ``parameter_has_nm_pattern``.
        keep, group: the pattern.
    """
    if weight.shape[-1] % group:
        return False
    return bool(((weight != 0).unflatten(-1, (-1, group)).sum(-1) <= keep).all())


def parameter_has_nm_pattern(model: nn.Module, parameter: str, keep: int, group: int) -> bool:
    """Return ``has_nm_pattern`` of a parameter by name, however the linear layer or the experts store it."""
    module = model.get_submodule(parameter.rpartition(".")[0])
    if is_linear(module):
        return has_nm_pattern(fsdp.full_tensor(weight_out_in(module).detach()), keep, group)
    return mask_has_nm_pattern(model, parameter, fsdp.full_tensor(model.get_parameter(parameter).detach()), keep, group)


def mask_has_nm_pattern(model: nn.Module, parameter: str, mask: Tensor, keep: int, group: int) -> bool:
    """Return ``has_nm_pattern`` of a mask (or of values) that is stored as the parameter of that name."""
    module = model.get_submodule(parameter.rpartition(".")[0])
    is_turned = isinstance(module, Conv1D) or getattr(module, "is_transposed", False)
    return has_nm_pattern(mask.mT if is_turned else mask, keep, group)


def _check_group(width: int, keep: int, group: int) -> None:
    if not 0 < keep <= group:
        raise ValueError(f"{keep}:{group} is not a pattern: 1 <= keep <= group")
    if width % group:
        raise ValueError(f"input width {width} is not a multiple of the group size {group}")


def require_finite(weights: Mapping[str, Tensor], label: str) -> None:
    """Raise ``NumericalError`` naming the first parameter with infinite or NaN values."""
    for name, weight in weights.items():
        if not bool(torch.isfinite(weight).all()):
            raise NumericalError(
                f"{label}: {name} holds infinite or NaN values and cannot be ranked; check the checkpoint"
            )


def prune_(model: nn.Module, masks: Masks, new: Mapping[str, Tensor]) -> None:
    """Intersect ``masks`` (parameter name -> mask, in place) with ``new``, and zero the removed weights.

    ``new`` maps weights to masks: parameters, or matrices of experts, which become part of the mask of their stack. A
    changed mask is a new tensor.
    """
    fsdp.reshard(model)
    whole = whole_masks(model, masks, new)
    for name, mask in whole.items():
        home = fsdp.mask_device(model.get_parameter(name))
        old = masks.get(name)
        masks[name] = mask.to(home) if old is None else (mask.to(old.device) & old).to(home)
    zero_masked_(model, masks, whole)


def zero_masked_(model: nn.Module, masks: Mapping[str, Tensor], names: Iterable[str]) -> None:
    """Set the removed weights of the parameters ``names`` to exactly zero, in place; each rank zeroes its shards.

    The name of a matrix of an expert stands for its stack.
    """
    fsdp.reshard(model)
    with torch.no_grad():
        for name in dict.fromkeys(name if name in masks else locate(model, name)[0] for name in names):
            parameter = model.get_parameter(name)
            fsdp.local_shard(parameter).masked_fill_(~fsdp.shard_like(masks[name], parameter), 0.0)
