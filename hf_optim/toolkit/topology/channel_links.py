"""Channel links: which input channel of one linear layer is which output channel of another.

For a producer with output ``y`` and a consumer with input ``x``, the operations in between are re-executed on random
numbers. One directional derivative is taken along ``r``, another along ``f * r`` with a different factor ``f[c]`` for
every channel ``c``: if ``x[j]`` depends on one channel of ``y`` alone, the ratio of the two derivatives is the factor
of that channel. This gives the whole map at once, also through attention and repeated key/value heads.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from .graph import Op, Trace
from .reexecution import (
    NotReexecutable,
    Reexecution,
    distinct_factors,
    is_close,
    is_data_movement,
    memoize,
    ops_signature,
    random_tensor,
)

STEP = 1e-4
"""Half the distance of the finite difference; it is central, so the error is of the order of the square."""


@dataclass(frozen=True, eq=False)
class ChannelLink:
    """Consumer column ``j`` reads producer row ``index[j]`` and no other row of that producer.

    Attributes:
        producer, consumer: names of the linear layers.
        source: the output value of the producer.
        target: the input value of the consumer.
        ops: the operations from ``source`` to ``target``.
        index: int64 ``[columns]``.
        scalable: True if the path is homogeneous: scaling a row scales the columns that read it.
    """

    producer: str
    consumer: str
    source: int
    target: int
    ops: tuple[Op, ...]
    index: Tensor
    scalable: bool

    @property
    def columns(self) -> Tensor:
        """``[rows, repeat]`` int64: the consumer columns that read each row, rows in ascending order."""
        return torch.argsort(self.index, stable=True).reshape(self.index.unique().numel(), -1)

    @property
    def rows(self) -> Tensor:
        """``[rows]`` int64: the producer rows that are read, ascending."""
        return self.index.unique()


def find_channel_links(trace: Trace, producer: str) -> list[ChannelLink]:
    """Return the links from the linear layer ``producer``: at most one for each independent part of its output.

    A fused projection (q, k, v in one matrix; gate and up in one) has several parts. A layer that the forward calls
    more than once has no links.
    """
    calls = trace.calls_of(producer)
    if len(calls) != 1 or len(calls[0].writes) != 1:
        return []
    source = calls[0].writes[0]
    try:
        movements, parts = _independent_parts(trace, source)
    except NotReexecutable:
        return []
    found = (_find_link(trace, producer, source, movements, channels, leaves) for channels, leaves in parts)
    return [link for link in found if link is not None]


def _independent_parts(trace: Trace, source: int) -> tuple[list[Op], list[tuple[Tensor, list[int]]]]:
    """Split the channels of ``source`` into independent parts.

    Follows views, splits and transposes to the values that are computed with. Returns those operations, and for each
    part its channels ``[n]`` int64 and the values that hold them.
    """
    movements: dict[int, Op] = {}
    leaves: list[tuple[int, set[int]]] = []
    pending: list[tuple[int, tuple[Op, ...]]] = [(source, ())]
    while pending:
        value, path = pending.pop()
        readers = trace.readers.get(value, ())
        moving = [op for op in readers if is_data_movement(trace, op, value)]
        movements.update({op.position: op for op in moving})
        pending.extend((write, (*path, op)) for op in moving for write in op.writes)
        if len(moving) < len(readers) or value in trace.outputs:
            leaves.append((value, _channels_in(trace, source, value, path)))
    merged = _merge_overlapping((value, channels) for value, channels in leaves if channels)
    return list(movements.values()), [(torch.tensor(sorted(channels)), values) for channels, values in merged]


def _channels_in(trace: Trace, source: int, value: int, path: tuple[Op, ...]) -> set[int]:
    """Return the channels of ``source`` that the data movements of ``path`` bring into ``value``."""

    def compute() -> set[int]:
        shape = trace.shapes[source]
        labels = torch.arange(shape[-1], dtype=torch.float64).expand(shape)
        return set(Reexecution(trace, path).run({source: labels})[value].unique().long().tolist())

    return memoize(trace, ("channels", ops_signature(trace, path, (source, value))), compute)


def _merge_overlapping(leaves: Iterable[tuple[int, set[int]]]) -> list[tuple[set[int], list[int]]]:
    """Merge the leaves that have channels in common."""
    merged: list[tuple[set[int], list[int]]] = []
    for value, channels in leaves:
        touching = [group for group in merged if group[0] & channels]
        merged = [group for group in merged if not group[0] & channels]
        union = channels.union(*(group[0] for group in touching))
        merged.append((union, [v for group in touching for v in group[1]] + [value]))
    return merged


def _find_link(
    trace: Trace, producer: str, source: int, movements: list[Op], channels: Tensor, leaves: list[int]
) -> ChannelLink | None:
    """Return the link from some channels of a producer to the only linear layer that reads them all, or None."""
    path = _path_to_one_linear(trace, leaves)
    if path is None or len(trace.calls_of(path[0])) != 1:
        return None
    consumer, target, between = path
    ops = tuple({op.position: op for op in (*movements, *between)}.values())
    key = ("map", ops_signature(trace, ops, (source, target)), tuple(channels.tolist()))
    index, scalable = memoize(trace, key, lambda: _map_channels(trace, ops, source, target, channels))
    return None if index is None else ChannelLink(producer, consumer, source, target, ops, index, scalable)


def _map_channels(
    trace: Trace, ops: tuple[Op, ...], source: int, target: int, channels: Tensor
) -> tuple[Tensor | None, bool]:
    """Return ``index`` and ``scalable`` of a ``ChannelLink``; the index is None if the channels do not correspond."""
    reexecution = Reexecution(trace, ops, seed=1)
    try:
        index = _channel_map(trace, reexecution, source, target, channels)
        if index is None or not _is_local(trace, reexecution, source, target, channels, index):
            return None, False
        return index, _is_homogeneous(trace, reexecution, source, target, index)
    except NotReexecutable:
        return None, False


def _path_to_one_linear(trace: Trace, leaves: Iterable[int]) -> tuple[str, int, list[Op]] | None:
    """Return the only linear layer that reads everything computed from ``leaves``: name, input, operations before it.

    None if there are several, or if the model returns a part of it.
    """
    fringe = list(leaves)
    ahead: list[tuple[int, Op]] = []
    seen: dict[int, Op] = {}
    ends: dict[str, int] = {}
    while fringe:
        for value in fringe:
            if value in trace.outputs:
                return None
            for op in trace.readers.get(value, ()):
                if op.linear is not None:
                    ends[op.linear] = value
                elif op.position not in seen:
                    seen[op.position] = op
                    heapq.heappush(ahead, (op.position, op))
        if len(ends) > 1:
            return None
        fringe = list(heapq.heappop(ahead)[1].produces) if ahead else []
    if not ends:
        return None
    ((name, value),) = ends.items()
    return name, value, list(seen.values())


def _channel_map(trace: Trace, reexecution: Reexecution, source: int, target: int, channels: Tensor) -> Tensor | None:
    """Return ``[in_features]`` int64: the only one of ``channels`` of ``source`` that each ``target`` column reads.

    None if a column depends on several channels or on none, or if the channels are not read equally often.
    """
    shape = trace.shapes[source]
    factors, order = distinct_factors(channels.numel()).sort()
    direction = torch.zeros(shape, dtype=torch.float64)
    direction[..., channels] = random_tensor((*shape[:-1], channels.numel()), seed=2).abs()
    scaled = direction.clone()
    scaled[..., channels[order]] *= factors
    start = random_tensor(shape, seed=3)

    def derivative(along: Tensor) -> Tensor:
        ahead, behind = (reexecution.run({source: start + sign * STEP * along})[target] for sign in (1.0, -1.0))
        return ((ahead - behind) / (2 * STEP)).flatten(0, -2)

    plain, times_factor = derivative(direction), derivative(scaled)
    squares = plain.square().sum(0)
    if not bool((squares > 0).all()):
        return None
    ratio = (plain * times_factor).sum(0) / squares
    nearest = torch.bucketize(ratio, (factors[1:] + factors[:-1]) / 2)
    if not bool(((ratio - factors[nearest]).abs() < min(1e-5, 0.1 / channels.numel())).all()):
        return None
    index = channels[order[nearest]]
    counts = torch.bincount(index, minlength=shape[-1])[channels]
    return index if bool((counts == counts[0]).all()) else None


def _is_local(
    trace: Trace, reexecution: Reexecution, source: int, target: int, channels: Tensor, index: Tensor
) -> bool:
    """Return True if changing every second channel leaves the columns that read the other channels unchanged."""
    start = random_tensor(trace.shapes[source], seed=3)
    other = start.clone()
    other[..., channels[::2]] = random_tensor(start.shape, seed=4)[..., channels[::2]]
    kept = ~torch.isin(index, channels[::2])
    before, after = reexecution.run({source: start})[target], reexecution.run({source: other})[target]
    return is_close(after[..., kept], before[..., kept])


def _is_homogeneous(trace: Trace, reexecution: Reexecution, source: int, target: int, index: Tensor) -> bool:
    """Return True if positive factors on the channels of ``source`` scale the columns that read them alike."""
    start = random_tensor(trace.shapes[source], seed=3)
    rows = index.unique()
    factors = torch.ones(start.shape[-1], dtype=torch.float64)
    factors[rows] = distinct_factors(rows.numel(), seed=1)
    before, after = reexecution.run({source: start})[target], reexecution.run({source: start * factors})[target]
    return is_close(after, before * factors[index])
