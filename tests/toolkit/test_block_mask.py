"""Patterns in FlexAttention: the same attention as under the mask of all pairs, and blocks that are left out."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention

from hf_optim.toolkit.attention import (
    Band,
    Chunks,
    Columns,
    GlobalTokens,
    HeadPatterns,
    Pattern,
    ShiftedChunks,
    block_mask,
    masked_attention,
    seen_mask,
)
from hf_optim_plugins.attention._big_bird_pattern import FirstBlockAgain, NeighboursAndRandom

CASES = {
    "window": [Pattern((Band(40, 40),))],
    "causal window": [Pattern((Band(40),), True)],
    "strided": [Pattern((Band(None, None, 16), Band(7, 7)))],
    "columns": [Pattern((Chunks(32), Columns(32, 3)), True)],
    "globals": [Pattern((Band(20, 20), GlobalTokens(3, 2, (100,))))],
    "big bird": [Pattern((NeighboursAndRandom(32, 1, 7),))],
    "by head": [
        Pattern((Band(12, 12),)),
        Pattern((ShiftedChunks(32, 1),)),
        Pattern((Chunks(64),)),
        Pattern((Band(3),)),
    ],
}


@pytest.mark.many(every=4)
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize(("name", "length"), [*((name, 300) for name in CASES), ("causal window", 384)])
def test_flex_attention_computes_the_pattern(name, length):
    heads = HeadPatterns.of(CASES[name], 4)
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, 4, length, 16) for _ in range(3))
    blocks = block_mask(heads, length, block=64)
    found = flex_attention(query, key, value, block_mask=blocks, scale=0.3)
    seen = seen_mask(heads, length, length, None, torch.device("cpu"))
    right = masked_attention(query, key, value, seen, None, 0.3, 0.0)
    torch.testing.assert_close(found, right, rtol=1e-5, atol=1e-5)
    dense = blocks.to_dense().bool()  # blocks that are read
    padded = torch.nn.functional.pad(seen[0], (0, -length % 64, 0, -length % 64))
    some = padded.unflatten(2, (-1, 64)).unflatten(1, (-1, 64)).any(4).any(2)
    assert torch.equal(dense[0], some.expand_as(dense[0]))


def test_pairs_that_count_several_times_are_refused():
    pattern = Pattern((NeighboursAndRandom(32, 0, 7),), False, ((FirstBlockAgain(32, 7), 2),))
    with pytest.raises(ValueError, match="count several times"):
        block_mask(HeadPatterns.of([pattern], 2), 512)
