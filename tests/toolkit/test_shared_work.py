"""Work divided among ranks: who does what. Two ranks do some in ``test_distributed``."""

from __future__ import annotations

import pytest

from hf_optim.toolkit.distributed.shared_work import divided, owners_of


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_the_largest_rank_has_at_most_four_thirds_of_the_best(ranks):
    costs = [7.0, 7.0, 6.0, 6.0, 5.0, 5.0, 4.0, 4.0, 4.0]
    owners = owners_of(costs, ranks)
    load = [sum(cost for cost, owner in zip(costs, owners, strict=True) if owner == rank) for rank in range(ranks)]
    least = max(sum(costs) / ranks, max(costs))
    assert sum(load) == sum(costs)
    assert max(load) <= 4 / 3 * least


def test_one_rank_does_a_piece_when_its_result_is_asked_for():
    done = []
    results = divided([lambda number=number: done.append(number) or number for number in range(3)], [1.0, 2.0, 3.0])
    assert (next(results), done) == (0, [0])
    assert list(results) == [1, 2]
