"""How much of full attention a pattern computes."""

from __future__ import annotations

import torch

from .head_patterns import HeadPatterns

PAIRS_COUNTED = 2**24


def share_of_attention(heads: HeadPatterns, length: int) -> float:
    """Return the pairs of query and key that the heads see, as a share of those that full attention computes.

    Args:
        heads: the patterns; the mean over the heads is returned.
        length: number of tokens in a row; counting takes time and memory in proportion to its square, a part at a time.
    """
    key = torch.arange(length)
    seen = [0] * len(heads.patterns)
    distance = torch.arange(1 - length, length)
    for index, pattern in enumerate(heads.patterns):
        if pattern.moves_along:  # all pairs of one distance are alike
            found = pattern.sees(distance, torch.zeros_like(distance), length)
            seen[index] = int((length - distance.abs())[found].sum())
    for query in key.split(max(1, PAIRS_COUNTED // length)):
        for index, pattern in enumerate(heads.patterns):
            if pattern.moves_along:
                continue
            shape = (len(query), length)
            seen[index] += int(pattern.sees(query[:, None], key[None, :], length).expand(shape).sum())
    whole = length * (length + 1) // 2 if heads.causal else length * length
    return sum(seen[index] for index in heads.heads) / (len(heads.heads) * whole)
