"""Terms of attention patterns against their definitions, pair by pair, and what is derived from them."""

from __future__ import annotations

import itertools

import pytest
import torch

from hf_optim.toolkit.attention import (
    Band,
    Chunks,
    Columns,
    GlobalTokens,
    HeadPatterns,
    Pattern,
    share_of_attention,
    visible,
)
from hf_optim.toolkit.attention.layout import layouts

CPU = torch.device("cpu")
# Each term with its definition in plain Python, of query i and key j among n tokens.
TERMS = {
    "window": (Band(5, 3), lambda i, j, n: -3 <= i - j <= 5),
    "past": (Band(None, 0), lambda i, j, n: j <= i),
    "dilated": (Band(12, 12, 4), lambda i, j, n: abs(i - j) <= 12 and (i - j) % 4 == 0),
    "dilated, uneven reach": (Band(10, 7, 4), lambda i, j, n: -7 <= i - j <= 10 and (i - j) % 4 == 0),
    "every seventh": (Band(None, None, 7), lambda i, j, n: (i - j) % 7 == 0),
    "chunks": (Chunks(16), lambda i, j, n: i // 16 == j // 16),
    "chunks after one": (Chunks(10, start=1), lambda i, j, n: i > 0 and j > 0 and (i - 1) // 10 == (j - 1) // 10),
    "columns": (Columns(16, 3), lambda i, j, n: j % 16 >= 13),
    "ends": (GlobalTokens(2, 3), lambda i, j, n: min(i, j) < 2 or max(i, j) >= n - 3),
    "seen": (GlobalTokens(positions=(4, 5, 30), see=False), lambda i, j, n: j in (4, 5, 30)),
    "see": (GlobalTokens(1, positions=(33,), seen=False), lambda i, j, n: i in (0, 33)),
}
PATTERNS = {
    **{name: Pattern((term,)) for name, (term, _) in TERMS.items()},
    "causal window": Pattern((Band(9, 9),), True),
    "strided": Pattern((Band(None, 0, 7), Band(6, 0)), True),
    "fixed": Pattern((Chunks(16), Columns(16, 2)), True),
    "three orders": Pattern((Columns(10, 1), Band(None, None, 3), Band(1, 1), GlobalTokens(1))),
}


def pairs(length):
    place = torch.arange(length)
    return place[:, None], place[None, :]


def expanded(layout, length):
    """Return the pairs ``[L, n, n]`` that a layout computes, each counted as often as it is computed."""
    found = torch.zeros(len(layout.starts), length, length, dtype=torch.int64)
    masks, block = layout.unpacked(), layout.block
    for pattern, starts in enumerate(layout.starts.tolist()):
        for row, (start, stop) in enumerate(itertools.pairwise(starts)):
            for entry in range(start, stop):
                column, mask = int(layout.columns[entry]), int(layout.masks[entry])
                rows, keys = (torch.arange(block) + block * at for at in (row, column))
                if layout.order_q is not None:
                    rows, keys = layout.order_q[pattern].long()[rows], layout.order_k[pattern].long()[keys]
                rows, keys = (torch.where(t < length, t, -1) for t in (rows, keys))
                some_q, some_k = (rows >= 0).nonzero()[:, 0], (keys >= 0).nonzero()[:, 0]
                seen = masks[mask][some_q][:, some_k].long()
                found[pattern].index_put_((rows[some_q][:, None], keys[some_k][None, :]), seen, accumulate=True)
    return found


@pytest.mark.parametrize("name", TERMS)
def test_a_term_holds_the_pairs_of_its_definition(name):
    term, holds = TERMS[name]
    for length in (1, 37):
        seen = term.sees(*pairs(length), length).expand(length, length)
        assert seen.tolist() == [[holds(i, j, length) for j in range(length)] for i in range(length)]


@pytest.mark.parametrize("name", PATTERNS)
def test_the_lists_compute_each_pair_of_a_pattern_once(name):
    pattern = PATTERNS[name]
    for length, block in ((1, 32), (64, 32), (131, 32), (100, 64)):
        parts = layouts((pattern,), (0,), length, block, CPU)
        assert len(parts) == len(pattern.passes())
        computed = sum(expanded(part, length)[0] for part in parts)
        assert torch.equal(computed, visible(pattern, length).long()), (length, block)


def test_the_lists_by_key_are_those_by_query():
    patterns = tuple(PATTERNS[name] for name in ("strided", "window", "fixed"))
    for part in layouts(patterns, (0, 1, 2, 1), 131, 32, CPU):
        by_query, by_key = set(), set()
        for pattern in range(3):
            for row, (start, stop) in enumerate(itertools.pairwise(part.starts[pattern].tolist())):
                by_query |= {(pattern, row, int(part.columns[e]), int(part.masks[e])) for e in range(start, stop)}
            for column, (start, stop) in enumerate(itertools.pairwise(part.key_starts[pattern].tolist())):
                by_key |= {(pattern, int(part.rows[e]), column, int(part.key_masks[e])) for e in range(start, stop)}
        assert by_query == by_key
        assert len(by_query) == part.entries == len(part.rows)


def test_a_window_of_a_long_text_has_few_masks_and_lists_in_proportion_to_the_length():
    pattern = Pattern((Band(100, 0),), True)
    short, long = (layouts((pattern,), (0,), length, 64, CPU)[0] for length in (2048, 4096))
    assert len(short.bits) == len(long.bits) == 3  # the diagonal, and the two blocks that the window ends in
    assert long.entries / short.entries == pytest.approx(2, abs=0.1)
    assert layouts((pattern,), (0,), 4096, 64, CPU)[0] is long


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("causal", [False, True])
def test_no_key_is_given_up_that_a_later_query_sees(name, causal):
    pattern, length = Pattern(PATTERNS[name].terms, causal), 61
    seen = visible(pattern, length)
    for query in (1, 16, 40, 60):
        kept = pattern.stays(torch.arange(query), query, length)
        assert not bool((seen[query:, :query].any(0) & ~kept).any()), query


def test_what_a_later_query_cannot_see_is_given_up():
    for term, query, left in [
        (Band(5, 0), 20, range(15, 20)),
        (Band(12, 0, 4), 20, range(8, 20)),
        (Chunks(16), 20, range(16, 20)),
        (Columns(8, 2), 20, (6, 7, 14, 15)),
        (GlobalTokens(2, see=False), 20, (0, 1)),
        (GlobalTokens(2, positions=(9,)), 20, (0, 1, 9)),
        (GlobalTokens(positions=(30,)), 20, range(20)),  # the query at 30 will see all
    ]:
        kept = Pattern((term,), True).stays(torch.arange(20), query, 64)
        assert kept.nonzero()[:, 0].tolist() == list(left), term


def test_the_limits_of_the_terms_are_full_attention():
    full = [Band(None, 0), Band(8, 8), Band(8, 8, 1), Chunks(9), Columns(4, 4), GlobalTokens(9), Band(None, None, 1)]
    for term in full:
        assert Pattern((term,), True).is_full(9), term
    assert Pattern((Band(None, None),)).is_full(10**6)
    assert not Pattern((Band(None, 0),)).is_full(10**6)
    assert not Pattern((Band(7, 7),), True).is_full(9)
    assert not Pattern((Chunks(8),)).is_full(9)


@pytest.mark.parametrize("causal", [False, True])
def test_the_share_of_attention_counts_pairs(causal):
    patterns = [Pattern((Chunks(8),), causal), Pattern((Band(3, 3),), causal)]
    heads = HeadPatterns.of([patterns[0], patterns[1], patterns[0]], 3)
    whole = int(visible(Pattern((Band(None, None),), causal), 50).sum())
    counts = [int(visible(pattern, 50).sum()) for pattern in patterns]
    assert share_of_attention(heads, 50) == pytest.approx((2 * counts[0] + counts[1]) / (3 * whole))


def test_patterns_for_another_number_of_heads_are_refused():
    with pytest.raises(ValueError, match="2 patterns for 3 heads"):
        HeadPatterns.of([PATTERNS["window"]] * 2, 3)
