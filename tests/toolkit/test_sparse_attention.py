"""Attention under patterns against the softmax under their boolean mask in float64, however it is computed."""

from __future__ import annotations

import pytest
import torch

from hf_optim.toolkit.attention import Band, Chunks, Columns, GlobalTokens, HeadPatterns, Pattern, visible
from hf_optim.toolkit.attention.attend import attend
from hf_optim.toolkit.attention.blocked import blocked_attention, merge
from hf_optim.toolkit.attention.layout import layouts
from hf_optim.toolkit.attention.rows import Rows

CPU = torch.device("cpu")
PATTERNS = {
    "window": [Pattern((Band(5, 5),))],
    "causal window": [Pattern((Band(9, 0),), True)],
    "strided": [Pattern((Band(None, 0, 7), Band(6, 0)), True)],
    "fixed": [Pattern((Chunks(16), Columns(16, 2)), True)],
    "global ends": [Pattern((Band(4, 4), GlobalTokens(3, 2, (20,))))],
    "by head": [
        Pattern((Chunks(16),), True), Pattern((Band(None, 0, 5),), True), Pattern((Band(3, 0),), True),
        Pattern((Chunks(16), Columns(16, 2)), True),
    ],
}  # fmt: skip


def drawn(batch, length, seed=0, groups=2, heads=4, width=8):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(batch, heads, length, width)] + 2 * [(batch, groups, length, width)]
    return [torch.randn(s, generator=generator, dtype=torch.float64).requires_grad_() for s in shapes]


def masked_softmax(query, key, value, seen, scale):
    """Return the attention under a boolean mask ``[..., N, M]``; zero for a query that sees nothing."""
    group = query.shape[1] // key.shape[1]
    key, value = (part.repeat_interleave(group, dim=1) for part in (key, value))
    scores = (query @ key.transpose(2, 3) * scale).masked_fill(~seen, -1e300)
    return torch.softmax(scores, -1).masked_fill(~seen, 0) @ value


def gradients(out, parts):
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=out.dtype)
    return torch.autograd.grad((out * weights).sum(), parts)


def masks(name, length):
    each = torch.stack([visible(pattern, length) for pattern in PATTERNS[name]])
    return each.expand(4, length, length)


@pytest.mark.parametrize("way", ["blocks", "dense"])
@pytest.mark.parametrize("name", PATTERNS)
def test_outputs_and_gradients(name, way):
    length, heads = 77, HeadPatterns.of(PATTERNS[name], 4)
    parts = drawn(2, length)
    out = attend(*parts, heads, 0.3, way=way)
    expected = masked_softmax(*parts, masks(name, length), 0.3)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-13)
    for found, right in zip(gradients(out, parts), gradients(expected, parts), strict=True):
        torch.testing.assert_close(found, right, rtol=0, atol=1e-13)


def test_the_log_sum_exp_is_that_of_the_scores_and_has_a_gradient():
    length, pattern = 70, PATTERNS["window"][0]
    query, key, value = parts = drawn(1, length, groups=4)
    (part,) = layouts((pattern,), (0,) * 4, length, 32, CPU)
    _, found = blocked_attention(query, key, value, part, 0.3)
    scores = (query @ key.transpose(2, 3) * 0.3).masked_fill(~visible(pattern, length), -torch.inf)
    expected = torch.logsumexp(scores, -1)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-13)
    for a, b in zip(gradients(found, parts[:2]), gradients(expected, parts[:2]), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-13)


def test_merged_parts_are_the_attention_over_their_union():
    query, key, value = drawn(1, 20, groups=4)
    halves = []
    for part in (slice(0, 7), slice(7, 20)):
        scores = query @ key[:, :, part].transpose(2, 3)
        halves.append((torch.softmax(scores, -1) @ value[:, :, part], torch.logsumexp(scores, -1)))
    nothing = (torch.zeros_like(query), torch.full(query.shape[:3], -torch.inf, dtype=torch.float64))
    whole = torch.softmax(query @ key.transpose(2, 3), -1) @ value
    for parts in (halves, [*halves, nothing], [nothing, *halves], halves[::-1]):
        torch.testing.assert_close(merge(parts), whole, rtol=0, atol=1e-13)
    assert torch.equal(merge(halves[:1]), halves[0][0])
    for count in (2, 3):
        assert torch.equal(merge([nothing] * count), nothing[0])


def test_merged_parts_have_gradients_where_queries_see_nothing_in_one_or_in_both():
    """Those of the softmax over the keys that are seen, and numbers everywhere."""
    query, key, value = parts = drawn(1, 12, groups=4)
    seen = torch.ones(12, 12, dtype=torch.bool)
    seen[0:4, :5], seen[3:6, 5:] = False, False  # row 3 sees nothing

    def part(columns):
        scores = (query @ key[:, :, columns].transpose(2, 3)).masked_fill(~seen[:, columns], -torch.inf)
        empty = ~seen[:, columns].any(-1)
        weights = torch.softmax(scores.masked_fill(empty[:, None], 0), -1).masked_fill(empty[:, None], 0)
        sums = torch.logsumexp(scores.masked_fill(empty[:, None], 0), -1).masked_fill(empty, -torch.inf)
        return weights @ value[:, :, columns], sums

    found = merge([part(slice(0, 5)), part(slice(5, 12))])
    expected = masked_softmax(*parts, seen, 1.0)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-13)
    for one, two in zip(gradients(found, parts), gradients(expected, parts), strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=1e-13)


