"""Column permutations for N:M masks: against brute force and the published efficacy, on every path of the search."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
import torch

from hf_optim.toolkit.permutation import column_search
from hf_optim.toolkit.permutation.column_search import (
    PermutationResult,
    kept_sum,
    kept_sum_row_wise,
    search_permutation,
)
from hf_optim.toolkit.permutation.scores import DirectScorer, TableScorer, has_table, largest
from hf_optim.toolkit.permutation.splits import all_splits, ascending_sets, split_count
from hf_optim.toolkit.permutation.stripes import Stripes, converge_
from hf_optim.toolkit.permutation.swaps import disjoint_pairs, exchange_columns_, swap_gains
from hf_optim.toolkit.pruning.masks import nm_mask


def gaussian(rows, columns, seed=0):
    return torch.randn((rows, columns), generator=torch.Generator().manual_seed(seed))


def published(seed):
    """The random matrix on which the paper's code reports its efficacy: 128 rows, 64 columns, uniform in [0, 1)."""
    return torch.from_numpy(np.random.RandomState(seed).rand(128, 64))


def kept(weight, order, keep=2, group=4):
    moved = weight[:, order]
    return float((moved.abs() * nm_mask(moved, keep, group)).sum(dtype=torch.float64))


@pytest.mark.parametrize(("group", "stripes", "count"), [(4, 2, 35), (4, 3, 5775), (2, 2, 3), (2, 3, 15)])
def test_splits_are_complete_and_distinct(group, stripes, count):
    splits = all_splits(group, stripes)
    assert split_count(group, stripes) == count == len(splits.ways)
    sets = splits.subsets[splits.ways]
    assert torch.equal(sets.flatten(1).sort(1).values, torch.arange(group * stripes).expand(count, -1))
    assert len({frozenset(map(tuple, way)) for way in sets.tolist()}) == count
    assert torch.equal(sets[0].flatten(), torch.arange(group * stripes))


def test_too_many_splits_are_refused():
    with pytest.raises(ValueError, match="6435 splits"):
        all_splits(8, 2)


@pytest.mark.parametrize(("keep", "group"), [(1, 4), (2, 4), (3, 4), (1, 2), (4, 8)])
def test_largest_and_kept_sums_equal_a_sort(keep, group):
    values = gaussian(group, 50).abs()
    assert torch.equal(torch.stack(largest(values.unbind(0), keep)), values.sort(0, descending=True).values[:keep])
    weight = gaussian(30, 4 * group)
    assert kept_sum(weight.abs(), keep, group) == pytest.approx(kept(weight, torch.arange(4 * group), keep, group))


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_table_and_direct_scores_equal_the_kept_sum(keep):
    weight = gaussian(300, 12)
    scores = weight.abs().T.contiguous()
    table, direct = TableScorer(scores, keep, 4), DirectScorer(scores, keep, 4)
    sets = ascending_sets(12, 4)
    expected = torch.tensor([kept_sum(weight.abs()[:, columns], keep, 4) for columns in sets])
    shuffled = sets[:, [2, 0, 3, 1]]
    for scorer in (table, direct):
        assert torch.allclose(scorer.stripe(shuffled).double(), expected.double(), rtol=1e-5)
    columns = torch.stack([torch.arange(8), torch.arange(4, 12)])
    for first, second in zip(
        table.best(columns, all_splits(4, 2)), direct.best(columns, all_splits(4, 2)), strict=True
    ):
        assert torch.allclose(first.double(), second.double(), rtol=1e-5)


@pytest.mark.parametrize("seed", range(3))
def test_eight_columns_equal_brute_force(seed):
    weight = gaussian(16, 8, seed)
    best = max(kept(weight, torch.tensor(order)) for order in permutations(range(8)) if order[0] == 0)
    found = search_permutation(weight, tries=0, starts=1)
    assert found.after == pytest.approx(best, rel=1e-9)
    assert kept(weight, found.order) == pytest.approx(best, rel=1e-6)


def test_twelve_columns_in_three_stripes_equal_brute_force():
    weight = gaussian(16, 12)
    splits = all_splits(4, 3)
    best = max(kept(weight, splits.subsets[way].flatten()) for way in splits.ways)
    assert search_permutation(weight, stripes=3, tries=0, starts=1).after == pytest.approx(best, rel=1e-6)


def test_the_published_matrix_and_its_efficacy():
    weight = published(1)
    found = search_permutation(weight, tries=0, starts=1)
    assert float(weight.sum()) == pytest.approx(4083.169, abs=1e-3)
    assert (found.before, found.row_wise) == (pytest.approx(2852.377, abs=1e-2), pytest.approx(3042.332, abs=1e-2))
    assert found.after == pytest.approx(2919.757, abs=0.1)
    assert 100 * found.efficacy >= 35.4


def mean_efficacy(**options):
    return 100 * sum(search_permutation(published(seed), **options).efficacy for seed in range(1, 11)) / 10


@pytest.mark.slow
def test_efficacy_over_ten_matrices():
    plain = mean_efficacy(tries=0)
    assert plain >= 35.5
    assert mean_efficacy(tries=100) > plain + 0.3


@pytest.mark.slow
def test_efficacy_over_ten_matrices_with_three_stripes():
    plain = mean_efficacy(stripes=3, tries=0)
    assert plain >= 36.6
    assert mean_efficacy(stripes=3, tries=1000) > plain + 0.1


