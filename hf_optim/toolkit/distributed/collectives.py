"""Collectives for statistics over several ranks, each of which processes a part of the data (``torch.distributed``).

Without a process group there is one rank, and all functions are local. All ranks must call the same functions in the
same order.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

Reduction = Literal["sum", "min", "max"]
_NEUTRAL = {"sum": 0.0, "min": float("inf"), "max": float("-inf")}
_DTYPES = (torch.float32, torch.float64)


def world_size() -> int:
    """Return the number of ranks; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Return the number of this rank, from 0."""
    return dist.get_rank() if world_size() > 1 else 0


def sendable(tensor: Tensor) -> Tensor:
    """Return a tensor that the process group takes: NCCL alone takes none of the CPU, so a copy on this rank's GPU."""
    alone = tensor.device.type == "cpu" and str(dist.get_backend()) == "nccl"
    return tensor.to(torch.device("cuda", torch.cuda.current_device())) if alone else tensor


def all_reduce_(tensor: Tensor, how: Reduction) -> Tensor:
    """Replace a tensor by its sum, minimum or maximum over the ranks, in place on each rank, and return it."""
    if world_size() > 1:
        held = sendable(tensor)
        dist.all_reduce(held, op={"sum": dist.ReduceOp.SUM, "min": dist.ReduceOp.MIN, "max": dist.ReduceOp.MAX}[how])
        if held is not tensor:
            tensor.copy_(held)
    return tensor


def sum_over_ranks(number: int) -> int:
    """Return the sum of an integer over the ranks."""
    return int(all_reduce_(torch.tensor(number), "sum"))


def is_true_on_all_ranks(flag: bool) -> bool:
    """Return True if the flag is True on all ranks."""
    return bool(all_reduce_(torch.tensor(int(flag)), "min"))


def union_over_ranks(rows: Sequence[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """Return the tuples of non-negative integers that any rank has, in the same order on all ranks.

    They are ordered by rank, and by position within a rank.
    """
    if world_size() == 1:
        return list(dict.fromkeys(rows))
    most = all_reduce_(torch.tensor([len(rows), max((len(row) for row in rows), default=0)]), "max").tolist()
    if not most[0]:
        return []
    mine = torch.full(most, -1)
    for place, row in enumerate(rows):
        mine[place, : len(row)] = torch.tensor(row)
    mine = sendable(mine)
    gathered = [torch.empty_like(mine) for _ in range(world_size())]
    dist.all_gather(gathered, mine)
    padded = (tuple(row) for one in gathered for row in one.tolist())
    found = dict.fromkeys(tuple(number for number in row if number >= 0) for row in padded)
    return [row for row in found if row]


def all_reduce_dict_(found: dict[str, Tensor], names: Iterable[str], how: Reduction, device: Any = None) -> None:
    """Reduce the tensors of ``found`` in place, each over the ranks that have it. All ranks then have all of them.

    Args:
        found: name -> float32 or float64 tensor, of the same shape on all ranks.
        names: every name that may be among them, in the same order on all ranks.
        how: the reduction.
        device: the device of tensors that this rank does not have; None takes that of the others, else the CPU.
    """
    ordered = list(names)
    device = device or next((tensor.device for tensor in found.values()), None) or torch.device("cpu")
    rows = [(ordered.index(name), _DTYPES.index(value.dtype), *value.shape) for name, value in found.items()]
    mine = dict(found)
    found.clear()
    for place, dtype, *shape in union_over_ranks(rows):
        name = ordered[place]
        value = mine.get(name)
        if value is None:
            value = torch.full(shape, _NEUTRAL[how], dtype=_DTYPES[dtype], device=device)
        found[name] = all_reduce_(value.contiguous(), how)
