"""Weights that are sharded over ranks (FSDP2, ``torch.distributed.tensor``): the whole of them, and this rank's part.

Masks are kept whole, since a ranking compares all weights; what is written goes to the part that a rank has. For
tensors that are not sharded, everything here gives back what it was given. ``full_tensor`` is collective: all ranks must call
it for the same tensors in the same order.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from ...errors import ModelError


def is_sharded(tensor: Tensor) -> bool:
    """Whether ranks hold parts of it."""
    return isinstance(tensor, DTensor)


def has_sharded_parameters(model: nn.Module) -> bool:
    """Whether any parameter of the model is sharded, or lies gathered in a module that shards it (FSDP2)."""
    return any(map(is_sharded, model.parameters())) or any(True for _ in _fsdp_modules(model))


def full_tensor(tensor: Tensor) -> Tensor:
    """All of a tensor: a copy gathered from the ranks if it is sharded, else itself."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local_shard(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor: a view, so that writing to it writes to the tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def shard_like(full: Tensor, like: Tensor) -> Tensor:
    """The part of ``full`` that belongs to this rank's part of ``like``, on its device; no rank is asked.

    Args:
        full: the same on all ranks, of the shape of ``like``.
        like: a tensor, sharded or not.
    """
    if not isinstance(like, DTensor):
        return full.to(like.device)
    if not all(isinstance(place, (Shard, Replicate)) for place in like.placements):
        raise ModelError(f"a weight with placements {like.placements} has no mask of its own; shard it with FSDP2")
    device = like.to_local().device
    mesh_device = like.device_mesh.device_type
    part = distribute_tensor(full.to(mesh_device), like.device_mesh, like.placements, src_data_rank=None).to_local()
    return part.to(device).contiguous()


def mask_device(parameter: Tensor) -> torch.device:
    """Where the whole mask of a parameter is kept: beside the parameter; on the CPU if that is sharded."""
    return torch.device("cpu") if is_sharded(parameter) else parameter.device


def reshard(model: nn.Module) -> None:
    """Put parameters that FSDP2 left gathered after a forward pass back into shards; others stay as they are."""
    for module in _fsdp_modules(model):
        module.reshard()


class FullWeights(Mapping[str, Tensor]):
    """Parameter name -> whole weight, detached, gathered when it is asked for: one at a time if taken one at a time.

    A mapping of the model's own parameters where nothing is sharded. Reading is collective, in the order of reading.
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
