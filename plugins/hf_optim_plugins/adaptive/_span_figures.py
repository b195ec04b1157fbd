"""What spans save: keys and values that a cache holds, and pairs that attention computes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from hf_optim.toolkit.attention import groups_of, nearest_keys, share_of_attention

LONGEST_COUNTED = 8192  # tokens for which the share of attention is counted


class Keys(NamedTuple):
    """The keys of an attention module: heads, and bytes of a key with its value."""

    heads: int
    width: int


def figures_of(counts: Sequence[Sequence[int]], keys: Sequence[Keys], context: int, causal: bool) -> dict[str, Any]:
    """Return the figures of a record.

    Args:
        counts: how many nearest keys each head of each attention sees, the query among them.
        keys: of each attention.
        context: tokens of the row that is counted.
        causal: there is a cache.
    """
    every = [min(count, context) for layer in counts for count in layer]
    shares = [share_of_attention(nearest_keys(layer, causal), min(context, LONGEST_COUNTED)) for layer in counts]
    found = {
        "mean_span": sum(every) / len(every),
        "longest_spans": [min(max(layer), context) for layer in counts],
        "share_of_attention": sum(shares) / len(shares),
    }
    if not causal:
        return found
    return {
        **found,
        "cache_bytes": sum(held_bytes(layer, each, context) for layer, each in zip(counts, keys, strict=True)),
        "full_cache_bytes": sum(each.heads * context * each.width for each in keys),
    }


def held_bytes(counts: Sequence[int], keys: Keys, tokens: int) -> int:
    """Return the bytes of keys and values that a cache layer holds after ``tokens`` tokens of one row.

    It holds what the next query sees, for each group of key heads the keys of the longest span.
    """
    shared = len(counts) // keys.heads
    seen = [max(counts[head * shared : (head + 1) * shared]) for head in range(keys.heads)]
    return sum(len(group) * min(max(seen[h] for h in group) - 1, tokens) for group in groups_of(seen)) * keys.width
