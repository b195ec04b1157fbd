"""hf_optim::hash_vectors, nearest_centroid, sorted_runs, runs_of_last: kernels and specification, one by one."""

from __future__ import annotations

import pytest
import torch
from interpreting import EVERYWHERE, on_triton

from hf_optim.toolkit.attention.lsh_hashing import draw_rotations, hash_vectors
from hf_optim_kernels.bucket_order import naive, op
from hf_optim_kernels.bucket_order.op import Cut

FACTORS = {"one": (16,), "two": (8, 6), "many": (128,)}
CUTS = {
    "bucket-causal": Cut(8, 16, 1, 0, False, True, 100, 16),
    "bucket": Cut(8, 16, 1, 1, False, False, 100),
    "whole": Cut(8, 16, 2, 1, True),
    "one-bucket": Cut(1, 20, 1, 0, False, True, 100),
}


def vectors(dtype=torch.float32):
    random = torch.Generator().manual_seed(0)
    drawn = torch.randn(2, 2, 70, 20, generator=random).to(dtype)
    drawn[0, 0, 3] = 0
    return drawn


def drawn_buckets(count, heads=2, rounds=2, n=300, padding=7):
    random = torch.Generator().manual_seed(1)
    drawn = torch.randint(0, count, (2, heads, rounds, n), generator=random).short()
    drawn[1, ..., n - padding :] = count
    return drawn


