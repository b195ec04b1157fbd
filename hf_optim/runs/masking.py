"""Apply the masks of a run, and check that they hold."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from ..errors import ModelError, NumericalError
from ..toolkit.distributed import collectives, fsdp
from .run import Run


@torch.no_grad()
def apply_masks(run: Run, names: Iterable[str] | None = None) -> None:
    """Zero the masked weights of ``run.model``: all, or those of the parameters ``names``."""
    fsdp.reshard(run.model)
    for name in run.masks if names is None else names:
        parameter = masked_parameter(run, name)
        fsdp.local_shard(parameter).masked_fill_(~fsdp.shard_like(run.masks[name], parameter), 0.0)


def masked_parameter(run: Run, name: str) -> nn.Parameter:
    """The parameter that a mask belongs to; inside a peft layer, that of the layer it wraps. May be sharded (FSDP2).

    Raises ``ModelError`` when it is gone, has another shape (as under FSDP1, ZeRO-3), or is a part of an adapter layer:
    those parts have other names after a merge, or none.
    """
    try:
        parameter = run.model.get_parameter(name)
    except AttributeError as error:
        raise ModelError(f"{name} has a mask, but {type(run.model).__name__} has no such parameter: {error}") from error
    if _inside_adapter(run.model, name):
        raise ModelError(
            f"{name} has a mask and lies inside an adapter layer: a step that chooses masks during training needs a "
            "model without adapters; train it first and add adapters for recovery, or merge them before"
        )
    if parameter.shape != run.masks[name].shape:
        flat = hasattr(parameter, "ds_id") or parameter.dim() == 1
        why = ": masks follow the shards of FSDP2, not those of FSDP1 or ZeRO-3; train with FSDP2, DDP or on one device"
        raise ModelError(
            f"the mask of {name} is {tuple(run.masks[name].shape)} and the parameter {tuple(parameter.shape)}"
            + why * flat
        )
    return parameter


def _inside_adapter(model: nn.Module, name: str) -> bool:
    parts = name.split(".")
    return any(hasattr(model.get_submodule(".".join(parts[:i])), "base_layer") for i in range(1, len(parts) - 1))


def stray_weights(run: Run) -> list[str]:
    """The parameters that have non-zero weights where their mask says there are none; of shards, in this rank's."""
    fsdp.reshard(run.model)
    found = []
    for name in run.masks:
        parameter = masked_parameter(run, name)
        weight = fsdp.local_shard(parameter.detach())
        if bool((weight != 0).logical_and_(~fsdp.shard_like(run.masks[name], parameter)).any()):
            found.append(name)
    return found


def require_equal_masks(run: Run) -> None:
    """Raise ``NumericalError`` naming the first parameter of which two ranks have different masks.

    A step that draws random numbers without a generator of its own, seeded alike on all ranks, would let each train
    another model.
    """
    if collectives.world_size() == 1:
        return
    names = sorted(run.masks)
    mine = torch.tensor([len(names), *(number for name in names for number in _digest(run.masks[name]))])
    device = next(run.model.parameters()).device
    apart = _apart(mine[:1].to(device)) or _apart(mine.to(device))
    if apart:
        where = names[(apart[0] - 1) // 2] if apart[0] else "their number"
        raise NumericalError(
            f"the ranks have different masks ({where} is the first): a step chooses them by random numbers that are "
            "not seeded alike, or by what only one rank has seen"
        )


def _apart(numbers: torch.Tensor) -> list[int]:
    """The places at which ranks have different numbers."""
    low, high = collectives.all_reduce_(numbers.clone(), "min"), collectives.all_reduce_(numbers.clone(), "max")
    return (low != high).nonzero().flatten().tolist()


def _digest(mask: torch.Tensor) -> tuple[int, int]:
    """Two numbers that tell masks apart: weighted sums over rows and over columns of how many weights are kept."""
    matrix = mask.reshape(mask.shape[0] if mask.dim() else 1, -1)
    rows, columns = matrix.sum(1), matrix.sum(0)
    weights = [torch.arange(1, len(counts) + 1, device=mask.device) for counts in (rows, columns)]
    return int((rows * weights[0]).sum()), int((columns * weights[1]).sum())
