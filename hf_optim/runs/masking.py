"""Apply the masks of a run, and check that they hold."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

import torch
from torch import nn

from ..errors import ModelError, NumericalError
from ..toolkit.distributed import collectives, fsdp
from .run import Run


class Masked(Protocol):
    """A model and its masks by the names of parameters: those of a ``Run``, or those that its checkpoint tells of."""

    @property
    def model(self) -> Any: ...

    @property
    def masks(self) -> dict[str, torch.Tensor]: ...


@torch.no_grad()
def apply_masks(run: Masked, names: Iterable[str] | None = None) -> None:
    """Zero the masked weights of ``run.model``: all of them, or those of the parameters ``names``."""
    fsdp.reshard(run.model)
    for name in run.masks if names is None else names:
        parameter = masked_parameter(run, name)
        fsdp.local_shard(parameter).masked_fill_(~fsdp.shard_like(run.masks[name], parameter), 0.0)


def masked_parameter(run: Masked, name: str) -> nn.Parameter:
    """Return the parameter that a mask belongs to; for a peft layer, that of the wrapped layer. May be an FSDP2 shard.

    Raises ``ModelError`` if the parameter does not exist, has another shape (FSDP1, ZeRO-3), or is part of an adapter
    layer, whose names do not survive a merge.
    """
    try:
        parameter = wrapped_parameter(run.model, name)
    except AttributeError as error:
        raise ModelError(f"{name} has a mask, but {type(run.model).__name__} has no such parameter: {error}") from error
    if _inside_adapter(run.model, name):
        raise ModelError(
            f"{name} has a mask and is inside an adapter layer: a step that chooses masks during training needs a "
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


def wrapped_parameter(model: nn.Module, name: str) -> nn.Parameter:
    """Return a parameter by the name that it has without adapters. Raises ``AttributeError`` if there is none.

    peft wraps a module once for each parameter of it that has an adapter (``target_parameters``).
    """
    owner, _, own = name.rpartition(".")
    module: Any = model.get_submodule(owner)
    while own not in module._parameters and hasattr(module, "base_layer"):
        module = module.base_layer
    return module.get_parameter(own)


def _inside_adapter(model: nn.Module, name: str) -> bool:
    parts = name.split(".")
    return any(hasattr(model.get_submodule(".".join(parts[:i])), "base_layer") for i in range(1, len(parts) - 1))


def stray_weights(run: Run) -> list[str]:
    """Return the parameters with nonzero weights where their mask is False; of sharded ones, in this rank's part."""
    fsdp.reshard(run.model)
    found = []
    for name, mask in run.masks.items():
        packed = _packed_layer(run.model, name)
        if packed is not None:
            weight = packed.decoded()
            kept = mask.to(weight.device)
        else:
            parameter = masked_parameter(run, name)
            weight, kept = fsdp.local_shard(parameter.detach()), fsdp.shard_like(mask, parameter)
        if bool((weight != 0).logical_and_(~kept).any()):
            found.append(name)
    return found


def _packed_layer(model: nn.Module, name: str) -> Any:
    """Return the layer that has a weight if it runs on a kernel: it holds codes instead, and decodes them."""
    owner, _, own = name.rpartition(".")
    try:
        module: Any = model.get_submodule(owner)
    except AttributeError:
        return None
    return module if own == "weight" and own not in module._parameters and hasattr(module, "decoded") else None


def require_equal_masks(run: Run) -> None:
    """Raise ``NumericalError`` naming the first parameter whose mask differs between two ranks.

    Masks differ if a step draws random numbers without a generator that is seeded alike on all ranks; each rank would
    then train another model.
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
            "not seeded alike, or by data that only one rank has seen"
        )


def _apart(numbers: torch.Tensor) -> list[int]:
    """Return the positions at which ranks have different numbers."""
    low, high = collectives.all_reduce_(numbers.clone(), "min"), collectives.all_reduce_(numbers.clone(), "max")
    return (low != high).nonzero().flatten().tolist()


def _digest(mask: torch.Tensor) -> tuple[int, int]:
    """Return two numbers that tell masks apart: weighted sums of the kept weights per row and per column."""
    matrix = mask.reshape(mask.shape[0] if mask.dim() else 1, -1)
    rows, columns = matrix.sum(1), matrix.sum(0)
    weights = [torch.arange(1, len(counts) + 1, device=mask.device) for counts in (rows, columns)]
    return int((rows * weights[0]).sum()), int((columns * weights[1]).sum())
