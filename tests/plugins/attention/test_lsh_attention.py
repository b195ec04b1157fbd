"""LSH attention against loops over all pairs, written from the formulas of the paper."""

from __future__ import annotations

import math
from collections import namedtuple
from dataclasses import replace

import pytest
import torch
from transformers import ReformerConfig
from transformers.models.reformer.modeling_reformer import LSHSelfAttention

from hf_optim.toolkit.attention import lsh_chunks, lsh_flash, lsh_kernel
from hf_optim.toolkit.attention.lsh_chunks import (
    attention_behind,
    full_shared_attention,
    lsh_attention,
    unit_keys,
)
from hf_optim.toolkit.attention.lsh_hashing import draw_rotations, hash_vectors
from hf_optim.toolkit.attention.lsh_places import LshScheme, codes_of, with_padding

CHUNK = 5
SCHEMES = {
    "bucket": LshScheme("bucket", (4,), 1, CHUNK),
    "bucket_rounds": LshScheme("bucket", (2, 4), 3, CHUNK),
    "paper": LshScheme("paper", (4,), 1, CHUNK),
    "paper_rounds": LshScheme("paper", (6,), 3, CHUNK, before=2),
    "trax": LshScheme("trax", (4,), 1, CHUNK),
    "trax_rounds": LshScheme("trax", (4,), 3, CHUNK),
}
BOTH_SIDES = {name: replace(scheme, after=1) for name, scheme in SCHEMES.items()}


