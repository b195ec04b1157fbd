"""The grid of nodes and ranks per node that a process group spans, with the sub-groups of its rows and columns.

Rank ``n * L + l`` of a group of G = N L ranks is rank l of node n. The *inner* group of a rank are the L ranks of its
node; its *outer* group are the N ranks with the same l, one of each node.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from ...errors import ModelError, RankError

LOCAL_SIZES = (
    "LOCAL_WORLD_SIZE",
    "LOCAL_SIZE",
    "OMPI_COMM_WORLD_LOCAL_SIZE",
    "MPI_LOCALNRANKS",
    "SLURM_NTASKS_PER_NODE",
)
"""Variables that state the ranks per node, in this order: torchrun, Tutel, Open MPI, MPICH, Slurm."""

LARGEST_GROUP = 2**20
ORDERS = ("flat", "intra_first", "inter_first")


@dataclass(frozen=True, eq=False)
class Grid:
    """How the ranks of a group exchange rows.

    Attributes:
        order: ``flat``, one exchange among all; ``intra_first``, within the node and then between nodes;
            ``inter_first``, between nodes and then within the node.
        nodes, local: N and L.
        rank: of this process in the group.
        group: all ranks.
        inner: the ranks of this node; None if it is ``group``, or has one rank.
        outer: the ranks with this number of every node; None likewise.
    """

    order: str
    nodes: int
    local: int
    rank: int
    group: Any
    inner: Any = None
    outer: Any = None

    @property
    def size(self) -> int:
        """G."""
        return self.nodes * self.local

    @property
    def messages(self) -> int:
        """How many messages a rank sends in one exchange: G - 1, or (L - 1) + (N - 1)."""
        return messages(self.nodes, self.local, self.order)


def messages(nodes: int, local: int, order: str) -> int:
    """Return how many messages one rank of a grid sends in one exchange."""
    return nodes * local - 1 if order == "flat" else (local - 1) + (nodes - 1)


def ranks_per_node(environment: Mapping[str, str] | None = None) -> int | None:
    """Return the ranks per node that a launcher's environment states; None if it states none.

    Raises ``ModelError`` for a value that is not a positive number.
    """
    held = os.environ if environment is None else environment
    for name in LOCAL_SIZES:
        value = held.get(name, "").strip()
        if not value:
            continue
        if not value.isdecimal() or not 0 < int(value[:9]) <= LARGEST_GROUP:
            raise ModelError(f"the environment variable {name} must be the ranks per node, not {value[:40]!r}")
        return int(value[:9])
    return None


def shape_of(size: int, per_node: int | None, source: str = "the setting") -> tuple[int, int]:
    """Return (nodes, ranks per node) of a group of ``size`` ranks; one node if ``per_node`` is None.

    A group that fits on one node is one node. Raises ``ModelError`` if the ranks of a node do not divide the group.
    """
    if per_node is None or per_node >= size:
        return 1, size
    if size % per_node:
        raise ModelError(
            f"{size} ranks exchange tokens and a node has {per_node} ({source}), so the nodes do not hold equally many "
            "of them: choose the sizes so that one divides the other, or set ranks_per_node"
        )
    return size // per_node, per_node


_made: dict[tuple[Any, ...], Grid] = {}


def grid_of(group: Any, order: str, per_node: int | None = None, timeout: float | None = None) -> Grid:
    """Return the grid of a process group. Its sub-groups are made once; all ranks of the group must call this.

    Args:
        group: of ``torch.distributed``; None is the default group.
        order: one of ``ORDERS``. A grid of one node, or of one rank per node, is ``flat``.
        per_node: ranks per node; None takes what the environment states, else one node.
        timeout: seconds that a rank of a sub-group waits for the others; None takes the default of the backend.

    Raises ``ModelError`` if the ranks do not form a grid, or disagree about its shape.
    """
    if order not in ORDERS:
        raise ModelError(f"the order of an exchange must be one of {', '.join(ORDERS)}, not {str(order)[:40]!r}")
    group = dist.group.WORLD if group is None else group
    ranks = tuple(dist.get_process_group_ranks(group))
    own = ranks.index(dist.get_rank())
    source = "the setting" if per_node is not None else "the environment"
    nodes, local = shape_of(len(ranks), per_node if per_node is not None else ranks_per_node(), source)
    if order != "flat":
        _require_one_shape(group, local)
    if order == "flat" or 1 in (nodes, local):
        return Grid("flat", nodes, local, own, group)
    key = (id(group), ranks, order, local, timeout)
    if key not in _made or _made[key].group is not group:
        _made[key] = Grid(order, nodes, local, own, group, *_sub_groups(ranks, own, local, timeout))
    return _made[key]


def _require_one_shape(group: Any, local: int) -> None:
    found: list[Any] = [None] * dist.get_world_size(group)
    with failures_named():
        dist.all_gather_object(found, local, group=group)
    if len(set(found)) > 1:
        raise ModelError(
            f"nodes have different numbers of ranks ({', '.join(map(str, sorted(set(found))))}), so they form no grid: "
            "set ranks_per_node"
        )


def _sub_groups(ranks: tuple[int, ...], own: int, local: int, timeout: float | None) -> tuple[Any, Any]:
    node, place = divmod(own, local)
    given: dict[str, Any] = {"use_local_synchronization": True}
    if timeout is not None:
        given["timeout"] = timedelta(seconds=timeout)
    with failures_named():
        inner = dist.new_group(list(ranks[node * local : (node + 1) * local]), **given)
        outer = dist.new_group(list(ranks[place::local]), **given)
    return inner, outer


class failures_named:
    """Raise ``RankError`` in place of the errors that collectives raise when a rank has ended or does not answer."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if isinstance(error, RuntimeError) and not isinstance(error, RankError) and is_failure(error):
            raise RankError(
                "an exchange between ranks failed: a rank has ended, or did not answer in time. Its own message is in "
                f"its output; here: {' '.join(str(error).split())[:300]}"
            ) from error


SIGNS = ("Connection closed", "Timed out", "timed out", "timeout", "Connection reset", "Broken pipe", "gloo", "NCCL",
         "ProcessGroup", "TCPStore", "Socket")  # fmt: skip


def is_failure(error: BaseException) -> bool:
    """Return True for an error of a collective that a lost rank causes."""
    return isinstance(error, getattr(dist, "DistError", ())) or any(sign in str(error) for sign in SIGNS)
