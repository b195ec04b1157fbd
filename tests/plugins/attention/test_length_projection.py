"""Attention over keys and values that are projected along their length, against its formula."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from hf_optim_plugins.attention._length_projection import (
    LengthProjection,
    interleaved,
    pooling,
    projected_attention,
)

HEADS, GROUPS, SLOTS, LENGTH, WIDTH = 4, 2, 3, 8, 5
SCALE = 0.4


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def inputs(tokens, batch=3):
    heads = (HEADS, GROUPS, GROUPS)
    return [drawn(batch, count, tokens, WIDTH, seed=n).requires_grad_() for n, count in enumerate(heads)]


def projection_of(sharing, start="random", slots=SLOTS):
    torch.manual_seed(4)
    return LengthProjection(GROUPS, slots, LENGTH, sharing, start, dtype=torch.float64)


def formula(q, k, v, e, f, valid, short):
    """Return the attention, a row, a head and a query at a time."""
    rows = []
    for b in range(len(q)):
        heads = []
        for h in range(HEADS):
            g = h // (HEADS // GROUPS)
            one, two = (weight[g if len(weight) > 1 else 0] for weight in (e, f))
            tokens = [j for j in range(q.shape[2]) if valid[b, j]]
            keys, values, counts = [], [], []
            for i in range(SLOTS):
                slot_key, slot_value = (
                    sum((w[i, j] * part[b, g, j] for j in tokens), torch.zeros(WIDTH, dtype=torch.float64))
                    for w, part in ((one, k), (two, v))
                )
                count = torch.tensor(1.0, dtype=torch.float64)
                if short == "weighted":
                    shares = [w[i, tokens].abs().sum() / w[i].abs().sum() for w in (one, two)]
                    slot_key, slot_value, count = slot_key / shares[0], slot_value / shares[1], shares[1]
                keys.append(slot_key)
                values.append(slot_value)
                counts.append(count)
            queries = []
            for t in range(q.shape[2]):
                weights = torch.stack([
                    n * (SCALE * key @ q[b, h, t]).exp() for n, key in zip(counts, keys, strict=True)
                ])  # fmt: skip
                queries.append((weights[:, None] * torch.stack(values)).sum(0) / weights.sum())
            heads.append(torch.stack(queries))
        rows.append(torch.stack(heads))
    return torch.stack(rows)


@pytest.mark.parametrize("short", ["weighted", "zero"])
@pytest.mark.parametrize("tokens", [LENGTH, 5])
@pytest.mark.parametrize("sharing", ["none", "headwise", "key_value"])
def test_outputs_and_gradients_are_those_of_the_formula(sharing, tokens, short):
    projection, given = projection_of(sharing), inputs(tokens)
    valid = torch.ones(3, tokens, dtype=torch.bool)
    valid[1, 3:], valid[2, :2] = False, False
    own = [projection.key] if projection.value is None else [projection.key, projection.value]
    found = projected_attention(*given, projection, valid, SCALE, short)
    second = own[-1]
    expected = formula(*given, own[0], second, valid, short)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    slope = drawn(*found.shape, seed=9)
    for one, other in zip(
        torch.autograd.grad(found, [*given, *own], slope), torch.autograd.grad(expected, [*given, *own], slope),
        strict=True,
    ):  # fmt: skip
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)
    assert len(own[0]) == (GROUPS if sharing == "none" else 1)


@pytest.mark.parametrize(
    ("start", "slots", "tokens"), [("pooling", LENGTH, LENGTH), ("pooling", LENGTH, 4), ("interleaved", 4, 4)]
)
@pytest.mark.parametrize("sharing", ["none", "headwise", "key_value", "layerwise"])
def test_as_many_slots_as_tokens_are_full_attention(sharing, start, slots, tokens):
    projection, (q, k, v) = projection_of(sharing, start, slots), inputs(tokens)
    expected = functional.scaled_dot_product_attention(q, k, v, scale=SCALE, enable_gqa=True)
    torch.testing.assert_close(projected_attention(q, k, v, projection, None, SCALE), expected, rtol=0, atol=1e-12)
    valid = torch.ones(3, tokens, dtype=torch.bool)
    valid[0, 2:] = False
    seen = valid[:, None, None].expand(-1, -1, tokens, -1)
    expected = functional.scaled_dot_product_attention(q, k, v, seen, scale=SCALE, enable_gqa=True)
    torch.testing.assert_close(projected_attention(q, k, v, projection, valid, SCALE), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("short", ["weighted", "zero"])
def test_the_content_of_padding_means_nothing(short):
    projection, (q, k, v) = projection_of("headwise"), inputs(6)
    valid = torch.ones(3, 6, dtype=torch.bool)
    valid[0, 4:] = False
    before = projected_attention(q, k, v, projection, valid, SCALE, short)
    k, v = (torch.where(valid[:, None, :, None], part, torch.inf) for part in (k, v))
    assert torch.equal(projected_attention(q, k, v, projection, valid, SCALE, short), before)
    alone = [part[:1, :, :4] for part in (q, k, v)]
    found = projected_attention(*alone, projection, None, SCALE, short)
    torch.testing.assert_close(found, before[:1, :, :4], rtol=0, atol=1e-12)


def test_a_row_of_all_tokens_is_the_same_in_both_kinds_of_short_rows():
    projection, given = projection_of("none"), inputs(LENGTH)
    valid = torch.ones(3, LENGTH, dtype=torch.bool)
    valid[2, 5:] = False
    one, other = (projected_attention(*given, projection, valid, SCALE, short) for short in ("weighted", "zero"))
    torch.testing.assert_close(one[:2], other[:2], rtol=0, atol=1e-12)
    assert (one[2] - other[2]).abs().max() > 1e-3


@pytest.mark.parametrize("short", ["weighted", "zero"])
def test_rows_without_tokens_are_zero_and_have_finite_gradients(short):
    projection, given = projection_of("headwise", "pooling"), inputs(6)
    valid = torch.ones(3, 6, dtype=torch.bool)
    valid[1], valid[2, 2:] = False, False
    found = projected_attention(*given, projection, valid, SCALE, short)
    assert torch.equal(found[1], torch.zeros_like(found[1]))
    gradients = torch.autograd.grad(found.square().sum(), [*given, projection.key, projection.value])
    assert all(torch.isfinite(gradient).all() for gradient in gradients)


def test_a_longer_row_is_refused():
    with pytest.raises(ValueError, match="at most 8 tokens, and got one of 9"):
        projected_attention(*inputs(9), projection_of("headwise"), None, SCALE)


@pytest.mark.parametrize("means", [pooling, interleaved])
def test_means_cover_a_row_once(means):
    for slots, length in ((3, 7), (4, 8), (5, 5), (1, 6)):
        weight = means(slots, length)
        assert torch.allclose(weight.sum(1), torch.ones(slots))
        assert ((weight > 0).sum(0) == 1).all()
        parts = (weight > 0).sum(1)
        assert parts.max() - parts.min() <= 1
    assert torch.equal(means(5, 5), torch.eye(5))


def test_what_means_are_of():
    assert pooling(2, 4).tolist() == [[0.5, 0.5, 0, 0], [0, 0, 0.5, 0.5]]
    assert interleaved(2, 4).tolist() == [[0.5, 0, 0.5, 0], [0, 0.5, 0, 0.5]]


def test_random_weights_have_the_variance_of_the_paper():
    torch.manual_seed(0)
    weight = LengthProjection(8, 16, 512, "none", "random").key.detach()
    assert weight.var() * 16 == pytest.approx(1, rel=0.02)
    assert weight.mean().abs() < 0.01
