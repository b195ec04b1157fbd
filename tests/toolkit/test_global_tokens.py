"""Attention with tokens that are global in their row, beside a softmax under a mask written down pair by pair."""

from __future__ import annotations

import pytest
import torch

from hf_optim.toolkit.attention import Band, GlobalTokens, HeadPatterns, Pattern, Pieces
from hf_optim.toolkit.attention.attend import attend
from hf_optim.toolkit.attention.global_tokens import BatchGlobals, attend_globally, whole_layout
from hf_optim.toolkit.attention.rows import Rows

B, H, G, D, N = 2, 4, 2, 8, 131
REACH = 6


def parts():
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(B, H, N, D, generator=generator, dtype=torch.float64, requires_grad=True)
    key, value = (
        torch.randn(B, G, N, D, generator=generator, dtype=torch.float64, requires_grad=True) for _ in range(2)
    )
    return query, key, value


def softmax(query, key, value, seen, scale):
    key, value = key.repeat_interleave(H // G, 1), value.repeat_interleave(H // G, 1)
    scores = (query @ key.mT * scale).masked_fill(~seen, -1e30)
    return scores.softmax(-1).masked_fill(~seen, 0) @ value


def segments(kind):
    found = torch.zeros(B, N, dtype=torch.int32)
    if kind == "left":
        found[1, :70] = -1
    elif kind == "right":
        found[1, 50:] = -1
    elif kind == "packed":
        found[0, 40:], found[0, 90:], found[1, 100:] = 1, 2, -1
    return found


def seen_by_pair(found, is_global, pieces):
    """Return bool ``[B, 1, N, N]``, by the definition of each piece."""
    seen = torch.zeros(B, N, N, dtype=torch.bool)
    for b in range(B):
        own, documents = is_global[b].tolist(), found[b].tolist()
        span = is_global[b].long().cumsum(0).tolist()
        for i in range(N):
            for j in range(N):
                if documents[i] != documents[j] or documents[i] < 0:
                    continue
                if own[i] and own[j]:
                    seen[b, i, j] = pieces.g2g
                elif own[i]:
                    seen[b, i, j] = pieces.g2l and (not pieces.own_span or span[i] == span[j])
                elif own[j]:
                    seen[b, i, j] = pieces.l2g
                else:
                    seen[b, i, j] = pieces.l2l and abs(i - j) <= REACH
    return seen[:, None]


@pytest.mark.many
@pytest.mark.parametrize("way", ["dense", "blocks"])
@pytest.mark.parametrize(
    ("kind", "off"),
    [("none", ""), ("left", ""), ("right", ""), ("packed", ""), ("left", "g2g"), ("left", "g2l"), ("packed", "l2g"),
     ("right", "l2l"), ("packed", "span")],
)  # fmt: skip
def test_outputs_and_gradients(kind, off, way):
    query, key, value = parts()
    found = segments(kind)
    is_global = torch.zeros(B, N, dtype=torch.bool)
    is_global[0, [0, 3, 64, 100]] = is_global[1, [10, 72, 73, 49, 80, 130, 20]] = True
    is_global &= found >= 0
    pieces = Pieces(own_span=True) if off == "span" else Pieces(**({off: False} if off else {}))
    heads = HeadPatterns.of([Pattern((Band(REACH, REACH),))], H)
    rows = None if kind == "none" else Rows.of(found)
    expected = softmax(query, key, value, seen_by_pair(found, is_global, pieces), 0.3)
    tokens = BatchGlobals.of(is_global)
    out = attend_globally(query, key, value, heads, 0.3, tokens, pieces, None, rows, None, 0.0, way)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=out.dtype)
    one, other = (torch.autograd.grad((x * weights).sum(), (query, key, value)) for x in (out, expected))
    for mine, theirs in zip(one, other, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-11)


