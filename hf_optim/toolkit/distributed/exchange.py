"""All-to-all of rows, in one exchange or in two over a grid of nodes: equal results, other messages.

Every rank has a block of rows for each rank. With N nodes of L ranks, ``flat`` sends G - 1 = N L - 1 messages of one
block. The hierarchical orders send (L - 1) + (N - 1) larger ones:

    intra_first   to rank l of the own node: the blocks for rank l of all nodes; then each of them to its node
    inter_first   to each node, to the rank with the own number: the blocks for all ranks of that node; then within it

Rows between nodes are the same in all orders; within the node the hierarchical ones carry up to N times as many. Blocks
may have any sizes, 0 included. A received tensor is ordered by the rank that sent, then as it was sent, so all orders
give equal tensors to the bit, and so do their gradients.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .grid import Grid, failures_named


class _AllToAll(torch.autograd.Function):
    """One all-to-all of rows; its backward is the reverse one."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, send: list[int], receive: list[int], group: Any, pending: list[Any]) -> Tensor:
        ctx.sizes, ctx.group = (send, receive), group
        out, work = _exchange(rows, send, receive, group, wait=False)
        pending.append(work)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        send, receive = ctx.sizes
        return _exchange(grads[0], receive, send, ctx.group, wait=True)[0], None, None, None, None