def numbers(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def inputs(count, heads=2, shared=2, width=6, rows=2, seed=0):
    return numbers(rows, heads, count, width, seed=seed), numbers(rows, heads // shared, count, 3, seed=seed + 1)


def buckets_for(query, scheme, seed=7):
    rotations = draw_rotations(query.shape[1], query.shape[3], scheme.rounds, scheme.factors, seed)
    return hash_vectors(query, rotations, scheme.factors)


def places_of(buckets, scheme, causal):
    """Return the chunk of each token of one row and round: ``(bucket, chunk)``, or ``(0, chunk)`` where all are cut."""
    count = len(buckets)
    if scheme.scheme != "bucket":
        order = sorted(range(count), key=lambda j: (buckets[j], j))
        return {j: (0, place // scheme.chunk) for place, j in enumerate(order)}
    if not causal and count <= scheme.chunk:
        buckets = [0] * count
    return {j: (buckets[j], sum(b == buckets[j] for b in buckets[:j]) // scheme.chunk) for j in range(count)}


def multiplicity(buckets, scheme, causal):
    """Return ``N_ij`` of one row and head as lists; ``buckets`` are those of each round."""
    count, rounds = len(buckets[0]), len(buckets)
    chunks = -(-count // scheme.chunk)
    where = [places_of(each, scheme, causal) for each in buckets]
    times = [[0] * count for _ in range(count)]
    for i in range(count):
        for j in range(count):
            if causal and j > i:
                continue
            for r in range(rounds):
                bucket, chunk = where[r][i]
                for step in range(-scheme.before, scheme.after + 1):
                    if scheme.scheme != "trax":
                        times[i][j] += where[r][j] == (bucket, chunk + step)
                        continue
                    ring = (r * chunks + chunk + step) % (rounds * chunks)
                    times[i][j] += where[ring // chunks][j] == (0, ring % chunks)
            if scheme.scheme != "trax":
                times[i][j] = min(times[i][j], 1)
            if scheme.scheme == "bucket" and causal and i < scheme.chunk:
                times[i][j] = 1
    return times


def oracle(query, value, buckets, scheme, causal):
    """Return the attention of ``[H, n, D]``, pair by pair."""
    heads, count, width = query.shape
    rows = []
    for h in range(heads):
        times = multiplicity(buckets[h].tolist(), scheme, causal)
        keys = [q / torch.sqrt((q * q).mean() + 1e-6) / math.sqrt(width) for q in query[h]]
        for i in range(count):
            others = [j for j in range(count) if j != i and times[i][j]] or [i]
            weight = torch.stack([times[i][j] * torch.exp(query[h, i] @ keys[j]) for j in others])
            values = torch.stack([value[h // (heads // len(value)), j] for j in others])
            rows.append((weight[:, None] * values).sum(0) / weight.sum())
    return torch.stack(rows).unflatten(0, (heads, count))


@pytest.mark.many
@pytest.mark.parametrize("flash", [True, False])
@pytest.mark.parametrize(("causal", "after"), [(True, 0), (False, 0), (False, 1)])
@pytest.mark.parametrize("name", SCHEMES)
def test_outputs_and_gradients_are_those_of_the_formula(name, causal, after, flash, monkeypatch):
    scheme = replace(SCHEMES[name], after=after)
    if flash:
        monkeypatch.setattr(lsh_flash, "AT_ONCE", 1)  # each head by itself
    else:
        monkeypatch.setattr(lsh_chunks, "has_flash", lambda query, value: False)
    query, value = inputs(23, rows=1, width=3 if flash else 6)
    query, value = query.requires_grad_(), value.requires_grad_()
    buckets = buckets_for(query, scheme)
    found = lsh_attention(query, value, buckets, scheme, causal)
    expected = oracle(query[0], value[0], buckets[0], scheme, causal)[None]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    weight = numbers(*found.shape, seed=9)
    one = torch.autograd.grad((found * weight).sum(), [query, value])
    other = torch.autograd.grad((expected * weight).sum(), [query, value])
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("name", SCHEMES)
def test_rows_of_a_padded_batch_are_those_alone(name, causal):
    scheme = SCHEMES[name] if causal else BOTH_SIDES[name]
    query, value = inputs(24, rows=4)
    lengths = torch.tensor([24, 13, 5, 1])
    buckets = buckets_for(query, scheme)
    found = lsh_attention(query, value, buckets, scheme, causal, lengths)
    for row, length in enumerate(lengths.tolist()):
        own = slice(row, row + 1), slice(None), slice(length)
        alone = lsh_attention(query[own], value[own], buckets[own[0], :, :, :length], scheme, causal)
        torch.testing.assert_close(found[own], alone, rtol=0, atol=1e-11)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("name", SCHEMES)
def test_a_chunk_of_the_whole_row_is_full_shared_attention_to_the_bit(name, causal):
    scheme = replace(SCHEMES[name], chunk=12)
    query, value = (part.float() for part in inputs(12))
    full = full_shared_attention(query, value, None, causal)
    assert torch.equal(lsh_attention(query, value, buckets_for(query, scheme), scheme, causal), full)
    keys = unit_keys(query)
    own = torch.eye(12, dtype=torch.bool)
    scores = (query @ keys.mT).masked_fill(own, -1e5)
    if causal:
        scores = scores.masked_fill(torch.ones(12, 12, dtype=torch.bool).triu(1), -1e9)
    torch.testing.assert_close(full, scores.softmax(-1) @ value.repeat_interleave(2, 1), rtol=0, atol=1e-6)
    torch.testing.assert_close(keys.norm(dim=-1), torch.ones(2, 2, 12), rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["bucket", "paper"])
def test_one_bucket_and_chunks_that_reach_all_are_full_shared_attention(name):
    scheme = LshScheme(name, (1,), 2, 6, before=3)
    query, value = inputs(24)
    found = lsh_attention(query, value, buckets_for(query, scheme), scheme, True)
    torch.testing.assert_close(found, full_shared_attention(query, value, None, True), rtol=0, atol=1e-12)


def changed_outputs(scheme, count=40):
    """Return for each token that is changed whether an output before it changes, by more than rounding."""
    query, value = inputs(count, rows=1)
    before = lsh_attention(query, value, buckets_for(query, scheme), scheme, True)
    for place in range(count):
        other = query.clone()
        other[:, :, place] = -3 * other[:, :, place]
        after = lsh_attention(other, value, buckets_for(other, scheme), scheme, True)
        yield not torch.allclose(before[:, :, :place], after[:, :, :place], rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["bucket", "bucket_rounds"])
def test_buckets_cut_by_themselves_see_nothing_of_the_future(name):
    assert not any(changed_outputs(SCHEMES[name]))


@pytest.mark.parametrize("name", ["paper", "trax"])
def test_chunks_over_all_buckets_do_and_that_is_known(name):
    assert any(changed_outputs(SCHEMES[name]))


@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("name", SCHEMES)
def test_the_last_queries_over_held_keys_are_those_of_the_whole_row(name, count):
    scheme = SCHEMES[name]
    query, value = inputs(33, rows=2)
    lengths = torch.tensor([33, 21])
    whole = lsh_attention(query, value, buckets_for(query, scheme), scheme, True, lengths)
    # As a cache holds them: row 1 has its last tokens at the end, behind padding.
    order = torch.arange(33).repeat(2, 1)
    order[1] = torch.cat([torch.arange(21 - count), torch.arange(21, 33), torch.arange(21 - count, 21)])
    places = torch.where(order < lengths[:, None], order, -1)
    rows = torch.arange(2)[:, None]
    held, values = (part.transpose(1, 2)[rows, order].transpose(1, 2) for part in (query, value))
    codes = codes_of(with_padding(buckets_for(query, scheme), lengths, scheme, True), scheme)
    codes = codes.permute(0, 3, 1, 2)[rows, order].permute(0, 2, 3, 1)
    last = held[:, :, -count:]
    found = attention_behind(last, places[:, -count:], unit_keys(held), values, codes, places, lengths, scheme)
    expected = torch.stack([whole[row, :, n - count : n] for row, n in enumerate(lengths.tolist())])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_keys_that_the_last_query_does_not_see_change_nothing():
    scheme = replace(SCHEMES["bucket"], chunk=2)
    query, value = inputs(40, rows=1)
    buckets = buckets_for(query, scheme)
    codes, keys = codes_of(buckets, scheme), unit_keys(query)
    seen = torch.tensor([[times > 0 for times in multiplicity(b.tolist(), scheme, True)[39]] for b in buckets[0]])
    assert seen.sum(-1).max() <= scheme.most_seen < 20
    keys = torch.where(seen[None, ..., None], keys, 50 * numbers(*keys.shape, seed=5))
    place, lengths = torch.arange(40)[None], torch.tensor([40])
    found = attention_behind(query[:, :, -1:], place[:, -1:], keys, value, codes, place, lengths, scheme)
    expected = lsh_attention(query, value, buckets, scheme, True)[:, :, -1:]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", SCHEMES)
def test_half_precision_is_near_and_finite(name, dtype):
    query, value = inputs(23)
    query[:, :, 3:9] *= 300  # scores beyond what a softmax in float16 could hold apart from -1e5
    buckets = buckets_for(query, SCHEMES[name])
    exact = lsh_attention(query.to(dtype).double(), value.to(dtype).double(), buckets, SCHEMES[name], True)
    found = lsh_attention(query.to(dtype), value.to(dtype), buckets, SCHEMES[name], True)
    plain = [i for i in range(23) if not 3 <= i < 9]
    torch.testing.assert_close(found[:, :, plain].double(), exact[:, :, plain], rtol=0, atol=0.02)
    assert found.isfinite().all()


def test_weights_are_dropped_at_random_and_kept_in_the_mean():
    scheme = SCHEMES["bucket_rounds"]
    query, value = inputs(23, rows=1)
    query, value = query.expand(400, -1, -1, -1), value.expand(400, -1, -1, -1)
    buckets = buckets_for(query, scheme)
    torch.manual_seed(0)
    found = lsh_attention(query, value, buckets, scheme, True, None, 0.2)
    assert not torch.equal(found[0], found[1])
    expected = lsh_attention(query[:1], value[:1], buckets[:1], scheme, True)[0]
    torch.testing.assert_close(found.mean(0), expected, rtol=0, atol=0.25)


class Kernel:
    """Stands for the module of the installed kernel, as ``hf_optim_kernels.bucket_attention.op`` specifies it."""

    Buckets = namedtuple("Buckets", "width_q width_k before after wrap causal no_self gathered")

    @staticmethod
    def bucket_attention(query, key, value, places_q, places_k, buckets, scale):
        assert places_q.dtype == torch.int32
        assert (buckets.no_self, buckets.gathered, scale) == (True, True, 1.0)
        chunk = torch.arange(query.shape[2]) // buckets.width_q
        apart = chunk[None, :] - chunk[:, None]
        if buckets.wrap:
            apart = (apart + buckets.before) % (int(chunk[-1]) + 1) - buckets.before
        one, other = places_q[..., None], places_k[:, :, None]
        seen = (apart >= -buckets.before) & (apart <= buckets.after) & (one >= 0) & (other >= 0)
        seen = seen & (other <= one) if buckets.causal else seen
        scores = query @ key.mT - 1e5 * (one == other)
        scores = scores.masked_fill(~seen, -1e30)
        return scores.softmax(-1) @ value, scores.logsumexp(-1)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("name", ["trax", "trax_rounds"])
def test_the_kernel_gets_what_it_computes(name, causal, monkeypatch):
    scheme = replace(SCHEMES[name], after=0 if causal else 1)
    query, value = inputs(23)
    buckets, calls = buckets_for(query, scheme), []
    expected = lsh_attention(query, value, buckets, scheme, causal)
    monkeypatch.setattr(lsh_chunks, "bucket_kernel", lambda *given: calls.append(given) or Kernel)
    found = lsh_attention(query, value, buckets, scheme, causal)
    assert calls
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("name", ["bucket", "bucket_rounds", "paper", "paper_rounds"])
def test_the_kernels_of_runs_compute_the_same(name, causal, padded, monkeypatch):
    """Outputs and gradients of the operators, whose specification runs on a CPU in float64."""
    scheme = replace(SCHEMES[name], after=0 if causal else 1)
    lengths = torch.tensor([23, 16]) if padded else None
    results = []
    for devices in ((), ("cpu",)):
        monkeypatch.setattr(lsh_kernel, "LSH_KERNEL_DEVICES", devices)
        monkeypatch.setattr("hf_optim_kernels.run_attention.op.unsupported", lambda *given: None)
        query, value = (each.requires_grad_() for each in inputs(23))
        buckets = buckets_for(query, scheme)
        out = lsh_attention(query, value, buckets, scheme, causal, lengths)
        assert ("RunAttention" in str(out.grad_fn) or "run_attention" in str(out.grad_fn)) == bool(devices)
        slope = numbers(*out.shape, seed=8)
        if padded:
            slope[1, :, 16:] = 0
        results.append(
            (out if not padded else out * (slope != 0), *torch.autograd.grad((out * slope).sum(), (query, value)))
        )
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-9)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("rounds", [1, 3])
def test_the_scheme_of_the_authors_is_that_of_transformers(causal, rounds):
    torch.manual_seed(0)
    about = {"before": 1, "after": 0 if causal else 1}
    config = ReformerConfig(
        attn_layers=["lsh"], hidden_size=16, num_attention_heads=2, attention_head_size=8, num_hashes=rounds,
        num_buckets=[2, 4], lsh_attn_chunk_length=8, lsh_num_chunks_before=1, lsh_num_chunks_after=about["after"],
        is_decoder=causal, hash_seed=11, lsh_attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    stock = LSHSelfAttention(config, 0).double().eval()
    hidden = numbers(2, 40, 16, seed=3)
    mask = torch.ones(2, 40)
    mask[1, 35:] = 0  # as many chunks are filled as without it: transformers' ring is that of the whole batch
    with torch.no_grad():
        expected = stock(hidden, attention_mask=mask)
        query, value = (layer(hidden).unflatten(-1, (2, 8)).transpose(1, 2) for layer in (stock.query_key, stock.value))
    scheme = LshScheme("trax", (2, 4), rounds, 8, **about)
    torch.manual_seed(11)
    drawn = torch.randn(2, 8, rounds, 3, dtype=torch.float64)
    buckets = hash_vectors(query, (drawn * 2**18).round().int(), (2, 4))
    own = expected.buckets - torch.arange(rounds)[:, None] * 9  # eight, and that of padding
    valid = mask.bool()
    assert torch.equal(own.transpose(1, 3)[valid], buckets.transpose(1, 3)[valid])
    found = lsh_attention(query, value, buckets, scheme, causal, torch.tensor([40, 35]))
    wanted = expected.hidden_states.unflatten(-1, (2, 8)).transpose(1, 2)
    rows = valid[:, None, :, None].expand_as(found)
    torch.testing.assert_close(found[rows], wanted[rows], rtol=0, atol=1e-10)
