"""Masks over weights: unstructured by rank, and N:M along the input dimension.

A mask is a bool tensor, True = kept. Rankings are exact: the number of weights removed is the number asked for, and of
two equal scores the one with the lower index is kept (index in the flattened parameter, parameters in the
order given). A weight that an earlier mask removed stays removed, and counts.
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

Masks = dict[str, Tensor]

# A single tensor of up to this many weights is ranked by selection on a CPU: several times faster, with a copy.
KTHVALUE_LIMIT = 1 << 24


def removed_count(size: int, sparsity: float) -> int:
    """How many of ``size`` weights a sparsity in [0, 1] removes: the nearest whole number, halves up."""
    return min(size, math.floor(size * sparsity + 0.5))


def sparsity_of(mask: Tensor) -> float:
    """The share of a mask that is removed."""
    return 1.0 - int(mask.sum()) / mask.numel()


def layer_masks(scores: Mapping[str, Tensor], sparsity: float, kept: Mapping[str, Tensor] | None = None) -> Masks:
    """Keep the largest scores within each tensor.

    Args:
        scores: name -> scores, any shape. Compared by absolute value, so weights may be passed as they are.
        sparsity: share of each tensor to remove, in [0, 1].
        kept: name -> mask of what may still be kept; a name that is absent was never pruned.

    Returns:
        name -> mask, with ``removed_count`` weights removed, or more where ``kept`` had removed more.
    """
    kept = kept or {}
    masks: Masks = {}
    for name, score in scores.items():
        masks |= keep_largest({name: score}, removed_count(score.numel(), sparsity), kept)
    return masks


def global_masks(scores: Mapping[str, Tensor], sparsity: float, kept: Mapping[str, Tensor] | None = None) -> Masks:
    """Keep the largest scores of all tensors together; arguments and result as ``layer_masks``."""
    scores = dict(scores.items())  # shards are gathered once
    return keep_largest(scores, removed_count(sum(s.numel() for s in scores.values()), sparsity), kept)


def keep_largest(scores: Mapping[str, Tensor], remove: int, kept: Mapping[str, Tensor] | None = None) -> Masks:
    """Remove exactly ``remove`` weights (or all that ``kept`` removed, if more): those of the smallest scores.

    Finds the cut by counting and keeps no sorted copy, so the ranking may span all weights of a large model. Ties at
    the cut are kept from the lowest index on.
    """
    kept = kept or {}
    wide = any(score.dtype == torch.float64 for score in scores.values())
    if len(scores) == 1:
        (name, score), *_ = scores.items()
        if score.is_cuda:
            rank = _ranks(score, kept.get(name), wide)
            return {name: _largest(rank, score.numel() - remove).view(score.shape)}
    left = sum(int(kept[n].sum()) if n in kept else s.numel() for n, s in scores.items())
    keep = min(left, sum(s.numel() for s in scores.values()) - remove)
    ranks = {name: _ranks(score, kept.get(name), wide) for name, score in scores.items()}
    cut = _cut(list(ranks.values()), keep, 63 if wide else 31)
    spare = keep - sum(int((rank > cut).sum()) for rank in ranks.values())
    masks: Masks = {}
    for name, rank in ranks.items():
        tied = rank == cut
        first = tied & (tied.cumsum(0) <= spare)
        spare -= int(first.sum())
        masks[name] = ((rank > cut) | first).view(scores[name].shape)
    return masks


def _largest(rank: Tensor, keep: int) -> Tensor:
    """The ``keep`` largest of ranks [n], of equal ones the first; none that is -1. Never waits for the device."""
    place = torch.clamp((rank >= 0).sum(), max=keep)
    cut = rank.sort().values.index_select(0, (rank.numel() - place).clamp(max=rank.numel() - 1).view(1))
    tied = rank == cut
    return (rank > cut) | (tied & (tied.cumsum(0) <= place - (rank > cut).sum()))


def _ranks(score: Tensor, kept: Tensor | None, wide: bool) -> Tensor:
    """Integers [n] in the order of ``|score|``: the bit patterns of non-negative floats ascend. -1 = removed."""
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


def _cut(ranks: list[Tensor], keep: int, bits: int) -> int:
    """The largest rank of which at least ``keep`` entries are not smaller, by bisection on its bits."""
    if len(ranks) == 1 and keep > 0 and ranks[0].device.type == "cpu" and ranks[0].numel() <= KTHVALUE_LIMIT:
        return int(ranks[0].kthvalue(ranks[0].numel() - keep + 1).values)
    cut = 0
    for bit in reversed(range(bits)):
        higher = cut | (1 << bit)
        if sum(int((rank >= higher).sum()) for rank in ranks) >= keep:
            cut = higher
    return cut


def nm_mask(score: Tensor, keep: int, group: int, kept: Tensor | None = None) -> Tensor:
    """Keep the ``keep`` largest of every ``group`` consecutive scores along the last dimension.

    Of all patterns that keep ``keep`` of a group this one has the largest sum of absolute scores (2104.08378, section
    3).

    Args:
        score: ``[..., in]``, ``in`` a multiple of ``group``; compared by absolute value.
        keep, group: 2 and 4 for the pattern that sparse tensor cores run.
        kept: mask of what may still be kept, of the same shape.

    Returns:
        bool, the shape of ``score``; at most ``keep`` True in a group. Raises ``ValueError`` for an indivisible width.
    """
    _check_group(score.shape[-1], keep, group)
    _require_whole(score)
    size = score.detach().abs()
    if kept is not None:
        size = size.masked_fill(~kept.to(size.device), -1.0)
    # Every pair of a group meets once, and the weights that lose fewer than ``keep`` times stay.
    columns = size.unflatten(-1, (-1, group)).movedim(-1, 0).contiguous()
    lost = torch.zeros_like(columns, dtype=torch.int16)
    for i in range(group - 1):
        wins = columns[i] >= columns[i + 1 :]
        lost[i + 1 :] += wins
        lost[i] += (group - 1 - i) - wins.sum(0, dtype=torch.int16)
    mask = (lost < keep).movedim(0, -1).flatten(-2)
    return mask if kept is None else mask & kept.to(mask.device)


def has_nm_pattern(weight: Tensor, keep: int, group: int) -> bool:
    """Whether every ``group`` consecutive weights along the last dimension (the input) hold at most ``keep`` non-zeros.

    Args:
        weight: ``[out, in]``. The parameter of a ``Conv1D`` is ``[in, out]``: pass it transposed, or use
        ``parameter_has_nm_pattern``.
    """
    if weight.shape[-1] % group:
        return False
    return bool(((weight != 0).unflatten(-1, (-1, group)).sum(-1) <= keep).all())


def parameter_has_nm_pattern(model: nn.Module, parameter: str, keep: int, group: int) -> bool:
    """``has_nm_pattern`` for a weight by its parameter name, whichever way round the linear layer or the experts store it."""
    module = model.get_submodule(parameter.rpartition(".")[0])
    if is_linear(module):
        return has_nm_pattern(fsdp.full_tensor(weight_out_in(module).detach()), keep, group)
    stacked = fsdp.full_tensor(model.get_parameter(parameter).detach())
    return has_nm_pattern(stacked.mT if getattr(module, "is_transposed", False) else stacked, keep, group)


def _check_group(width: int, keep: int, group: int) -> None:
    if not 0 < keep <= group:
        raise ValueError(f"{keep}:{group} is no pattern: 1 <= keep <= group")
    if width % group:
        raise ValueError(f"an input width of {width} does not divide into groups of {group}")


def weight_names(layers: Mapping[str, nn.Module]) -> dict[str, str]:
    """Layer name -> name of its weight parameter; layers that share one parameter appear once, the first."""
    seen: set[int] = set()
    names: dict[str, str] = {}
    for name, layer in layers.items():
        if (key := id(layer.weight)) not in seen:
            seen.add(key)
            names[name] = f"{name}.weight"
    return names


def mask_out_in(layer: nn.Module, masks: Mapping[str, Tensor], parameter: str) -> Tensor | None:
    """The mask of a linear layer's weight as ``[out, in]``, or None where there is none."""
    mask = masks.get(parameter)
    return mask.T if mask is not None and isinstance(layer, Conv1D) else mask


