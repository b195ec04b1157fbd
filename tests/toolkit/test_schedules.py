"""The cubic sparsity schedule, against the equation of 1710.01878."""

from __future__ import annotations

import itertools

import pytest

from hf_optim.toolkit.pruning.schedules import SparsitySchedule, as_step, cubic_sparsity


def test_cubic_sparsity_equals_the_equation_at_every_step():
    t0, n, dt, s_i, s_f = 30, 12, 5, 0.2, 0.9
    for t in range(t0, t0 + n * dt + 1):
        expected = s_f + (s_i - s_f) * (1 - (t - t0) / (n * dt)) ** 3
        assert cubic_sparsity(t, t0, t0 + n * dt, s_i, s_f) == pytest.approx(expected, abs=1e-15)
    assert cubic_sparsity(0, t0, 90, s_i, s_f) == s_i
    assert cubic_sparsity(t0, t0, 90, s_i, s_f) == pytest.approx(s_i)
    assert cubic_sparsity(500, t0, 90, s_i, s_f) == s_f


def test_sparsity_rises_by_decreasing_amounts():
    values = [cubic_sparsity(t, 0, 40, 0.0, 0.8) for t in range(41)]
    rises = [after - before for before, after in itertools.pairwise(values)]
    assert all(rise > 0 for rise in rises)
    assert all(later < earlier for earlier, later in itertools.pairwise(rises))


def test_a_schedule_without_length_is_one_shot():
    assert cubic_sparsity(7, 7, 7, 0.0, 0.5) == 0.5
    assert SparsitySchedule(7, 7, 3, 0.0, 0.5).is_update_step(7)


def test_updates_are_periodic_and_at_the_end():
    schedule = SparsitySchedule(begin=4, end=15, every=5, initial=0.0, final=0.5)
    assert [step for step in range(30) if schedule.is_update_step(step)] == [4, 9, 14, 15]


def test_last_sparsity_is_that_of_the_last_update():
    schedule = SparsitySchedule(begin=4, end=24, every=5, initial=0.1, final=0.5)
    assert schedule.last_sparsity(3) == 0.0
    assert schedule.last_sparsity(4) == schedule.last_sparsity(8) == pytest.approx(0.1)
    assert schedule.last_sparsity(13) == schedule.sparsity(9)
    assert schedule.last_sparsity(24) == schedule.last_sparsity(99) == 0.5


@pytest.mark.parametrize(("position", "steps"), [(0, 0), (1, 1), (30, 30), (0.0, 0), (0.5, 100), (1.0, 200)])
def test_ints_are_steps_and_floats_are_shares(position, steps):
    assert as_step(position, 200) == steps
