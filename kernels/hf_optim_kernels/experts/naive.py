"""The specification of the experts' operators in plain PyTorch.

A *pair* is a token and one of the k experts that it chose. Pairs are numbered ``t * k + j``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

NOBODY = -1


class Route(NamedTuple):
    """The pairs of a mixture layer, sorted by expert and cut into blocks of rows: what a grouped product reads.

    Row i of a grouped product belongs to the pair ``order[i]``, which is token ``order[i] // k``. The rows of expert e
    are ``offsets[e] : offsets[e + 1]``. Pairs whose expert is not one of ``0 .. E - 1`` are computed by none: they
    stand behind ``offsets[E]``, and no block has them.

    The sizes depend on those of the inputs alone, never on what was chosen, so nothing waits for an accelerator, and a
    captured graph may be replayed with other choices: ``blocks`` has as many entries as any choice can need
    (``most_blocks``), and the unused ones stand last.

    Attributes:
        order: int32 ``[T k]``: the numbers of the pairs by expert; those of an expert in ascending order.
        offsets: int32 ``[E + 1]``: where the rows of each expert begin; the last is the number of computed pairs.
        blocks: int32 ``[most_blocks, 2]``: expert and first row of each block of at most ``block`` rows, which ends at
            ``min(first + block, offsets[expert + 1])``. Blocks of an expert follow each other, experts ascend. The
            expert of an unused entry is -1.
    """

    order: Tensor
    offsets: Tensor
    blocks: Tensor


def most_blocks(pairs: int, experts: int, block: int) -> int:
    """Return the largest number of blocks that ``pairs`` can need: each expert has one that is not full."""
    return (pairs + min(experts, pairs) * (block - 1)) // block


def route(experts: Tensor, count: int, block: int) -> Route:
    """Return the route of pairs to experts.

    Args:
        experts: int64 or int32 ``[T, k]``; numbers outside of ``0 .. count - 1`` stand for "computed by none".
        count: E, the number of experts.
        block: rows of a block.
    """
    flat, device = experts.reshape(-1), experts.device
    numbers = torch.where((flat >= 0) & (flat < count), flat, count)
    order = torch.argsort(numbers, stable=True).to(torch.int32)
    each = torch.zeros(count + 1, dtype=torch.int64, device=device)
    each = each.scatter_add(0, numbers.long(), torch.ones_like(numbers, dtype=torch.int64))[:count]
    offsets = torch.cat([each.new_zeros(1), each.cumsum(0)])
    need = (each + block - 1) // block
    ends = need.cumsum(0)
    number = torch.arange(most_blocks(len(flat), count, block), device=device)
    expert = torch.searchsorted(ends, number, right=True)
    used = expert < count
    own = expert.clamp(max=count - 1)
    first = offsets[own] + (number - ends[own] + need[own]) * block
    blocks = torch.stack([torch.where(used, expert, NOBODY), torch.where(used, first, 0)], dim=1)
    return Route(order, offsets.to(torch.int32), blocks.to(torch.int32))
