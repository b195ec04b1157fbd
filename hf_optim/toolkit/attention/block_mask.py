"""The ``BlockMask`` of PyTorch's FlexAttention that a pattern implies.

Attention under patterns runs on lists of blocks of this package's own, which keep orders of tokens in which strided
patterns have empty blocks. FlexAttention knows the natural order alone: there such a pattern has none.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .head_patterns import HeadPatterns


def block_mask(heads: HeadPatterns, length: int, device: torch.device | str = "cpu", block: int = 128) -> Any:
    """Return the ``BlockMask`` of rows of ``length`` tokens without padding, for ``flex_attention``.

    Args:
        heads: the patterns of the query heads.
        length: tokens of a row.
        device: of the lists.
        block: tokens in a block, as FlexAttention's kernels take them.

    Raises ``ValueError`` for patterns with pairs that count several times, which no mask expresses.
    """
    from torch.nn.attention.flex_attention import BlockMask

    if any(pattern.repeats for pattern in heads.patterns):
        raise ValueError("pairs of this attention pattern count several times in the softmax, which no mask expresses")
    several = len(heads.patterns) > 1
    whole, partial = (torch.stack(part) for part in zip(*_blocks(heads, length, device, block), strict=True))
    kind = torch.tensor(heads.heads, device=device)
    if several:
        whole, partial = whole[kind], partial[kind]

    seen = [[term.traceable(length, device) for term in pattern.terms] for pattern in heads.patterns]

    def mask_mod(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        found = query < 0
        for number, (pattern, terms) in enumerate(zip(heads.patterns, seen, strict=True)):
            own = query < 0
            for sees in terms:
                own = own | sees(query, key)
            own = own & (key <= query) if pattern.causal else own
            found = found | (own & (kind[h] == number)) if several else own
        return found

    some, every = _lists(partial), _lists(whole)
    return BlockMask.from_kv_blocks(
        some[0], some[1], every[0], every[1], BLOCK_SIZE=block, mask_mod=mask_mod, seq_lengths=(length, length)
    )


def _blocks(heads: HeadPatterns, length: int, device: torch.device | str, block: int) -> list[tuple[Tensor, Tensor]]:
    """Return for each pattern which blocks are visible in whole, and which in part: bool ``[blocks, blocks]``."""
    count = -(-length // block)
    key = torch.arange(count * block, device=device)
    found = []
    for pattern in heads.patterns:
        every, some = [], []
        for start in range(0, length, block):
            query = torch.arange(start, min(start + block, length), device=device)[:, None]
            seen = pattern.sees(query, key, length).expand(len(query), -1) & (key < length)
            parts = seen.unflatten(1, (count, block))
            # A last block that is not full is a partial one: FlexAttention looks at each of its pairs.
            every.append(parts.all(0).all(1) & torch.tensor(len(query) == block, device=device))
            some.append(parts.any(0).any(1))
        whole = torch.stack(every)
        found.append((whole, torch.stack(some) & ~whole))
    return found


def _lists(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Return how many key blocks each query block has, ``[1, H, blocks]``, and these first, in their order."""
    order = torch.argsort((~blocks).to(torch.int8), dim=2, stable=True)
    return blocks.sum(2).int()[None], order.int()[None]