def as_stored(layer: nn.Module, mask: Tensor) -> Tensor:
    """A mask ``[out, in]`` the way round the layer stores its weight: ``[in, out]`` for a ``Conv1D``."""
    return mask.T.contiguous() if isinstance(layer, Conv1D) else mask


def require_finite(weights: Mapping[str, Tensor], label: str) -> None:
    """Raise ``NumericalError`` naming the first parameter that holds infinite or NaN values."""
    for name, weight in weights.items():
        if not bool(torch.isfinite(weight).all()):
            raise NumericalError(
                f"{label}: {name} holds infinite or NaN values and cannot be ranked; check the checkpoint"
            )


def prune_(model: nn.Module, masks: Masks, new: Mapping[str, Tensor]) -> None:
    """Narrow ``masks`` (parameter name -> mask, in place) to ``new`` and zero the weights that are removed."""
    fsdp.reshard(model)
    for name, mask in new.items():
        home = fsdp.mask_device(model.get_parameter(name))
        old = masks.get(name)
        masks[name] = mask.to(home) if old is None else (mask.to(old.device) & old).to(home)
    zero_masked_(model, masks, new)


def zero_masked_(model: nn.Module, masks: Mapping[str, Tensor], names: Iterable[str]) -> None:
    """Set the removed weights of the parameters ``names`` to exactly zero, in place; of shards, each rank its own."""
    fsdp.reshard(model)
    with torch.no_grad():
        for name in names:
            parameter = model.get_parameter(name)
            fsdp.local_shard(parameter).masked_fill_(~fsdp.shard_like(masks[name], parameter), 0.0)
