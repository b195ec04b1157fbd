"""The cost model of exchanges: it finds the constants that made its times, and says where one exchange is faster."""

from __future__ import annotations

import pytest

from hf_optim.toolkit.distributed import ExchangeCost, fit_cost

COST = ExchangeCost(2e-5, 1e-6, 1e-10, 6e-6, 4e-11, 1e-12)
GRIDS = ((1, 8), (2, 2), (2, 4), (4, 2), (8, 1), (4, 8))


def rows(cost):
    return [
        {"order": order, "nodes": n, "local": r, "bytes": 4.0**k, "seconds": cost.seconds(order, n, r, 4.0**k)}
        for n, r in GRIDS
        for k in range(4, 13)
        for order in ("flat", "intra_first")
    ]


def test_constants_are_found_again():
    assert fit_cost(rows(COST)).constants == pytest.approx(COST.constants, rel=1e-6)
    one = ExchangeCost(2e-5, 6e-6, 1e-10, 6e-6, 1e-10, 3e-11)
    assert fit_cost(rows(one), one_link=True).constants == pytest.approx(one.constants, rel=1e-6)


def test_no_constant_is_negative_under_noise():
    noisy = [{**row, "seconds": row["seconds"] * (0.5 if i % 3 else 2.0)} for i, row in enumerate(rows(COST))]
    fitted = fit_cost(noisy)
    assert min(fitted.constants) >= 0
    errors = sorted(fitted.seconds(r["order"], r["nodes"], r["local"], r["bytes"]) / r["seconds"] for r in noisy)
    assert 0.5 < errors[len(errors) // 2] < 2.0


def test_messages_and_bytes_of_the_two_orders():
    messages_only = ExchangeCost(0.0, 1.0, 0.0, 1.0, 0.0, 0.0)
    assert messages_only.seconds("flat", 256, 8, 1.0) == 2047
    assert messages_only.seconds("inter_first", 256, 8, 1.0) == 7 + 255
    between = ExchangeCost(0.0, 0.0, 0.0, 0.0, 1.0, 0.0)
    assert between.seconds("flat", 16, 8, 3.0) == between.seconds("intra_first", 16, 8, 3.0) == 3 * (128 - 8)


def test_the_crossing_point_is_where_both_take_as_long():
    size = COST.crossing(16, 8)
    assert COST.seconds("flat", 16, 8, size) == pytest.approx(COST.seconds("intra_first", 16, 8, size))
    assert COST.seconds("flat", 16, 8, size / 2) > COST.seconds("intra_first", 16, 8, size / 2)
    assert COST.crossing(1, 8) is None  # one node: the same messages, and one collective more
    assert ExchangeCost(0.0, 1.0, 0.0, 1.0, 0.0, 0.0).crossing(16, 8) == float("inf")