@pytest.mark.parametrize("way", ["dense", "blocks"])
def test_own_projections_give_the_rows_of_global_tokens_alone(way):
    query, key, value = parts()
    other = [x.detach().flip(2) for x in (query, key, value)]
    is_global = torch.zeros(B, N, dtype=torch.bool)
    is_global[0, [5, 99]] = is_global[1, 40] = True
    tokens = BatchGlobals.of(is_global)
    heads = HeadPatterns.of([Pattern((Band(REACH, REACH),))], H)
    own = tokens.gather(other[0]), other[1], other[2]
    out = attend_globally(query, key, value, heads, 0.3, tokens, Pieces(), own, None, None, 0.0, way)
    seen = seen_by_pair(segments("none"), is_global, Pieces())
    expected = torch.where(
        is_global[:, None, :, None],
        softmax(*other, torch.ones_like(seen), 0.3),
        softmax(query, key, value, seen, 0.3),
    )
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)


def test_without_global_tokens_it_is_the_pattern():
    query, key, value = parts()
    heads = HeadPatterns.of([Pattern((Band(REACH, REACH),))], H)
    tokens = BatchGlobals.of(torch.zeros(B, N, dtype=torch.bool))
    for way in ("dense", "blocks"):
        out = attend_globally(query, key, value, heads, 0.3, tokens, way=way)
        assert torch.equal(out, attend(query, key, value, heads, 0.3, way=way))
    off = attend_globally(query, key, value, heads, 0.3, tokens, Pieces(l2l=False), way="blocks")
    assert not off.any()


def test_a_cache_is_refused():
    query, key, value = parts()
    tokens = BatchGlobals.of(torch.ones(B, N, dtype=torch.bool))
    with pytest.raises(ValueError, match="use_cache=False"):
        attend_globally(query[:, :, -1:], key, value, HeadPatterns.of([Pattern((Band(1, 1),))], H), 0.3, tokens)


def test_the_layout_in_which_all_see_all():
    layout = whole_layout(H, 130, 70, torch.device("cpu"))
    assert layout.starts.tolist() == [[0, 2, 4, 6]]
    assert layout.columns.tolist() == [0, 1] * 3
    assert layout.key_starts.tolist() == [[0, 3, 6]]
    assert layout.rows.tolist() == [0, 1, 2] * 2
    assert layout.masks.tolist() == layout.key_masks.tolist() == [-1] * 6


@pytest.mark.parametrize("way", ["dense", "blocks"])
def test_a_row_whose_batch_pads_it_has_its_own_last_tokens(way):
    """All rows have the same padding: the last token is still not the last place."""
    query, key, value = (x.detach() for x in parts())
    heads = HeadPatterns.of([Pattern((Band(REACH, REACH), GlobalTokens(last=1)))], H)
    found = torch.zeros(B, N, dtype=torch.int32)
    found[:, 100:] = -1
    out = attend(query, key, value, heads, 0.3, Rows.of(found), way=way)
    alone = attend(*(x[:, :, :100] for x in (query, key, value)), heads, 0.3, way=way)
    torch.testing.assert_close(out[:, :, :100], alone, rtol=0, atol=1e-12)


@pytest.mark.parametrize("way", ["dense", "blocks"])
def test_pairs_that_count_several_times(way):
    """A softmax with weights: keys of the first 10 tokens count 4 times for queries from 20 on."""
    query, key, value = parts()
    heads = HeadPatterns.of([Pattern((GlobalTokens(first=30), Band(REACH, REACH)), repeats=((_Late(), 3),))], H)
    seen = seen_by_pair(segments("none"), torch.arange(N).expand(B, N) < 30, Pieces())
    place = torch.arange(N)
    times = torch.where((place < 10) & (place[:, None] >= 20), 4.0, 1.0).double()
    key_, value_ = key.repeat_interleave(H // G, 1), value.repeat_interleave(H // G, 1)
    scores = (query @ key_.mT * 0.3).exp() * times * seen
    expected = (scores / scores.sum(-1, keepdim=True)) @ value_
    out = attend(query, key, value, heads, 0.3, way=way)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    one, other = (torch.autograd.grad((x * value_.detach()).sum(), (query, key, value)) for x in (out, expected))
    for mine, theirs in zip(one, other, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-11)


class _Late(Band):
    """The first ten keys, for queries from 20 on."""

    def __init__(self):
        super().__init__(None, None)

    def sees(self, query, key, length):
        return (key < 10) & (query >= 20)
