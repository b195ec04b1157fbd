"""Learn-then-Test: the lowest threshold whose expected loss is proven to be below a bound, from a finite set.

For each threshold, from the highest down, the hypothesis "its expected loss is above delta" is tested; the first that
is not rejected ends the sequence (fixed-sequence testing), so the probability that any threshold was rejected wrongly
is at most epsilon, however many there are. Losses are in [0, 1], and the examples are drawn independently.

    p(mean, n) = min( exp(-n h1(min(mean, delta), delta)),  e P[Bin(n, delta) <= ceil(n mean)] )
    h1(a, b)   = a log(a / b) + (1 - a) log((1 - a) / (1 - b))

The p-value of Hoeffding and Bentkus. Angelopoulos et al., "Learn then Test", arXiv 2110.01052; Schuster et al.,
"Confident Adaptive Language Modeling", arXiv 2207.07061, section 4.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from ...errors import NumericalError

# Steps of the bisection for the nearest bound: far below the digits that are shown.
BISECTIONS = 40


@dataclass(frozen=True)
class Tested:
    """A threshold that was tested.

    Attributes:
        threshold: of the confidence.
        mean: loss over the examples.
        p_value: of the hypothesis that the expected loss is above the bound.
    """

    threshold: float
    mean: float
    p_value: float


def p_value(mean: float, count: int, delta: float) -> float:
    """Return the p-value of "the expected loss is above delta", given the mean loss of ``count`` examples."""
    hoeffding = 1.0 if mean >= delta else math.exp(-count * _divergence(mean, delta))
    # A mean of k / n is computed with rounding, which must not reach the next integer.
    bentkus = math.e * binomial_cdf(math.ceil(count * mean - 1e-9), count, delta)
    return min(1.0, hoeffding, bentkus)


def _divergence(a: float, b: float) -> float:
    """Return the divergence of Bernoulli distributions, for b in (0, 1)."""
    first = a * math.log(a / b) if a > 0 else 0.0
    return first + ((1 - a) * math.log((1 - a) / (1 - b)) if a < 1 else 0.0)


def binomial_cdf(k: int, count: int, probability: float) -> float:
    """Return P[Bin(count, probability) <= k]."""
    if k >= count:
        return 1.0
    if k < 0:
        return 0.0
    yes, no = math.log(probability), math.log1p(-probability)
    whole = math.lgamma(count + 1)
    terms = (
        math.exp(whole - math.lgamma(i + 1) - math.lgamma(count - i + 1) + i * yes + (count - i) * no)
        for i in range(k + 1)
    )
    return min(1.0, math.fsum(terms))


def fixed_sequence(
    losses: Iterable[tuple[float, list[float]]], delta: float, epsilon: float
) -> tuple[Tested | None, list[Tested]]:
    """Test thresholds in the order given; return the last that was rejected (None if none was), and all tested.

    Args:
        losses: pairs of a threshold and its losses, one for each example; read until the first non-rejection, so that
            a generator need not compute what comes after it.
        delta: bound on the expected loss.
        epsilon: the probability of a wrong result.

    Raises ``NumericalError`` for losses outside of [0, 1].
    """
    found, tested = None, []
    for threshold, values in losses:
        if not values or not all(0 <= value <= 1 for value in values):
            raise NumericalError(f"the losses of threshold {threshold} are not numbers from 0 to 1")
        mean = math.fsum(values) / len(values)
        each = Tested(threshold, mean, p_value(mean, len(values), delta))
        tested.append(each)
        if each.p_value > epsilon:
            break
        found = each
    return found, tested


def nearest_bound(mean: float, count: int, epsilon: float) -> float | None:
    """Return the lowest bound that a mean loss of ``count`` examples proves; None if there is none below 1."""
    low, high = 0.0, 1 - 1e-9
    if p_value(mean, count, high) > epsilon:
        return None
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if middle == 0 or p_value(mean, count, middle) > epsilon else (low, middle)
    return high


def least_examples(delta: float, epsilon: float) -> int:
    """Return how many examples prove a bound if none of them has a loss: log(epsilon) / log(1 - delta)."""
    return math.ceil(math.log(epsilon) / math.log1p(-delta))
