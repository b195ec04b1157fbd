"""How long an exchange between ranks takes: a model of messages and bytes, fitted to measured times.

    t(flat)          = c + (L - 1) (a_i + m b_i) + (G - L) (a_o + m b_o)
    t(hierarchical)  = 2 c + (L - 1) (a_i + N m b_i) + (N - 1) (a_o + L m b_o) + 2 G m k

for N nodes of L ranks, G = N L, and m bytes from each rank to each other. c is what a collective costs by itself, a the
time of a message, b that of a byte, within a node (i) and between nodes (o), and k that of a byte that is moved in
memory: rows change their order twice. One message after the other, as at a single network card.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

ITERATIONS = 12


@dataclass(frozen=True)
class ExchangeCost:
    """The constants of the model, in seconds.

    Attributes:
        collective: c.
        message_inside, message_between: a_i and a_o.
        byte_inside, byte_between: b_i and b_o.
        byte_moved: k.
    """

    collective: float
    message_inside: float
    byte_inside: float
    message_between: float
    byte_between: float
    byte_moved: float

    def seconds(self, order: str, nodes: int, local: int, size: float) -> float:
        """Return the time of one exchange in which each rank has ``size`` bytes for each."""
        return sum(c * x for c, x in zip(self.constants, features(order, nodes, local, size), strict=True))

    @property
    def constants(self) -> tuple[float, ...]:
        """c, a_i, b_i, a_o, b_o, k."""
        return (
            self.collective,
            self.message_inside,
            self.byte_inside,
            self.message_between,
            self.byte_between,
            self.byte_moved,
        )

    def crossing(self, nodes: int, local: int, low: float = 1.0, high: float = 2.0**34) -> float | None:
        """Return the bytes between two ranks above which the flat exchange is faster; None if it always is.

        Infinity if the hierarchical one is faster up to ``high`` bytes.
        """

        def gain(size: float) -> float:
            return self.seconds("flat", nodes, local, size) - self.seconds("intra_first", nodes, local, size)

        if gain(low) <= 0:
            return None
        if gain(high) > 0:
            return float("inf")
        for _ in range(80):
            middle = (low * high) ** 0.5
            low, high = (middle, high) if gain(middle) > 0 else (low, middle)
        return low


def features(order: str, nodes: int, local: int, size: float) -> tuple[float, ...]:
    """Return how often each constant occurs: collectives, messages and bytes inside, between, and bytes moved."""
    ranks = nodes * local
    inside, between = local - 1, ranks - local
    if order == "flat":
        return (1.0, inside, inside * size, between, between * size, 0.0)
    return (2.0, inside, inside * nodes * size, nodes - 1, (nodes - 1) * local * size, 2.0 * ranks * size)


def fit_cost(measured: Iterable[Mapping[str, float | int | str]], one_link: bool = False) -> ExchangeCost:
    """Return the constants that fit measured times best, none of them below 0.

    Least squares of differences as a share of the geometric mean of measured and fitted time, which counts a time that
    is half as long as one that is twice as long; the fitted one is that of the iteration before.

    Args:
        measured: rows with ``order``, ``nodes``, ``local``, ``bytes`` and ``seconds``.
        one_link: messages within and between nodes cost the same, as on a machine that plays several nodes.
    """
    rows, times = [], []
    for one in measured:
        c, a_i, b_i, a_o, b_o, k = features(
            str(one["order"]), int(one["nodes"]), int(one["local"]), float(one["bytes"])
        )
        rows.append((c, a_i + a_o, b_i + b_o, k) if one_link else (c, a_i, b_i, a_o, b_o, k))
        times.append(float(one["seconds"]))
    fitted = list(times)
    constants: tuple[float, ...] = ()
    for _ in range(ITERATIONS):
        weights = [(first * second) ** -0.5 for first, second in zip(times, fitted, strict=True)]
        weighted = [[value * weight for value in row] for row, weight in zip(rows, weights, strict=True)]
        constants = _non_negative(weighted, [time * weight for time, weight in zip(times, weights, strict=True)])
        fitted = [
            max(sum(c * x for c, x in zip(constants, row, strict=True)), 1e-3 * time)
            for row, time in zip(rows, times, strict=True)
        ]
    if one_link:
        c, a, b, k = constants
        return ExchangeCost(c, a, b, a, b, k)
    return ExchangeCost(*constants)


def _non_negative(rows: Sequence[Sequence[float]], right: Sequence[float]) -> tuple[float, ...]:
    """Return the least-squares solution without negative entries: the best over all sets of entries that are 0."""
    matrix, target = torch.tensor(rows, dtype=torch.float64), torch.tensor(right, dtype=torch.float64)
    scale = matrix.abs().amax(0).clamp(min=1e-300)
    width = matrix.shape[1]
    best, least = torch.zeros(width, dtype=torch.float64), float(target.square().sum())
    for chosen in itertools.product((False, True), repeat=width):
        columns = [i for i, used in enumerate(chosen) if used]
        if not columns:
            continue
        part = (matrix / scale)[:, columns]
        solution = torch.linalg.lstsq(part, target.unsqueeze(1), driver="gelsd").solution.squeeze(1)
        error = float((part @ solution - target).square().sum())
        if bool((solution >= 0).all()) and error < least:
            best = torch.zeros(width, dtype=torch.float64)
            best[columns] = solution / scale[columns]
            least = error
    return tuple(best.tolist())
