"""Linear pairs: two linear layers between which channels can be rescaled or permuted without changing the model.

Examples are value and output projection, up and down projection, fc1 and fc2.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .block_lists import ModuleScope
from .channel_links import ChannelLink, find_channel_links
from .graph import Trace
from .linear_layers import parameter_names, tied_weights
from .reexecution import (
    TOLERANCE,
    NotReexecutable,
    Reexecution,
    is_close,
    memoize,
    ops_signature,
    random_tensor,
)
from .tracing import as_trace


@dataclass(frozen=True, eq=False)
class Partner:
    """A linear layer whose rows must be permuted together with those of a pair's producer, such as a gate.

    ``rows[k]`` is the row that corresponds to row ``k`` of the pair. A fused gate and up projection is its own partner.
    """

    name: str
    module: nn.Module
    rows: Tensor


@dataclass(frozen=True, eq=False)
class LinearPair:
    """Column ``j`` of the consumer reads row ``index[j]`` of the producer and no other row of that producer.

    Attributes:
        producer, producer_module, consumer, consumer_module: the two linear layers, by name and as modules. Nothing but
            the consumer reads the rows.
        index: int64 ``[consumer.in_features]``. With grouped-query attention several columns read one row.
        scalable: True if dividing rows (and their bias) by a positive factor and multiplying the columns that read them
            by it changes nothing. True for a value projection, for an up projection, through ReLU; False through GELU
            or tanh.
        groups: int64 ``[K]``. Rows with equal numbers can be permuted among themselves if the columns
            (``column_order``) and the rows of every module in ``permutable_with`` are permuted too; that changes
            nothing either. One group for an MLP, one for each key/value head in attention.
        permutable_with: the partners.
    """

    producer: str
    producer_module: nn.Module
    consumer: str
    consumer_module: nn.Module
    index: Tensor
    scalable: bool
    groups: Tensor
    permutable_with: tuple[Partner, ...]

    @property
    def rows(self) -> Tensor:
        """``[K]`` int64: the producer rows that are read, ascending.

        All rows of a value or up projection, the last third of a fused q, k, v projection.
        """
        return self.index.unique()

    @property
    def repeat(self) -> int:
        """Number of columns that read each row."""
        return self.index.numel() // self.groups.numel()

    @property
    def columns(self) -> Tensor:
        """``[K, repeat]`` int64: the columns that read each row."""
        return torch.argsort(self.index, stable=True).reshape(-1, self.repeat)

    def column_order(self, order: Tensor) -> Tensor:
        """Return the order of the columns ``[in_features]`` that goes with an ``order`` ``[K]`` of the rows.

        Row ``rows[k]`` becomes what row ``rows[order[k]]`` was; column ``j`` must become what column ``result[j]`` was.
        Raises ``ValueError`` if ``order`` is not a permutation or moves a row out of its group.
        """
        if not torch.equal(order.sort().values, torch.arange(self.groups.numel())):
            raise ValueError(f"order is not a permutation of {self.groups.numel()} rows")
        if not torch.equal(self.groups[order], self.groups):
            raise ValueError(f"the permutation moves rows of {self.producer} out of their groups")
        result = torch.empty_like(self.index)
        result[self.columns] = self.columns[order]
        return result


def find_linear_pairs(source: nn.Module | Trace, block: ModuleScope | None = None) -> list[LinearPair]:
    """Return the pairs of linear layers whose channels correspond, in the execution order of their consumers.

    With ``block`` only the pairs whose producer is in it. A consumer has at most one pair. If several producers feed
    it, a scalable one is the producer and the others are in ``permutable_with``. Layers whose weights are tied to
    another module have no pair. See ``LinearPair`` for what is exact.
    """
    return list(_linear_pairs(as_trace(source), block))


def _linear_pairs(trace: Trace, block: ModuleScope | None) -> Iterator[LinearPair]:
    names = parameter_names(trace.model)
    by_consumer: dict[str, list[ChannelLink]] = defaultdict(list)
    for name in dict.fromkeys(op.linear for op in trace.ops if op.linear is not None):
        if block is None or block.holds(name):
            for link in find_channel_links(trace, name):
                by_consumer[link.consumer].append(link)
    for consumer, found in by_consumer.items():
        layers = (consumer, *(link.producer for link in found))
        if any(tied_weights(trace.modules[name], name, names) for name in layers):
            continue
        yield _pair(trace, consumer, sorted(found, key=lambda link: not link.scalable))


def _pair(trace: Trace, consumer: str, found: list[ChannelLink]) -> LinearPair:
    """Return the pair of a consumer, given all links to it, the preferred one first."""
    first, others = found[0], found[1:]
    together = all(_corresponds(first, other) for other in others)
    return LinearPair(
        producer=first.producer,
        producer_module=trace.modules[first.producer],
        consumer=consumer,
        consumer_module=trace.modules[consumer],
        index=first.index,
        scalable=first.scalable,
        groups=_groups(trace, found) if together else torch.arange(len(first.rows)),
        permutable_with=tuple(
            Partner(other.producer, trace.modules[other.producer], other.index[first.columns[:, 0]])
            for other in others
            if together
        ),
    )


def _corresponds(first: ChannelLink, other: ChannelLink) -> bool:
    """Return True if the rows of two links to one consumer correspond one to one: the same columns read each."""
    rows = other.index[first.columns]
    return bool((rows == rows[:, :1]).all()) and len(other.rows) == len(first.rows)


def _groups(trace: Trace, members: list[ChannelLink]) -> Tensor:
    """Return ``_exchange_groups``, computed once for equal members."""
    ops = {op.position: op for link in members for op in link.ops}.values()
    values = [members[0].target, *(link.source for link in members)]
    rows = tuple(tuple(link.index.tolist()) for link in members)
    key = ("groups", ops_signature(trace, ops, values), rows)
    return memoize(trace, key, lambda: _exchange_groups(trace, members))


def _exchange_groups(trace: Trace, members: list[ChannelLink]) -> Tensor:
    """Return ``[rows]`` int64: rows of equal number can be permuted, in all ``members`` and the consumer together.

    ``members`` are the links of one consumer whose rows correspond. The rows of the first link are numbered; a row that
    cannot move has its own number. Two rows are interchangeable if equal inputs give equal outputs: those of one
    head are, those of two heads are not, since each head weighs the tokens differently.
    """
    target, columns = members[0].target, members[0].columns
    ops = {op.position: op for link in members for op in link.ops}.values()
    reexecution = Reexecution(trace, tuple(ops), seed=5)
    flat = {link.source: random_tensor(trace.shapes[link.source], seed=6 + n) for n, link in enumerate(members)}
    free = {source: tensor.clone() for source, tensor in flat.items()}
    for n, link in enumerate(members):
        flat[link.source][..., link.rows] = random_tensor((*trace.shapes[link.source][:-1], 1), seed=9 + n)
    alone = torch.arange(len(columns))
    try:
        groups = _clusters(reexecution.run(flat)[target].flatten(0, -2).T[columns].flatten(1))
        order = _shuffle_within(groups)
        moved = {source: tensor.clone() for source, tensor in free.items()}
        for link in members:
            rows = link.index[columns[:, 0]]
            moved[link.source][..., rows] = free[link.source][..., rows[order]]
        before, after = reexecution.run(free)[target], reexecution.run(moved)[target]
    except NotReexecutable:
        return alone
    expected = before.clone()
    expected[..., columns] = before[..., columns[order]]
    return groups if is_close(after, expected) else alone


def _clusters(signatures: Tensor) -> Tensor:
    """Return ``[n]`` int64: the cluster of each row of ``signatures`` ``[n, m]``, equal rows together, from 0 on."""
    weights = torch.rand(signatures.shape[1], dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    ordered, order = (signatures @ weights).sort()
    gap = TOLERANCE * max(float(ordered.abs().max()), 1.0)
    numbers = torch.empty(len(ordered), dtype=torch.int64)
    numbers[order] = torch.cat([torch.zeros(1, dtype=torch.int64), (ordered.diff() > gap).long().cumsum(0)])
    first = {int(number): None for number in numbers}
    renumbered = torch.empty(len(first), dtype=torch.int64)
    renumbered[torch.tensor(list(first))] = torch.arange(len(first))
    return renumbered[numbers]


def _shuffle_within(groups: Tensor) -> Tensor:
    """Return ``[n]`` int64: a permutation that moves every element within its group only."""
    order = torch.empty_like(groups)
    generator = torch.Generator().manual_seed(8)
    for number in groups.unique():
        members = (groups == number).nonzero().flatten()
        order[members] = members[torch.randperm(len(members), generator=generator)]
    return order
