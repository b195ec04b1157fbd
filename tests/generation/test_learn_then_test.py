"""Thresholds by Learn-then-Test: p-values against their formulas, and the level over many draws."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch

from hf_optim import NumericalError, early_exit


def exact_cdf(k, count, probability):
    probability = Fraction(probability)
    terms = (math.comb(count, i) * probability**i * (1 - probability) ** (count - i) for i in range(k + 1))
    return float(sum(terms))


@pytest.mark.parametrize("count", [1, 7, 40, 300])
@pytest.mark.parametrize("delta", [0.05, 0.3, 0.9])
def test_p_values_are_the_smaller_of_two_bounds(count, delta):
    for hits in {0, 1, count // 10, count // 3, count // 2, count}:
        mean = hits / count
        if mean < delta:
            rest = (1 - mean) * math.log((1 - mean) / (1 - delta)) if mean < 1 else 0.0
            hoeffding = math.exp(-count * ((mean * math.log(mean / delta) if mean else 0.0) + rest))
        else:
            hoeffding = 1.0
        bentkus = math.e * exact_cdf(hits, count, delta)
        assert early_exit.p_value(mean, count, delta) == pytest.approx(min(1.0, hoeffding, bentkus), rel=1e-9)
    assert early_exit.binomial_cdf(-1, count, delta) == 0.0
    assert early_exit.binomial_cdf(count, count, delta) == 1.0


def test_p_values_fall_with_the_loss_and_the_bound():
    means = [early_exit.p_value(mean / 50, 200, 0.3) for mean in range(0, 20)]
    assert means == sorted(means)
    bounds = [early_exit.p_value(0.1, 200, bound / 50) for bound in range(1, 30)]
    assert bounds == sorted(bounds, reverse=True)


def test_the_sequence_ends_at_the_first_threshold_that_is_not_proven():
    read = []

    def losses():
        for threshold, mean in ((0.9, 0.0), (0.8, 0.1), (0.7, 0.5), (0.6, 0.0)):
            read.append(threshold)
            yield threshold, [mean] * 200

    found, tested = early_exit.fixed_sequence(losses(), 0.2, 0.05)
    assert found.threshold == 0.8
    assert read == [0.9, 0.8, 0.7]
    assert [each.threshold for each in tested] == [0.9, 0.8, 0.7]
    assert early_exit.fixed_sequence([(0.9, [0.5] * 20)], 0.2, 0.05)[0] is None
    for wrong in ([1.2], [float("nan")], [-0.1], []):
        with pytest.raises(NumericalError, match=r"threshold 0\.5"):
            early_exit.fixed_sequence([(0.5, wrong)], 0.2, 0.05)


def test_the_nearest_bound_is_where_the_p_value_reaches_the_level():
    for mean, count in ((0.0, 50), (0.13, 100), (0.4, 30)):
        nearest = early_exit.nearest_bound(mean, count, 0.05)
        assert early_exit.p_value(mean, count, nearest) <= 0.05 < early_exit.p_value(mean, count, nearest - 1e-6)
    assert early_exit.nearest_bound(1.0, 10, 0.05) is None
    least = early_exit.least_examples(0.1, 0.05)
    assert early_exit.p_value(0.0, least, 0.1) <= 0.05 < early_exit.p_value(0.0, least - 1, 0.1)


@pytest.mark.parametrize("kind", ["binary", "uniform"])
def test_the_level_holds_over_many_draws(kind):
    """The probability of a threshold whose loss is above the bound is at most epsilon: a binomial test of the level."""
    generator = torch.Generator().manual_seed(0)
    delta, epsilon, draws, count = 0.2, 0.1, 1500, 100
    # The first is proven nearly always; the second is at the boundary of the null hypothesis, the worst that it has.
    expected = (0.05, 0.2 + 1e-9, 0.35)
    wrong = 0
    for _ in range(draws):
        losses = []
        for place, mean in enumerate(expected):
            values = torch.rand(count, generator=generator, dtype=torch.float64)
            values = (values < mean).double() if kind == "binary" else values * 2 * mean
            losses.append((1.0 - place / 10, values.tolist()))
        found, _ = early_exit.fixed_sequence(losses, delta, epsilon)
        wrong += found is not None and found.threshold < 1.0
    # 1 - P[Bin(draws, epsilon) <= wrong - 1]: how probable as many errors are at the level.
    assert 1 - early_exit.binomial_cdf(wrong - 1, draws, epsilon) > 0.01
    if kind == "binary":
        assert wrong > 0  # the test can fail: at the boundary some draws are proven


def lcs(a, b):
    if not a or not b:
        return 0
    return lcs(a[1:], b[1:]) + 1 if a[0] == b[0] else max(lcs(a[1:], b), lcs(a, b[1:]))


def edits(a, b):
    if not a or not b:
        return len(a) + len(b)
    return edits(a[1:], b[1:]) if a[0] == b[0] else 1 + min(edits(a[1:], b), edits(a, b[1:]), edits(a[1:], b[1:]))


def test_distances_are_their_recursions():
    generator = torch.Generator().manual_seed(1)
    for _ in range(60):
        a, b = (
            torch.randint(0, 3, (int(torch.randint(0, 7, (1,), generator=generator)),), generator=generator).tolist()
            for _ in "ab"
        )
        if a or b:
            assert early_exit.rouge_l(a, b) == pytest.approx(1 - 2 * lcs(a, b) / (len(a) + len(b)))
            assert early_exit.edit_distance(a, b) == pytest.approx(edits(a, b) / max(len(a), len(b)))
    assert early_exit.rouge_l([], []) == early_exit.edit_distance([], []) == 0.0
    assert early_exit.rouge_l([1, 2], [1, 2]) == early_exit.edit_distance([4], [4]) == 0.0
    assert early_exit.rouge_l([1, 2], [3]) == early_exit.edit_distance([], [3]) == 1.0