class _Wait(torch.autograd.Function):
    """Wait for exchanges; the identity, also in backward."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, pending: list[Any]) -> Tensor:
        wait(pending)
        return rows.view_as(rows)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        return grads[0], None


def _exchange(rows: Tensor, send: list[int], receive: list[int], group: Any, wait: bool) -> tuple[Tensor, Any]:
    rows = rows.contiguous()
    out = rows.new_empty((sum(receive), *rows.shape[1:]))
    with failures_named():
        work = dist.all_to_all_single(out, rows, receive, send, group=group, async_op=not wait)
    return out, work


def wait(pending: list[Any]) -> None:
    """Wait for the exchanges in a list, and empty it. Raises ``RankError`` if a rank has ended."""
    while pending:
        work = pending.pop(0)
        if work is not None:
            with failures_named():
                work.wait()


@dataclass(frozen=True)
class Step:
    """One step of a route: blocks of rows put into another order, or rows exchanged within a group.

    Attributes:
        blocks: for a reordering, the sizes of the blocks as they stand.
        order: the number of the block that comes first, second, ...
        group: for an exchange, its ranks; None for a reordering.
        send, receive: rows for and from each rank of the group.
    """

    blocks: tuple[int, ...] = ()
    order: tuple[int, ...] = ()
    group: Any = None
    send: tuple[int, ...] = ()
    receive: tuple[int, ...] = ()

    def reversed(self) -> Step:
        """Return the step that undoes this one."""
        if self.group is not None:
            return Step(group=self.group, send=self.receive, receive=self.send)
        back = sorted(range(len(self.order)), key=self.order.__getitem__)
        return Step(blocks=tuple(self.blocks[i] for i in self.order), order=tuple(back))

    def start(self, rows: Tensor, pending: list[Any]) -> Tensor:
        """Return the rows after this step; an exchange is not complete before ``pending`` is."""
        if self.group is not None:
            return _AllToAll.apply(rows, list(self.send), list(self.receive), self.group, pending)  # type: ignore[no-any-return]
        parts = rows.split(list(self.blocks))
        return torch.cat([parts[i] for i in self.order])


@dataclass(frozen=True)
class Route:
    """The way of rows from the ranks that have them to the ranks that compute with them, and back.

    Attributes:
        steps: from sender to receiver.
        sent, received: rows that this rank sends, and gets.
    """

    steps: tuple[Step, ...]
    sent: int
    received: int

    def forth(self, rows: Tensor) -> Tensor:
        """Return the rows for this rank, ``[received, ...]``, from rows ``[sent, ...]`` ordered by their receiver."""
        return self.finish(*self.start(rows))

    def back(self, rows: Tensor) -> Tensor:
        """Return ``[sent, ...]``, in the order that ``forth`` got, from ``[received, ...]``."""
        return self.finish(*self.start(rows, back=True))

    def start(self, rows: Tensor, back: bool = False) -> tuple[Tensor, list[Any], tuple[Step, ...]]:
        """Begin ``forth`` or ``back``: run until the last exchange, which need not be complete; see ``finish``."""
        steps = tuple(step.reversed() for step in reversed(self.steps)) if back else self.steps
        last = max(place for place, step in enumerate(steps) if step.group is not None)
        pending: list[Any] = []
        for step in steps[: last + 1]:
            if pending:
                rows = _Wait.apply(rows, pending)  # type: ignore[no-untyped-call]
            rows = step.start(rows, pending)
        return rows, pending, steps[last + 1 :]

    @staticmethod
    def finish(rows: Tensor, pending: list[Any], rest: tuple[Step, ...]) -> Tensor:
        """Wait for what ``start`` began, and return the rows."""
        rows = _Wait.apply(rows, pending)  # type: ignore[no-untyped-call]
        for step in rest:
            rows = step.start(rows, pending)
        return rows


def plan_route(counts: Tensor, grid: Grid) -> tuple[Route, Tensor]:
    """Exchange how many rows each rank has for each, and return the route with what this rank will get.

    Args:
        counts: int64 ``[G, c]``: rows for each rank, in c classes; rows are sent by rank, then by class.
        grid: of the G ranks.

    Returns:
        the route, and int64 ``[G, c]``: rows from each rank, by class. It waits for the device once.
    """
    classes = counts.shape[1]
    nodes, local = grid.nodes, grid.local
    if grid.order == "flat":
        received = _equal_exchange(counts, grid.group)
        table = torch.stack([counts.sum(1), received.sum(1)]).tolist()
        return _flat(table[0], table[1], grid), received
    there = counts.view(nodes, local, classes)
    if grid.order == "intra_first":
        between = _equal_exchange(there.transpose(0, 1), grid.inner).view(local, nodes, classes)
        received = _equal_exchange(between.transpose(0, 1), grid.outer).view(nodes, local, classes)
    else:
        between = _equal_exchange(there, grid.outer).view(nodes, local, classes)
        received = _equal_exchange(between.transpose(0, 1), grid.inner).view(local, nodes, classes).transpose(0, 1)
    first, second, third = torch.stack([part.sum(-1).reshape(-1) for part in (there, between, received)]).tolist()
    return _two_steps(first, second, third, grid), received.reshape(-1, classes)


def route_from(table: list[list[int]], grid: Grid) -> Route:
    """Return the route if every rank knows how many rows each rank has for each: ``table[from][to]``."""
    own, nodes, local = grid.rank, grid.nodes, grid.local
    there, received = table[own], [row[own] for row in table]
    if grid.order == "flat":
        return _flat(there, received, grid)
    node, place = divmod(own, local)
    if grid.order == "intra_first":
        between = [table[node * local + r][n * local + place] for r in range(local) for n in range(nodes)]
    else:
        between = [table[n * local + place][node * local + r] for n in range(nodes) for r in range(local)]
    return _two_steps(there, between, received, grid)


def _flat(there: list[int], received: list[int], grid: Grid) -> Route:
    step = Step(group=grid.group, send=tuple(there), receive=tuple(received))
    return Route((step,), sum(there), sum(received))


def _two_steps(there: list[int], between: list[int], received: list[int], grid: Grid) -> Route:
    """Return the route of a hierarchical order.

    there: rows for rank (n, l), node-major. between: what this rank holds after the first exchange, from rank l of its
    node for node n (``[L][N]``, intra_first) or from node n for rank l of its node (``[N][L]``). received: node-major.
    """
    nodes, local = grid.nodes, grid.local
    by_local = tuple(n * local + r for r in range(local) for n in range(nodes))
    by_node = tuple(r * nodes + n for n in range(nodes) for r in range(local))

    def sums(sizes: list[int], width: int) -> tuple[int, ...]:
        return tuple(sum(sizes[first : first + width]) for first in range(0, len(sizes), width))

    turned = [there[i] for i in by_local]
    received_by_local = [received[i] for i in by_local]
    if grid.order == "intra_first":
        middle = [between[i] for i in by_node]
        steps = (
            Step(blocks=tuple(there), order=by_local),
            Step(group=grid.inner, send=sums(turned, nodes), receive=sums(between, nodes)),
            Step(blocks=tuple(between), order=by_node),
            Step(group=grid.outer, send=sums(middle, local), receive=sums(received, local)),
        )
    else:
        middle = [between[i] for i in by_local]
        steps = (
            Step(group=grid.outer, send=sums(there, local), receive=sums(between, local)),
            Step(blocks=tuple(between), order=by_local),
            Step(group=grid.inner, send=sums(middle, nodes), receive=sums(received_by_local, nodes)),
            Step(blocks=tuple(received_by_local), order=by_node),
        )
    return Route(steps, sum(there), sum(received))


def all_gather_(whole: Tensor, part: Tensor, group: Any) -> None:
    """Fill ``whole`` ``[G n, ...]`` with the parts ``[n, ...]`` of all ranks."""
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # renamed in torch 2.13
    with failures_named():
        gather(whole, part, group=group)


def reduce_scatter_(part: Tensor, whole: Tensor, group: Any) -> None:
    """Fill ``part`` ``[n, ...]`` with the sum of what all ranks have for this one in ``whole`` ``[G n, ...]``."""
    reduce = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    with failures_named():
        reduce(part, whole, group=group)


def _equal_exchange(parts: Tensor, group: Any) -> Tensor:
    """Return what the ranks of a group send this one; ``parts`` ``[ranks, ...]`` int64, one for each."""
    parts = parts.contiguous()
    out = torch.empty_like(parts)
    with failures_named():
        dist.all_to_all_single(out, parts, group=group)
    return out


def all_to_all(rows: Tensor, counts: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Send rows to the ranks of a grid, and return the rows from them. Differentiable.

    Args:
        rows: ``[R, ...]``, ordered by receiver.
        counts: int64 ``[G]``: rows for each rank; their sum is R.
        grid: of the G ranks.

    Returns:
        the rows from all ranks, ordered by sender, and int64 ``[G]``: how many each sent.

    Raises ``RankError`` if a rank has ended or does not answer within the timeout of its group.
    """
    route, received = plan_route(counts.unsqueeze(1), grid)
    return route.forth(rows), received.squeeze(1)