PATHS = [
    (24, 32, 2, 4),
    (24, 32, 1, 4),
    (24, 32, 3, 4),
    (24, 32, 1, 2),
    (24, 96, 2, 4),
    (24, 64, 6, 8),
    (16, 1088, 2, 4),
]


@pytest.mark.parametrize(("rows", "columns", "keep", "group"), PATHS)
def test_every_path_keeps_more_and_returns_a_permutation(rows, columns, keep, group):
    weight = gaussian(rows, columns)
    found = search_permutation(weight, keep, group, tries=5)
    assert torch.equal(found.order.sort().values, torch.arange(columns))
    assert found.before == pytest.approx(kept(weight, torch.arange(columns), keep, group), rel=1e-6)
    assert found.after == pytest.approx(kept(weight, found.order, keep, group), rel=1e-6)
    assert found.before < found.after < found.row_wise
    assert found.efficacy > 0.3
    assert torch.equal(search_permutation(weight, keep, group, tries=5).order, found.order)


def test_kept_never_falls():
    # The optimal order: every group has two columns of ones and two of zeros.
    best = torch.tensor([[1.0, 1.0, 0.0, 0.0] * 8] * 5)
    found = search_permutation(best)
    assert torch.equal(found.order, torch.arange(32))
    assert found.before == found.after == found.row_wise
    assert found.efficacy == 0.0
    hidden = search_permutation(best[:, torch.arange(32).view(2, 4, 4).permute(1, 2, 0).flatten()])
    assert hidden.after >= hidden.before


def test_a_shuffled_pattern_is_recovered():
    weight = torch.tensor([[1.0, 2.0, 0.0, 0.0], [0.0, 0.0, 3.0, 1.0]]).repeat(10, 12)
    shuffled = weight[:, torch.randperm(48, generator=torch.Generator().manual_seed(0))]
    found = search_permutation(shuffled)
    assert found.before < found.after == found.row_wise == float(weight.sum())


def test_swap_gains_are_exact():
    weight = gaussian(40, 24)
    scores, order = weight.abs().T.contiguous(), torch.arange(24).view(6, 4)
    slots = torch.tensor([0, 1, 2, 3, 1, 2])
    gains = swap_gains(order, slots, scores, 2)
    for i in range(6):
        for j in range(6):
            moved = order.clone()
            moved[i, slots[i]], moved[j, slots[j]] = order[j, slots[j]], order[i, slots[i]]
            expected = kept(weight, moved.flatten()) - kept(weight, order.flatten())
            assert float(gains[i, j]) == pytest.approx(expected, abs=1e-3)


def test_disjoint_pairs_equal_the_greedy_choice():
    gains = gaussian(20, 20)
    gains = gains + gains.T
    first, second = disjoint_pairs(gains)
    ranked = sorted(((float(gains[i, j]), i, j) for i in range(20) for j in range(i + 1, 20)), reverse=True)
    taken, greedy = set(), set()
    for gain, i, j in ranked:
        if gain > 0 and not {i, j} & taken:
            taken |= {i, j}
            greedy.add((i, j))
    assert set(zip(first.tolist(), second.tolist(), strict=True)) == greedy


def test_the_greedy_phase_ends_where_no_pair_of_stripes_gains():
    weight = gaussian(64, 40)
    scorer = TableScorer(weight.abs().T.contiguous(), 2, 4)
    state = converge_(Stripes.of(torch.arange(40).view(1, 10, 4), scorer), scorer, 2)
    pairs = torch.combinations(torch.arange(10))
    best, _ = scorer.best(state.order[0][pairs].flatten(1).sort(1).values, all_splits(4, 2))
    assert bool((best - state.kept[0][pairs].sum(1) <= 1e-5 * best).all())
    assert torch.equal(state.order.flatten().sort().values, torch.arange(40))


def test_exchanges_never_lose():
    weight = gaussian(32, 256)
    scores, order = weight.abs().T.contiguous(), torch.arange(256).view(-1, 4)
    worth = [kept(weight, order.flatten())]
    for seed in range(5):
        exchange_columns_(order, scores, 2, torch.Generator().manual_seed(seed), rounds=3)
        worth.append(kept(weight, order.flatten()))
    assert worth == sorted(worth)
    assert worth[-1] > 1.01 * worth[0]


@pytest.mark.parametrize(
    ("columns", "keep", "group", "message"), [(10, 2, 4, "10 columns"), (8, 5, 4, "not a pattern")]
)
def test_invalid_arguments_are_refused(columns, keep, group, message):
    with pytest.raises(ValueError, match=message):
        search_permutation(gaussian(4, columns), keep, group)


def test_nothing_to_search():
    assert torch.equal(search_permutation(gaussian(4, 8), 4, 4).order, torch.arange(8))
    assert torch.equal(search_permutation(gaussian(4, 4)).order, torch.arange(4))


def test_efficacy_and_bounds():
    assert PermutationResult(torch.arange(4), 1.0, 1.5, 2.0).efficacy == 0.5
    weight = gaussian(6, 16).abs()
    assert kept_sum_row_wise(weight, 2, 4) == pytest.approx(float(weight.sort(1).values[:, 8:].sum()))
    assert has_table(64, 128, 4)
    assert not has_table(128, 128, 4)
    assert column_search.MAX_STRIPES_ALL_PAIRS * 4 < 1088