@pytest.mark.parametrize("device", EVERYWHERE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", FACTORS)
def test_hashing_is_exact(name, dtype, device):
    """The same buckets as the technique computes in float64, to the last vector."""
    x, factors = vectors(dtype), FACTORS[name]
    rotations = draw_rotations(2, 20, 3, factors, seed=5)
    found = op.hash_vectors(x.to(device), rotations.to(device), factors)
    assert found.dtype == torch.int16
    assert torch.equal(found.cpu().long(), hash_vectors(x, rotations, factors))
    assert len(found.unique()) > len(factors)


@pytest.mark.parametrize("device", EVERYWHERE)
def test_the_nearest_centroid(device):
    random = torch.Generator().manual_seed(2)
    x, centroids = torch.randn(2, 4, 70, 20, generator=random), torch.randn(2, 21, 20, generator=random)
    found = op.nearest(x.to(device), centroids.to(device)).cpu()
    near = torch.stack([x[:, h].double() @ centroids[h // 2].double().mT for h in range(4)], 1)
    assert torch.equal(found.long(), near.argmax(-1))
    assert torch.equal(naive.nearest(x, centroids), found)


def places_one_by_one(row, cut):
    """Tokens in order, and for each place which places its query sees, token by token."""
    n = len(row)
    order = sorted((t for t in range(n) if row[t] < cut.buckets), key=lambda t: (row[t], t))
    begin = {}
    for p, t in enumerate(order):
        begin.setdefault(0 if cut.whole else row[t], p)
    codes = {}
    for p, t in enumerate(order):
        bucket = 0 if cut.whole else row[t]
        codes[t] = bucket * cut.step + (p - begin[bucket]) // cut.chunk
    seen = {}
    for p, t in enumerate(order):
        same = [q for q, o in enumerate(order) if cut.whole or row[o] == row[t]]
        near = [q for q in same if -cut.after <= codes[t] - codes[order[q]] <= cut.before]
        seen[p] = [] if t < cut.lonely else [q for q in near if q <= p or not cut.causal]
    return order, codes, seen


@pytest.mark.parametrize("device", EVERYWHERE)
@pytest.mark.parametrize("name", CUTS)
def test_runs_are_what_is_seen_one_by_one(name, device):
    cut = CUTS[name]
    buckets = drawn_buckets(cut.buckets)
    runs = op.sorted_runs(buckets.to(device), cut)
    order, low, high, first, last, codes = (each.cpu() for each in runs)
    for b, h, r in ((0, 0, 0), (1, 1, 1)):
        tokens, of_token, seen = places_one_by_one(buckets[b, h, r].tolist(), cut)
        assert order[b, h, r].tolist() == tokens + [-1] * (300 - len(tokens))
        for p, t in enumerate(tokens):
            assert codes[b, h, r, t] == of_token[t]
            assert list(range(low[b, h, r, p], high[b, h, r, p] + 1)) == seen[p]
            for key in seen[p]:
                assert first[b, h, r, key] <= p <= last[b, h, r, key]
        hidden = [t for t in range(300) if t not in of_token]
        assert (codes[b, h, r, hidden] == op.NOWHERE).all()


@pytest.mark.parametrize("device", EVERYWHERE)
def test_the_last_keys_of_a_cluster_one_by_one(device):
    asked, held = drawn_buckets(6, heads=4, rounds=1)[:, :, 0], drawn_buckets(6, rounds=1, n=300)[:, :, 0].flip(1)
    order_q, order_k, low, high = (each.cpu() for each in op.runs_of_last(asked.to(device), held.to(device), 6, 20))
    for b, h in ((0, 1), (1, 2)):
        queries, keys = asked[b, h].tolist(), held[b, h // 2].tolist()
        sorted_keys = [t for t in order_k[b, h // 2, 0].tolist() if t >= 0]
        assert sorted_keys == sorted((t for t in range(300) if keys[t] < 6), key=lambda t: (keys[t], t))
        tokens = [t for t in order_q[b, h, 0].tolist() if t >= 0]
        assert tokens == sorted((t for t in range(300) if queries[t] < 6), key=lambda t: (queries[t], t))
        for p, t in enumerate(tokens):
            seen = [sorted_keys[q] for q in range(low[b, h, 0, p], high[b, h, 0, p] + 1)]
            assert seen == [s for s in range(t) if keys[s] == queries[t]][-20:]


@on_triton
def test_many_buckets_and_blocks(device):
    """More buckets than a tile of the sums has, and more tokens than a block."""
    random = torch.Generator().manual_seed(3)
    buckets = torch.randint(0, 500, (1, 1, 1, 700), generator=random).short()
    cut = Cut(500, 2, 1, 0, False, True, 1000)
    found, right = op.sorted_runs(buckets.to(device), cut), naive.sorted_runs(buckets, cut)
    assert all(torch.equal(one.cpu(), other) for one, other in zip(found, right, strict=True))


def test_what_is_refused():
    x, rotations = vectors(), draw_rotations(2, 20, 3, (16,), 5)
    buckets = drawn_buckets(8)
    for match, call in (
        ("rotations", lambda: op.hash_vectors(x, rotations[:, :4], (16,))),
        ("int32 rotations", lambda: op.hash_vectors(x, rotations.long(), (16,))),
        ("even factors", lambda: op.hash_vectors(x, rotations[..., :7], (5, 10))),
        (
            "at most 16384 buckets",
            lambda: op.hash_vectors(x, torch.zeros(2, 20, 1, 200).int(), (200, 200)),
        ),
        (r"centroids \[G, C, 20\]", lambda: op.nearest(x, torch.zeros(2, 4, 8))),
        ("int16 or int32", lambda: op.sorted_runs(buckets.long(), CUTS["whole"])),
        ("chunk=0", lambda: op.sorted_runs(buckets, CUTS["whole"]._replace(chunk=0))),
        ("buckets", lambda: op.runs_of_last(buckets[:, :, 0], buckets[:, :, 0, :9], 8, 4)),
        ("a width from 0", lambda: op.runs_of_last(buckets[:, :, 0], buckets[:, :, 0], 8, -1)),
    ):
        with pytest.raises(ValueError, match=match):
            call()
    assert "float64" in op.unsupported(x.double())
    assert "200 entries" in op.unsupported(torch.zeros(1, 1, 1, 200))
    assert "3 hashes" in op.unsupported(x, 12, 3)
    assert op.unsupported(x, 64, 2) is None


def test_the_operators_pass_pytorchs_own_checks():
    x, rotations, buckets = vectors(), draw_rotations(2, 20, 3, (16,), 5), drawn_buckets(8)
    torch.library.opcheck(op._hash, (x, rotations, [16]))
    torch.library.opcheck(op._nearest, (x, torch.randn(2, 4, 20)))
    torch.library.opcheck(op._sort, (buckets, list(map(int, CUTS["bucket"]))))
    torch.library.opcheck(op._last, (buckets[:, :, 0], buckets[:, :1, 0], 8, 4))
