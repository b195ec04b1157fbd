"""Experts across ranks in the fastest of several ways: choices, stopwatches, and what real ranks (gloo) find."""

from __future__ import annotations

import json
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from hf_optim.toolkit import compat
from hf_optim.toolkit.experts import choices
from hf_optim.toolkit.experts.adaptive_layer import chunk_sizes
from hf_optim.toolkit.experts.choices import Choices, Situation, Stopwatch, Way, ways_of

SCRIPT = Path(__file__).parents[1] / "helpers" / "adaptive_ranks.py"
REGISTRY = pytest.mark.skipif(compat.VERSION < (5, 23), reason="transformers has exchanges between ranks since 5.23")
CPU = torch.device("cpu")


def test_ways_of_a_setting():
    orders = ("flat", "intra_first", "inter_first")
    assert list(map(str, ways_of("auto", orders, (1, 2)))) == [
        "exchange flat x1", "exchange flat x2", "exchange intra_first x1", "exchange inter_first x1", "gather",
    ]  # fmt: skip
    assert ways_of("gather", orders, (1, 2)) == (Way("gather"),)
    assert ways_of("exchange", ("flat",), (4,)) == (Way("exchange", "flat", 4),)


@pytest.mark.parametrize(
    ("table", "expected"),
    [
        ([[4, 4], [4, 4]], (8, 1.0)),
        ([[9, 0], [0, 0]], (16, 2.0)),
        ([[3, 1], [3, 1]], (4, 2**0.5)),  # 1.5 times the mean
        ([[0, 0], [0, 0]], (0, 0.0)),
        ([[1, 0], [0, 0]], (1, 2.0)),
    ],
)
def test_situations_are_buckets_of_tokens_and_of_load(table, expected):
    found = Situation.of(table, training=False)
    assert (found.pairs, found.imbalance) == (expected[0], pytest.approx(expected[1]))


@pytest.mark.parametrize("degree", [1, 2, 4, 7])
def test_chunks_add_up_and_differ_by_at_most_one(degree):
    counts = torch.arange(30).view(3, 10)
    parts = chunk_sizes(counts, degree)
    assert torch.equal(parts.sum(0), counts)
    assert int((parts.amax(0) - parts.amin(0)).max()) <= 1
    assert int(parts.min()) >= 0


def test_each_way_is_warmed_up_and_timed_then_the_fastest_is_kept(monkeypatch):
    monkeypatch.setattr(choices.dist, "all_reduce", lambda tensor, **_: tensor)
    ways = ways_of("auto", ("flat",), (1, 2))
    kept = Choices(ways, 2, SimpleNamespace(group=None))
    situation, seen = Situation(8, 1.0, False), []
    for _ in range(9):
        way, watch = kept.turn(situation, CPU)
        seen.append((str(way), watch is not None))
        if watch is not None:
            watch.kept.append({"exchange flat x1": 3.0, "exchange flat x2": 1.0, "gather": 2.0}[str(way)])
    assert seen == [(str(way), timed) for timed in (False, True, True) for way in ways]
    assert [str(kept.turn(situation, CPU)[0]) for _ in range(3)] == ["exchange flat x2"] * 3
    assert kept.turn(Situation(16, 1.0, False), CPU)[0] == ways[0]
    report = kept.report()
    assert report[0]["chosen"] == "exchange flat x2"
    assert report[0]["milliseconds"] == {"exchange flat x1": 3000.0, "exchange flat x2": 1000.0, "gather": 2000.0}
    assert "exchange flat x2 is the fastest (forward" in report[0]["why"]
    assert report[1]["chosen"] is None


def test_situations_are_bounded(monkeypatch):
    monkeypatch.setattr(choices, "MAX_SITUATIONS", 2)
    kept = Choices(ways_of("auto", ("flat",), (1,)), 1, SimpleNamespace(group=None))
    for pairs in range(5):
        assert kept.turn(Situation(pairs, 1.0, False), CPU)[0] == kept.ways[0]
    assert len(kept.decisions) == 2


def test_a_stopwatch_adds_the_backward():
    times: list[float] = []
    watch = Stopwatch(times, CPU)
    x = watch.at_input(torch.ones(3, requires_grad=True))

    class Slow(torch.autograd.Function):
        @staticmethod
        def forward(ctx, y):
            time.sleep(0.02)
            return y * 2

        @staticmethod
        def backward(ctx, grad):
            time.sleep(0.05)
            return grad * 2

    y = watch.at_output(Slow.apply(x))
    forward = times[0]
    assert forward >= 0.02
    time.sleep(0.03)  # other layers
    y.sum().backward()
    assert len(times) == 1
    assert 0.05 <= times[0] - forward < 0.5


def ranks(python, folder, world):
    done = python.script(SCRIPT, folder / "found", world)
    assert done.status == 0, done.err[-2000:]
    return json.loads((folder / f"found-{world}.json").read_text())


@REGISTRY
@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4, 8])
def test_ranks(world, python, tmp_path):
    found = ranks(python, tmp_path, world)

    def of(name):
        assert all("error" not in one for one in found[name]), found[name]
        return [one["found"] for one in found[name]]

    orders = 0 if world == 2 else 2  # two ranks form no grid of nodes
    assert {len(one) for one in of("exchanged_rows_are_the_same_to_the_bit")} == {3 + orders}
    *others, dead = found["a_rank_that_dies"]
    assert dead == {"error": "ended"}
    for one in others:
        kind, seconds = one["found"]
        assert kind == "RankError", one
        assert seconds < 30  # the timeout of the group is 15
    if world == 8:
        return
    for rank in of("every_way_gives_the_same"):
        assert len(rank) == (4 if world == 2 else 12)
        assert max(max(pair) for pair in rank.values()) < 1e-4
    for chosen, times, why in of("the_choice_is_that_of_the_slowest_rank_on_all_ranks"):
        assert chosen == "exchange flat x2"  # 3 s on every rank; the others 4 and 5 on some
        assert times == {"exchange flat x1": 5000.0, "exchange flat x2": 3000.0, "gather": 4000.0}
        assert "exchange flat x2 is the fastest" in why
    results = of("loads_and_sizes_are_decided_apart")
    assert all(one == results[0] for one in results)
    decided = results[0][0]
    assert [part[2:] for part in decided] == [[False, True], [False, True], [True, False]]
    assert decided[0][0] > decided[1][0]
    for spread, calls in of("gradient_checkpointing_repeats_the_way_of_the_forward"):
        assert spread < 1e-4
        assert calls == [[6], [6]]  # three ways, each once untimed and once timed; recomputation does not count
    assert max(map(max, of("a_capacity_drops_the_same_in_every_way"))) < 1e-4
