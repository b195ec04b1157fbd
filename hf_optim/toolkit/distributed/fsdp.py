"""Weights that are sharded over ranks by FSDP2 (``torch.distributed.tensor``): full tensors and local shards.

Masks are kept as full tensors, since a ranking compares all weights; they are applied to the local shard of each rank.
For tensors that are not sharded, every function here returns its argument. ``full_tensor`` is collective: all ranks
must call it for the same tensors in the same order.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from ...errors import ModelError


def is_sharded(tensor: Tensor) -> bool:
    """Return True if the tensor is distributed over ranks."""
    return isinstance(tensor, DTensor)


def has_sharded_parameters(model: nn.Module) -> bool:
    """Return True if a parameter of the model is sharded, or is currently gathered in a module of FSDP2."""
    return any(map(is_sharded, model.parameters())) or any(True for _ in _fsdp_modules(model))


def full_tensor(tensor: Tensor) -> Tensor:
    """Return the full tensor: a copy gathered from the ranks if it is sharded, else the tensor itself."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local_shard(tensor: Tensor) -> Tensor:
    """Return this rank's shard of a tensor: a view, so that writing to it writes to the tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def shard_like(full: Tensor, like: Tensor) -> Tensor:
    """Return the part of ``full`` that corresponds to this rank's shard of ``like``, on its device.

    There is no communication.

    Args:
        full: the same on all ranks, of the shape of ``like``.
        like: a tensor, sharded or not.

    Raises ``ModelError`` for placements other than ``Shard`` and ``Replicate``.
    """
    if not isinstance(like, DTensor):
        return full.to(like.device)
    if not all(isinstance(place, (Shard, Replicate)) for place in like.placements):
        raise ModelError(f"a weight with placements {like.placements} cannot be masked; shard it with FSDP2")
    device = like.to_local().device
    mesh_device = like.device_mesh.device_type
    part = distribute_tensor(full.to(mesh_device), like.device_mesh, like.placements, src_data_rank=None).to_local()
    return part.to(device).contiguous()


def mask_device(parameter: Tensor) -> torch.device:
    """Return the device of a parameter's full mask: that of the parameter, or the CPU if the parameter is sharded."""
    return torch.device("cpu") if is_sharded(parameter) else parameter.device


def reshard(model: nn.Module) -> None:
    """Shard the parameters again that FSDP2 left gathered after a forward pass; others are not changed."""
    for module in _fsdp_modules(model):
        module.reshard()


class FullWeights(Mapping[str, Tensor]):
    """Parameter name -> full weight, detached. Weights are gathered on access, so only those in use are in memory.

    If nothing is sharded, the values are the model's parameters. Access is collective, in the order of access.
    """

    def __init__(self, model: nn.Module, names: Iterable[str]) -> None:
        self._model, self._names = model, list(names)
        reshard(model)

    def __getitem__(self, name: str) -> Tensor:
        return full_tensor(self._model.get_parameter(name).detach())

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _fsdp_modules(model: nn.Module) -> Iterator[Any]:
    return (module for module in model.modules() if hasattr(module, "reshard") and hasattr(module, "unshard"))
