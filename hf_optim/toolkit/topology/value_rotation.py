"""Rotations of attention values: the rows of the value projection and the columns of the output projection by head.

Attention adds values up over tokens, with weights that do not depend on them. So an orthogonal matrix between the rows
that compute a head's values and the columns that read them, in all query heads that share it, changes nothing. Which
rows and columns belong together is found on a trace (``layer_pairs``), and that the operations between them commute
with a rotation by re-executing them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .channel_links import ChannelLink, find_channel_links
from .channel_search import random_signs, reflection
from .graph import Trace
from .layer_pairs import LinearPair, find_linear_pairs
from .reexecution import NotReexecutable, Reexecution, is_close, memoize, ops_signature, random_tensor


@dataclass(frozen=True, eq=False)
class ValueHeads:
    """The values of one attention, by key/value head.

    Attributes:
        producer, consumer: names of the value and the output projection.
        rows: int64 ``[heads, width]``: rows of the producer.
        columns: int64 ``[heads, reads, width]``: the columns that read them, once for each query head.
    """

    producer: str
    consumer: str
    rows: Tensor
    columns: Tensor

    @property
    def width(self) -> int:
        """Channels of a head."""
        return int(self.rows.shape[1])


def find_value_heads(trace: Trace) -> list[ValueHeads]:
    """Return the values of every attention whose heads can be rotated, in execution order.

    The neurons of a feed-forward layer are not among them: an activation function or a gate acts on each alone.
    """
    found = []
    for pair in find_linear_pairs(trace):
        if not pair.scalable or pair.permutable_with:
            continue
        heads = _heads(pair)
        links = [link for link in find_channel_links(trace, pair.producer) if link.consumer == pair.consumer]
        if heads is not None and len(links) == 1 and _commutes(trace, links[0], heads):
            found.append(heads)
    return found


def _heads(pair: LinearPair) -> ValueHeads | None:
    """Return the heads of a pair; None if they differ in size or have one channel."""
    members = [(pair.groups == number).nonzero().flatten() for number in pair.groups.unique()]
    if len({len(each) for each in members}) != 1 or len(members[0]) < 2:
        return None
    rows = torch.stack([pair.rows[each] for each in members])
    return ValueHeads(pair.producer, pair.consumer, rows, torch.stack([pair.columns[each].T for each in members]))


def _commutes(trace: Trace, link: ChannelLink, heads: ValueHeads) -> bool:
    """Return True if what the consumer reads is rotated when the rows of the producer are."""
    rows = tuple(heads.rows.flatten().tolist())
    key = ("rotated values", ops_signature(trace, link.ops, (link.source, link.target)), rows)

    def compute() -> bool:
        motion = reflection(heads.width, keeps_mean=False)
        shape = trace.shapes[link.source]
        start = random_tensor(shape, seed=17) * random_signs(shape, seed=19)
        moved = start.clone()
        reexecution = Reexecution(trace, link.ops, seed=18)
        try:
            before = reexecution.run({link.source: start})[link.target]
            for index in heads.rows:
                moved[..., index] = motion.moved(start[..., index], start.dim() - 1)
            expected = before.clone()
            for index in heads.columns.flatten(0, 1):
                expected[..., index] = motion.moved(before[..., index], before.dim() - 1)
            return is_close(reexecution.run({link.source: moved})[link.target], expected)
        except NotReexecutable:
            return False

    return memoize(trace, key, compute)
