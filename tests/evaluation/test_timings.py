"""Times are measured in turn, have a spread, and are left out where a noisy host hides the difference."""

from __future__ import annotations

import statistics

import pytest

from hf_optim.evaluation import timings
from hf_optim.evaluation.cards.card import Card
from hf_optim.evaluation.comparison import (
    CARD_TITLES,
    TERMINAL_TITLES,
    column_titles,
    comparison_notes,
    comparison_rows,
    measurement_rows,
)
from hf_optim.evaluation.timings import Timing, noise_reason, time_in_turn
from hf_optim.runs.record import Record

QUIET, BUSY = {"load_average": 0.4, "cores": 2}, {"load_average": 7.9, "cores": 2}
TIME = "ms per token (greedy, batch 1)"


class Clock:
    """A clock that only actions advance."""

    def __init__(self):
        self.now, self.order = 100.0, []

    def __call__(self):
        return self.now

    def action(self, name, seconds):
        def run():
            self.order.append(name)
            self.now += next(seconds) if hasattr(seconds, "__next__") else seconds

        return run


def test_actions_run_in_turn_after_a_warm_up_that_is_not_timed():
    clock = Clock()
    seconds = time_in_turn([clock.action("a", 1.0), clock.action("b", 2.0)], max_rounds=3, clock=clock)
    assert "".join(clock.order) == "ab" + "ababab"
    assert seconds == [[1.0] * 3, [2.0] * 3]


@pytest.mark.parametrize(("each", "rounds"), [(0.1, 15), (0.9, 6), (5.0, 5), (8.0, 4), (500.0, 1)])
def test_slow_actions_have_fewer_rounds_but_five_unless_these_take_a_minute(each, rounds):
    clock = Clock()
    (one, other) = time_in_turn([clock.action("a", each), clock.action("b", each)], warm_up=[], clock=clock)
    assert len(one) == len(other) == rounds


def test_median_and_interquartile_range():
    assert Timing.of([4.0]) == Timing(4.0, None, 1)
    timing = Timing.of([1.0, 9.0, 3.0, 2.0, 4.0])
    assert timing == Timing(3.0, 2.0, 5)  # quartiles 2 and 4: the outlier of 9 does not count
    assert timing.metrics("ms_per_token") == {"ms_per_token": 3.0, "ms_per_token_iqr": 2.0, "time_rounds": 5}
    assert Timing.of([4.0]).metrics("ms_per_example") == {"ms_per_example": 4.0, "time_rounds": 1}


def test_drift_of_the_host_does_not_pass_for_a_difference():
    """Both take the same time, and the host gets slower: one after the other they would differ by 60 %."""
    clock, slow = Clock(), iter(1 + 0.02 * i for i in range(60))
    one, other = time_in_turn([clock.action("a", slow), clock.action("b", slow)], warm_up=[], clock=clock)
    assert statistics.median(other) / statistics.median(one) - 1 < 0.03


def measured(before, after, accelerated=None, load=QUIET, **more):
    """The measurements of a record; each time is ``(median, interquartile range)``."""

    def side(time):
        return {"perplexity": 2.5, "ms_per_token": time[0], "ms_per_token_iqr": time[1], "time_rounds": 9}

    found = {"before": side(before), "after": side(after)}
    if accelerated:
        found["accelerated"] = {**side(accelerated), "kernels": "PyTorch int4 (CPU): 35; not compressed: 1"}
    what = "64 tokens generated greedily after a prompt of 32, batch 1"
    return {**found, "timing": {"what": what, "in_turn": True, **load}, **more}


def row(made):
    return next(cells for cells in comparison_rows(made) if cells[0] == TIME)[1:]


def test_a_quiet_host_gives_median_and_spread_and_the_change():
    made = measured((4.63, 0.2), (11.64, 0.31), (3.1, 0.1))
    assert row(made) == ["4.63 ± 0.10", "11.64 ± 0.15", "+151.4 %", "3.10 ± 0.05", "-33.0 %"]
    notes = " ".join(comparison_notes(made))
    assert "median ± half the interquartile range of 9 rounds, the models in turn in one process" in notes
    assert "64 tokens generated greedily" in notes
    assert "noisy" not in notes
    assert noise_reason(made) == ""


def test_times_that_differ_by_less_than_the_spread_have_no_change():
    assert row(measured((4.63, 0.2), (4.80, 0.1))) == ["4.63 ± 0.10", "4.80 ± 0.05", "within spread"]


@pytest.mark.parametrize(
    ("before", "load", "reason"),
    [
        ((4.0, 0.6), QUIET, "repeated runs of one model differed by 15 % (interquartile range)"),
        ((4.0, 0.1), BUSY, "other processes kept it busy (load average 7.9 on 2 cores)"),
    ],
)
def test_a_noisy_host_is_named_and_small_differences_are_called_noise(before, load, reason):
    clear = measured(before, (9.0, 0.3), load=load)
    assert row(clear) == [f"4.00 ± {before[1] / 2:.2f}", "9.00 ± 0.15", "+125.0 %"]
    assert any(reason in note for note in comparison_notes(clear))
    hidden = measured(before, (4.09, 0.1), (9.0, 0.1), load=load)
    assert row(hidden) == [f"4.00 ± {before[1] / 2:.2f}", "4.09 ± 0.05", "noise", "9.00 ± 0.05", "+125.0 %"]
    text = Card(Record(measured=hidden)).render()
    assert reason in text.replace("\\", "")
    assert "| 4.09 ± 0.05 | noise |" in text.split("## How to load")[0].split("## Results")[1]


