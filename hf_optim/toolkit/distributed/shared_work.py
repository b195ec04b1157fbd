"""Pieces of work that ranks divide among themselves, each piece done by one rank, and its result given to all.

For work that every rank could do by itself, since all have what it reads: matrices that were summed over the ranks, and
the weights. Results may hold tensors anywhere; they are sent as they are, so all ranks have the same bits.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ...errors import RankError
from . import collectives
from .liveness import guarded

T = TypeVar("T")


def owners_of(costs: Sequence[float], ranks: int) -> list[int]:
    """Return the rank that does each piece: the largest first, each for the rank with the least so far.

    (Graham, "Bounds on multiprocessing timing anomalies", 1969: at most 4/3 of the best division.)
    """
    load, found = [0.0] * ranks, [0] * len(costs)
    for number in sorted(range(len(costs)), key=lambda each: -costs[each]):
        found[number] = min(range(ranks), key=lambda rank: load[rank])
        load[found[number]] += costs[number]
    return found


def divided(pieces: Sequence[Callable[[], T]], costs: Sequence[float]) -> Iterator[T]:
    """Yield the results of all pieces, in order, on every rank. All ranks call it with the same pieces and costs.

    Args:
        pieces: what to do, one after the other. With one rank each is called when its result is asked for.
        costs: how long each takes, in any unit.

    Raises what a piece has raised, on all ranks (a ``RankError`` where the exception cannot be sent).
    """
    ranks, own = collectives.world_size(), collectives.rank()
    if ranks == 1 or len(pieces) < 2:
        yield from (piece() for piece in pieces)
        return
    owners = owners_of(costs, ranks)
    mine = {number: _done(piece) for number, piece in enumerate(pieces) if owners[number] == own}
    for number, owner in enumerate(owners):
        result, error = sent_to_all(mine.pop(number, None), owner)
        if error is not None:
            raise error
        yield result


def _done(piece: Callable[[], T]) -> tuple[T | None, Exception | None]:
    try:
        return piece(), None
    except Exception as error:
        try:
            alike = type(error)(*error.args)
        except TypeError:  # of a class whose arguments are not its message
            return None, RankError(f"rank {collectives.rank()}: {type(error).__name__}: {error}")
        return None, alike.with_traceback(error.__traceback__)


def sent_to_all(value: Any, owner: int) -> Any:
    """Return the ``value`` of the rank ``owner`` on all ranks. Tensors come to the device type that they have there.

    ``value`` may be or hold tensors, in tuples, lists, dictionaries and dataclasses.
    """
    if collectives.rank() == owner:
        tensors: list[Tensor] = []
        skeleton = _replaced(value, Tensor, lambda tensor: _Place(_appended(tensors, tensor.detach())))
        about = [(tuple(each.shape), each.dtype, each.device.type) for each in tensors]
        guarded(dist.broadcast_object_list, [(skeleton, about)], src=owner)
        for each in tensors:
            guarded(dist.broadcast, collectives.sendable(_bytes_of(each)), src=owner)
        return value
    held: list[Any] = [None]
    guarded(dist.broadcast_object_list, held, src=owner)
    skeleton, about = held[0]
    found = [_received(shape, dtype, kind, owner) for shape, dtype, kind in about]
    return _replaced(skeleton, _Place, lambda place: found[place.number])


@dataclass(frozen=True)
class _Place:
    """Stands for a tensor that is sent by itself."""

    number: int


def _appended(tensors: list[Tensor], tensor: Tensor) -> int:
    tensors.append(tensor)
    return len(tensors) - 1


def _replaced(value: Any, kind: type, replace: Callable[[Any], Any]) -> Any:
    """Return a value with everything of a kind in it replaced."""
    if isinstance(value, kind):
        return replace(value)
    if type(value) in (tuple, list):
        return type(value)(_replaced(each, kind, replace) for each in value)
    if type(value) is dict:
        return {key: _replaced(each, kind, replace) for key, each in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        return dataclasses.replace(value, **{name: _replaced(each, kind, replace) for name, each in fields.items()})
    return value


def _received(shape: tuple[int, ...], dtype: torch.dtype, kind: str, owner: int) -> Tensor:
    device = torch.device(kind, torch.cuda.current_device()) if kind == "cuda" else torch.device(kind)
    tensor = torch.empty(shape, dtype=dtype, device=device)
    room = _bytes_of(tensor)
    sent = collectives.sendable(room)
    guarded(dist.broadcast, sent, src=owner)
    if sent is not room:
        room.copy_(sent)
    return tensor


def _bytes_of(tensor: Tensor) -> Tensor:
    """Return a tensor's memory as uint8, since no backend sends every dtype."""
    return tensor.contiguous().view(-1).view(torch.uint8)
