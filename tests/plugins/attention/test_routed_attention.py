"""Attention within clusters against loops over queries, and online k-means against its formula."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn import functional

from hf_optim_plugins.attention import _query_blocks
from hf_optim_plugins.attention._centroids import Centroids, directions, fitted
from hf_optim_plugins.attention._query_blocks import in_blocks, rows_of
from hf_optim_plugins.attention._routed_attention import (
    kept_of_clusters,
    last_of_clusters,
    near_tokens,
    one_step,
    top_of_clusters,
)

ROWS, HEADS, GROUPS, LENGTH, WIDTH, CLUSTERS = 2, 4, 2, 29, 6, 3
SCALE = 0.4
SHORT = torch.tensor([29, 17])


def attend(query, key, value, seen):
    """Return the softmax attention of one query to the keys at the places ``seen``."""
    return (key[seen] @ query * SCALE).softmax(0) @ value[seen]


def oracle_last(query, key, value, cluster, lengths, width):
    out = torch.zeros_like(query)
    for r in range(ROWS):
        for h in range(HEADS):
            g = h // (HEADS // GROUPS)
            for i in range(int(lengths[r])):
                same = [j for j in range(i) if cluster[1][r, g, j] == cluster[0][r, h, i]]
                seen = [*same[max(0, len(same) - width + 1) :], i]
                out[r, h, i] = attend(query[r, h, i], key[r, g], value[r, g], seen)
    return out


def oracle_top(query, key, value, near, lengths, width, causal, nearest):
    out = torch.zeros_like(query)
    for r in range(ROWS):
        tokens = range(int(lengths[r]))
        for h in range(HEADS):
            g = h // (HEADS // GROUPS)
            found = {i: [] for i in tokens}
            members = []
            for c in range(CLUSTERS):
                asked = sorted(tokens, key=lambda i, c=c, r=r, h=h: -float(near[0][r, h, c, i]))[:width]
                held = sorted(tokens, key=lambda j, c=c, r=r, g=g: -float(near[1][r, g, c, j]))[:width]
                members.append(asked if causal else held)
                for i in asked:
                    seen = [j for j in members[c] if j <= i or not causal]
                    found[i].append(attend(query[r, h, i], key[r, g], value[r, g], seen))
            for i in tokens:
                if found[i]:
                    out[r, h, i] = sum(found[i]) / len(found[i])
                elif nearest:
                    seen = [j for j in members[int(near[0][r, h, :, i].argmax())] if j <= i or not causal]
                    if seen:
                        out[r, h, i] = attend(query[r, h, i], key[r, g], value[r, g], seen)
    return out


def inputs(seed):
    generator = torch.Generator().manual_seed(seed)
    sizes = (HEADS, GROUPS, GROUPS)
    return [
        torch.randn(ROWS, n, LENGTH, WIDTH, generator=generator, dtype=torch.float64).requires_grad_() for n in sizes
    ]


def clusters_of(seed):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, CLUSTERS, (ROWS, n, LENGTH), generator=generator) for n in (HEADS, GROUPS)]


def valid_of(lengths):
    return None if lengths is None else torch.arange(LENGTH) < lengths[:, None]


def require_equal(found, expected, leaves):
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    weights = torch.randn(found.shape, generator=torch.Generator().manual_seed(9), dtype=found.dtype)
    for one, other in zip(
        torch.autograd.grad((found * weights).sum(), leaves),
        torch.autograd.grad((expected * weights).sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


@pytest.mark.many
@pytest.mark.parametrize("lengths", [None, SHORT])
@pytest.mark.parametrize("width", [1, 2, 6, 2**30])
def test_the_last_keys_of_a_cluster_are_those_of_the_oracle(width, lengths):
    leaves, cluster, valid = inputs(0), clusters_of(1), valid_of(lengths)
    found = last_of_clusters(*leaves, cluster, valid, width, CLUSTERS, SCALE)
    counts = torch.full((ROWS,), LENGTH) if lengths is None else lengths
    require_equal(found, oracle_last(*leaves, cluster, counts, width), leaves)


def test_blocks_are_computed_a_few_at_a_time(monkeypatch):
    leaves, cluster = inputs(0), clusters_of(1)
    near = [part[..., :CLUSTERS].transpose(2, 3) for part in inputs(7)[:2]]
    whole = last_of_clusters(*leaves, cluster, None, 6, CLUSTERS, SCALE)
    top = top_of_clusters(*leaves, near, None, 3, SCALE, nearest=True)
    monkeypatch.setattr(_query_blocks, "SCORES", 1)
    assert torch.equal(last_of_clusters(*leaves, cluster, None, 6, CLUSTERS, SCALE), whole)
    assert torch.equal(top_of_clusters(*leaves, near, None, 3, SCALE, nearest=True), top)


@pytest.mark.many
@pytest.mark.parametrize("lengths", [None, SHORT])
@pytest.mark.parametrize("width", [1, 6, 40])
def test_parts_of_a_row_after_what_was_kept_are_the_row_in_one(width, lengths):
    query, key, value = (part.detach() for part in inputs(2))
    asked, held = clusters_of(3)
    whole = last_of_clusters(query, key, value, (asked, held), valid_of(lengths), width, CLUSTERS, SCALE)
    kept, found, begin = None, [], 0
    for count in (1, 9, 1, 1, 17):
        part = slice(begin, begin + count)
        begin += count
        valid = valid_of(lengths)
        valid = None if valid is None or bool(valid[:, part].all()) else valid[:, part]
        q, k, v, a, h = (each[:, :, part] for each in (query, key, value, asked, held))
        if count == 1 and kept is not None and valid is None:
            found.append(one_step(q, k, v, a, kept, SCALE))
        else:
            found.append(last_of_clusters(q, k, v, (a, h), valid, width, CLUSTERS, SCALE, earlier=kept))
        kept = kept_of_clusters(k, v, h, valid, width, CLUSTERS, kept)
        assert kept[0].shape == (ROWS, GROUPS, CLUSTERS, min(width - 1, begin), WIDTH)
    torch.testing.assert_close(torch.cat(found, 2), whole, rtol=0, atol=1e-12)


@pytest.mark.many
@pytest.mark.parametrize("lengths", [None, SHORT])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("nearest", [False, True])
@pytest.mark.parametrize("width", [2, 6, 40])
def test_the_top_tokens_of_a_cluster_are_those_of_the_oracle(width, nearest, causal, lengths):
    leaves = inputs(4)
    generator = torch.Generator().manual_seed(5)
    near = [torch.randn(ROWS, n, CLUSTERS, LENGTH, generator=generator, dtype=torch.float64) for n in (HEADS, GROUPS)]
    found = top_of_clusters(*leaves, near, valid_of(lengths), width, SCALE, causal=causal, nearest=nearest)
    counts = torch.full((ROWS,), LENGTH) if lengths is None else lengths
    require_equal(found, oracle_top(*leaves, near, counts, width, causal, nearest), leaves)


@pytest.mark.many
@pytest.mark.parametrize("lengths", [None, SHORT])
@pytest.mark.parametrize("width", [1, 5, 20, 2**30])
def test_near_tokens_are_those_of_the_oracle(width, lengths):
    leaves, valid = inputs(6), valid_of(lengths)
    query, key, value = leaves
    expected = torch.zeros_like(query)
    for r, count in enumerate([LENGTH, LENGTH] if lengths is None else lengths.tolist()):
        for h in range(HEADS):
            g = h // (HEADS // GROUPS)
            for i in range(count):
                seen = [j for j in range(count) if abs(i - j) < width]
                expected[r, h, i] = attend(query[r, h, i], key[r, g], value[r, g], seen)
    found = near_tokens(*leaves, valid, width, SCALE)
    require_equal(found if valid is None else found * valid[:, None, :, None], expected, leaves)


def test_the_number_of_blocks_is_bounded():
    group = torch.randint(-1, 8, (301,), generator=torch.Generator().manual_seed(0))
    table, run = in_blocks(group, 16, 7)  # 7 and -1 are of no group
    assert len(table) <= 301 // 16 + 7
    for block, own in zip(table.tolist(), run.tolist(), strict=True):
        assert all(group[item] == own for item in block if item >= 0)
    places = [item for item in table.flatten().tolist() if item >= 0]
    assert sorted(places) == [i for i, g in enumerate(group.tolist()) if 0 <= g < 7]


# -- centroids --------------------------------------------------------------------------------------------------------
def points_of(seed, count=64, heads=2, width=5):
    made = torch.randn(heads, count, width, generator=torch.Generator().manual_seed(seed))
    return functional.normalize(made, dim=-1)


@pytest.mark.parametrize("normalize", ["l2", "layer_norm"])
def test_directions_have_unit_norm(normalize):
    part = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0)).double() * 3 + 1
    found = directions(part, normalize)
    normed = functional.layer_norm(part, (8,), eps=0) if normalize == "layer_norm" else part
    torch.testing.assert_close(found, normed / normed.norm(dim=-1, keepdim=True), rtol=0, atol=1e-12)
    assert directions(part.half(), normalize).dtype == torch.float32


def test_k_means_finds_planted_clusters():
    generator = torch.Generator().manual_seed(0)
    axes = torch.eye(5)[:4]
    planted = functional.normalize(axes.repeat(50, 1) + 0.05 * torch.randn(200, 5, generator=generator), dim=-1)
    close = [(fitted(planted[None], 4, seed)[0] @ axes.T).amax(0).min() for seed in range(4)]
    assert max(close) > 0.99  # from at least one of the starts
    assert torch.equal(fitted(planted[None], 4, 1), fitted(planted[None], 4, 1))
    assert not torch.equal(fitted(planted[None], 4, 1), fitted(planted[None], 4, 2))


def test_fewer_points_than_clusters_leave_random_directions():
    points = points_of(0, count=3)
    found = fitted(points, 8, 0)
    torch.testing.assert_close(found.norm(dim=-1), torch.ones(2, 8))
    assert ((points @ found.transpose(1, 2)).amax(-1) > 0.999).all()


def test_the_moving_average_is_that_of_the_means():
    centroids = Centroids(2, 3, 5, 0.9, 0).train()
    centroids.set(fitted(points_of(0), 3, 0))
    expected = centroids.weight.clone().double()
    batches = [points_of(seed) for seed in (1, 2, 3)]
    for batch in batches:
        centroids.observe(batch, None, False)
        for g in range(2):
            own = (batch[g].double() @ expected[g].T).argmax(-1)
            for c in own.unique():
                mean = batch[g][own == c].double().mean(0)
                expected[g, c] = functional.normalize(0.9 * expected[g, c] + 0.1 * mean, dim=0)
    state = centroids.state_dict()  # takes the last batch in
    torch.testing.assert_close(state["weight"].double(), expected, rtol=0, atol=1e-6)
    assert int(state["fits"]) == 4


def test_padding_is_not_learned_from():
    valid = torch.rand(2, 64, generator=torch.Generator().manual_seed(3)) < 0.5
    made = []
    for noise in (0.0, 5.0):
        centroids = Centroids(2, 3, 5, 0.5, 0).train()
        centroids.set(fitted(points_of(0), 3, 0))
        batch = points_of(1)
        batch = torch.where(valid[..., None], batch, functional.normalize(batch + noise, dim=-1))
        centroids.observe(batch, valid, True)
        made.append((centroids.commitment, centroids.state_dict()["weight"]))
    assert torch.equal(made[0][0], made[1][0])
    torch.testing.assert_close(made[0][1], made[1][1])


def test_an_empty_cluster_keeps_its_centroid():
    centroids = Centroids(1, 2, 3, 0.5, 0).train()
    centroids.set(torch.tensor([[[1.0, 0, 0], [-1.0, 0, 0]]]))
    centroids.observe(torch.tensor([[[0.8, 0.6, 0]]]), None, False)
    found = centroids.state_dict()["weight"][0]
    torch.testing.assert_close(found[0], functional.normalize(torch.tensor([1.8, 0.6, 0]), dim=0))
    assert torch.equal(found[1], torch.tensor([-1.0, 0, 0]))


def test_centroids_learn_in_training_alone():
    centroids = Centroids(2, 3, 5, 0.5, 0).eval()
    before = centroids.weight.clone()
    centroids.observe(points_of(1), None, True)
    assert torch.equal(centroids.state_dict()["weight"], before)
    assert centroids.commitment is None
    centroids.train().observe(points_of(1), None, True)
    assert torch.equal(centroids.weight, fitted(points_of(1), 3, 0))  # the first batch
    fitted_to_first = centroids.weight.clone()
    assert not torch.equal(centroids.eval().weight, fitted_to_first)  # training pauses: the batch is taken in
    assert centroids.commitment is None


def test_half_precision_does_not_stop_the_average():
    centroids = Centroids(1, 1, 2, 0.999, 0).train()
    centroids.set(torch.tensor([[[1.0, 0.0]]]))
    centroids = copy.deepcopy(centroids.to(torch.bfloat16))
    for _ in range(3000):
        centroids.observe(torch.tensor([[[0.0, 1.0]]]), None, False)
    assert float(centroids.state_dict()["weight"][0, 0, 1]) > 0.9
    assert centroids.weight.dtype == torch.bfloat16


def test_the_commitment_loss_is_the_distance_to_the_own_centroid():
    centroids = Centroids(2, 3, 5, 0.5, 0).train()
    centroids.set(fitted(points_of(0), 3, 0))
    points = points_of(1).requires_grad_()
    weight = centroids.weight.clone()
    centroids.observe(points, None, True)
    own = [weight[g][(points[g] @ weight[g].T).argmax(-1)] for g in range(2)]
    expected = (points - torch.stack(own)).square().mean()
    torch.testing.assert_close(centroids.commitment, expected)
    torch.testing.assert_close(torch.autograd.grad(centroids.commitment, points), torch.autograd.grad(expected, points))


def test_rows_are_those_of_an_index():
    part = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    index = torch.tensor([[4, 0, 0], [2, 4, 4]])
    found, right = rows_of(part, index), part[index]
    assert torch.equal(found, right)
    slope = torch.randn_like(right)
    gradients = [torch.autograd.grad(each, part, slope)[0] for each in (found, right)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("lengths", [None, SHORT])
def test_no_gradient_sorts_indices(lengths):
    """On a GPU, the gradient of ``part[index]`` adds up the rows of equal indices one after the other."""
    query, key, value = inputs(3)
    valid = None if lengths is None else torch.arange(LENGTH) < lengths[:, None]
    random = torch.Generator().manual_seed(0)
    cluster = [torch.randint(CLUSTERS, (ROWS, n, LENGTH), generator=random) for n in (HEADS, GROUPS)]
    near = [torch.randn(ROWS, n, CLUSTERS, LENGTH, generator=random, dtype=torch.float64) for n in (HEADS, GROUPS)]
    outs = [
        last_of_clusters(query, key, value, tuple(cluster), valid, 5, CLUSTERS, SCALE),
        top_of_clusters(query, key, value, tuple(near), valid, 4, SCALE, nearest=True),
    ]
    todo, names = [out.grad_fn for out in outs], set()
    while todo:
        node = todo.pop()
        names.add(type(node).__name__)
        todo += [each for each, _ in node.next_functions if each is not None]
    assert "IndexSelectBackward0" in names
    assert "IndexBackward0" not in names