def test_the_limit_of_noise_is_a_tenth_of_the_median():
    assert noise_reason(measured((4.0, 0.4), (9.0, 3.0))) == ""
    assert noise_reason(measured((4.0, 0.41), (9.0, 0.0)))
    assert noise_reason({"before": {"ms_per_example": 4.0, "ms_per_example_iqr": 0.5}})
    # Nothing to judge by: an original that was not timed, a record of an earlier version, a stranger's.
    assert noise_reason({"after": {"ms_per_token": 4.0}, "timing": BUSY}) == ""
    for odd in ("x", True, None, float("nan"), float("inf"), -1):
        assert noise_reason({"before": {"ms_per_token": odd, "ms_per_token_iqr": odd}, "timing": BUSY}) == ""


def test_a_record_of_an_earlier_version_still_renders_and_says_what_its_times_are():
    old = {"before": {"perplexity": 2.2, "ms_per_token": 2.15}, "after": {"perplexity": 2.3, "ms_per_token": 13.01}}
    assert row(old) == ["2.15", "13.01", "+505.1 %"]
    assert "one model after the other, minutes apart" in comparison_notes(old)[0]
    assert "| 2.15 | 13.01 |" in Card(Record(measured=old)).render()


def test_models_that_did_not_fit_together_are_said_to_be_timed_one_after_the_other():
    made = measured((4.0, 0.1), (9.0, 0.1))
    made["timing"]["in_turn"] = False
    assert "one model after the other, since they did not fit on the device together" in comparison_notes(made)[0]


def test_the_run_on_kernels_is_a_column_that_says_what_it_is():
    made = measured((4.0, 0.1), (9.0, 0.1), (3.0, 0.1))
    assert column_titles(made, TERMINAL_TITLES) == [
        "metric", "before", "after, stock", "change", "after, on kernels", "change",
    ]  # fmt: skip
    text = Card(Record(measured=made, traits=["quantized"], reload="STOCK_FORMAT")).render()
    assert "|  | original | this checkpoint, stock transformers | change | on hf_optim's kernels | change |" in text, (
        text
    )
    assert 'loaded with optim_config="auto" (linear layers: PyTorch int4 (CPU): 35; not compressed: 1)' in text
    del made["accelerated"]
    assert column_titles(made, CARD_TITLES) == ["", "original", "this checkpoint", "change"]


def test_the_trained_control_is_a_column_of_its_own():
    control = {"perplexity": 2.4, "name": "the original, trained for this table", "trained": True}
    made = measured((4.0, 0.1), (4.1, 0.1), control=control)
    assert column_titles(made, TERMINAL_TITLES)[1:4] == ["before", "trained alike", "after"]
    assert column_titles(made, CARD_TITLES)[2] == "original, trained alike"
    assert row(made) == ["4.00 ± 0.05", "-", "4.10 ± 0.05", "within spread"]
    assert "The control is the original, trained for this table" in comparison_notes(made, trained=True)
    alone = comparison_notes(measured((4.0, 0.1), (4.1, 0.1)), trained=True)[-1]
    assert alone.startswith("Training on the data can improve a dense model as well: without a control")


def test_an_evaluation_is_shown_with_labels_units_and_one_format():
    shown = measurement_rows(
        {
            "task": "text-generation",
            "perplexity": 2.27539,
            "nll": 0.8226401803994091,
            "tokens": 373575,
            "bits_per_byte": 1.112,
            "ms_per_token": 4.6312,
            "ms_per_token_iqr": 0.2,
            "time_rounds": 15,
            "peak_memory_bytes": 672825344,
            "peak_memory_of": "process (resident)",
            "peak_host_bytes": 672825344,
            "device": "cpu",
            "arc_easy": {"acc": 0.25},
        }
    )
    assert shown == [
        ("task", "text-generation"),
        ("perplexity", "2.2754"),
        ("negative log-likelihood (nats per token)", "0.8226"),
        ("tokens scored", "373,575"),
        ("bits per byte", "1.1120"),
        ("ms per token (greedy, batch 1)", "4.63 ± 0.10"),
        ("rounds timed", "15"),
        ("peak memory of the process (resident) (bytes)", "673 MB (672,825,344)"),
        ("device", "cpu"),
        ("arc easy", "{'acc': 0.25}"),
    ]
    on_gpu = {"peak_memory_bytes": 10**9, "peak_memory_of": "CUDA allocator", "peak_host_bytes": None}
    assert measurement_rows(on_gpu) == [
        ("peak memory of the CUDA allocator (bytes)", "1 GB (1,000,000,000)"),
        ("peak memory of the process (bytes)", "-"),
    ]


def test_the_load_of_the_host_is_that_of_its_cores(monkeypatch):
    monkeypatch.setattr(timings.os, "getloadavg", lambda: (3.456, 1.0, 1.0), raising=False)
    found = timings.host_load()
    assert found["load_average"] == 3.46
    assert found["cores"] >= 1