# Segments of three rows of 40 places: what a batch looks like.
BATCHES = {
    "padding at the end": [[0] * 40, [0] * 33 + [-1] * 7, [0] * 20 + [-1] * 20],
    "padding at the beginning": [[0] * 40, [-1] * 7 + [0] * 33, [-1] * 20 + [0] * 20],
    "documents": [[0] * 25 + [1] * 15, [0] * 8 + [1] * 8 + [2] * 24, [0] * 40],
    "documents and padding": [[-1] * 3 + [0] * 22 + [1] * 15, [0] * 8 + [1] * 20 + [-1] * 12, [0] * 17 + [-1] * 23],
}


@pytest.mark.parametrize("way", ["blocks", "dense", "auto"])
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("name", PATTERNS)
def test_each_document_is_computed_as_it_would_be_alone(name, batch, way):
    heads, segments = HeadPatterns.of(PATTERNS[name], 4), torch.tensor(BATCHES[batch], dtype=torch.int32)
    parts = drawn(3, 40, seed=3)
    out = attend(*parts, heads, 0.3, Rows.of(segments), way=way)
    assert not out.transpose(1, 2)[segments < 0].any()
    for row in range(3):
        for document in range(int(segments[row].max()) + 1):
            at = (segments[row] == document).nonzero()[:, 0]
            alone = [part[row : row + 1, :, at] for part in parts]
            expected = masked_softmax(*alone, masks(name, len(at)), 0.3)
            torch.testing.assert_close(out[row : row + 1, :, at], expected, rtol=0, atol=1e-13)
    assert all(torch.isfinite(each).all() for each in gradients(out, parts))


@pytest.mark.parametrize("name", ["causal window", "strided", "fixed", "by head"])
def test_queries_behind_a_cache_see_what_they_would_without_one(name):
    heads, parts = HeadPatterns.of(PATTERNS[name], 4), drawn(2, 40)
    whole = attend(*parts, heads, 0.3)
    for count in (1, 3):
        step = attend(parts[0][:, :, -count:], *parts[1:], heads, 0.3)
        torch.testing.assert_close(step, whole[:, :, -count:], rtol=0, atol=1e-13)
    # The same with padding, and with room behind the last key, as in a static cache.
    segments = torch.zeros(2, 40, dtype=torch.int32)
    segments[0, :5] = -1
    segments[:, 36:] = -1
    rows = Rows.of(segments)
    whole = attend(*parts, heads, 0.3, rows)
    step = attend(parts[0][:, :, 34:36], *parts[1:], heads, 0.3, Rows.of(segments, offset=34))
    torch.testing.assert_close(step, whole[:, :, 34:36], rtol=0, atol=1e-13)


@pytest.mark.parametrize("kind", ["bool", "additive"])
def test_a_mask_of_the_caller_is_intersected_with_the_pattern(kind):
    heads, parts = HeadPatterns.of(PATTERNS["window"], 4), drawn(2, 30)
    allowed = torch.rand(2, 1, 30, 30, generator=torch.Generator().manual_seed(5)) < 0.6
    bias = torch.zeros(1) if kind == "bool" else torch.randn(2, 4, 30, 30, dtype=torch.float64)
    mask = allowed if kind == "bool" else bias.masked_fill(~allowed, torch.finfo(torch.float64).min)
    out = attend(*parts, heads, 0.3, None, mask)
    seen = visible(PATTERNS["window"][0], 30) & allowed
    query, key, value = (p if p.shape[1] == 4 else p.repeat_interleave(2, dim=1) for p in parts)
    scores = (query @ key.transpose(2, 3) * 0.3 + bias).masked_fill(~seen, -1e300)
    expected = torch.softmax(scores, -1).masked_fill(~seen, 0) @ value
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_blocks_are_as_accurate_as_the_dtype(dtype):
    heads = HeadPatterns.of(PATTERNS["fixed"], 4)
    parts = drawn(1, 100)
    exact = attend(*parts, heads, 0.3)
    found = attend(*(part.to(dtype) for part in parts), heads, 0.3, way="blocks")
    assert found.dtype == dtype
    assert float((found.double() - exact).abs().max().detach()) < 8 * torch.finfo(dtype).eps


def test_dropout_drops_weights_and_keeps_their_mean():
    heads, parts = HeadPatterns.of([Pattern((Band(50, 50),))], 4), drawn(1, 64)
    parts[2] = torch.ones_like(parts[2])
    torch.manual_seed(0)
    found = attend(*parts, heads, 0.3, dropout=0.5, way="blocks")
    assert found.std() > 0.01
    assert float(found.mean().detach()) == pytest.approx(1, abs=0.05)
