"""Times that can be compared: rounds of several candidates in turn, median and spread, and when noise hides them.

A machine's speed drifts, by its clock, its temperature and other processes. Candidates that are measured in turn
(A B A B ...) share the drift; the spread of one against itself says what a difference between two is worth. Importing
this module loads no torch.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

MIN_ROUNDS, MAX_ROUNDS = 5, 15
# No round after MIN_ROUNDS starts after the first of these seconds, and none at all after the second.
ENOUGH_SECONDS, TIME_BUDGET_SECONDS = 10.0, 60.0
# The original's interquartile range over its median, above which a host counts as noisy.
NOISY_SPREAD = 0.10
# Metric -> key of its spread: the interquartile range, in the metric's unit.
SPREAD = {"ms_per_token": "ms_per_token_iqr", "ms_per_example": "ms_per_example_iqr"}


@dataclass(frozen=True)
class Timing:
    """A measured time: median and interquartile range of ``rounds`` samples, in the unit of the samples.

    ``iqr`` is None for a single round, which has no spread.
    """

    median: float
    iqr: float | None
    rounds: int

    @classmethod
    def of(cls, samples: Sequence[float]) -> Timing:
        """Return the summary of at least one sample."""
        if len(samples) < 2:
            return cls(samples[0], None, 1)
        low, _, high = statistics.quantiles(samples, n=4, method="inclusive")
        return cls(statistics.median(samples), high - low, len(samples))

    def metrics(self, key: str) -> dict[str, Any]:
        """Return the timing under the keys of a measurement: ``key``, its spread if there is one, ``time_rounds``."""
        spread = {} if self.iqr is None else {SPREAD[key]: self.iqr}
        return {key: self.median, **spread, "time_rounds": self.rounds}


def time_in_turn(
    actions: Sequence[Callable[[], object]],
    *,
    warm_up: Sequence[Callable[[], object]] | None = None,
    min_rounds: int = MIN_ROUNDS,
    max_rounds: int = MAX_ROUNDS,
    clock: Callable[[], float] | None = None,
) -> list[list[float]]:
    """Call each action once per round, in turn, and return the seconds of each action's calls.

    All actions have the same number of rounds: ``max_rounds``, fewer for slow actions, but ``min_rounds`` unless these
    take longer than ``TIME_BUDGET_SECONDS``.

    Args:
        actions: what is timed, at least one.
        warm_up: calls before the first round, which are not timed; by default each action once.
        min_rounds, max_rounds: see above.
        clock: seconds, from any origin.
    """
    clock = clock or time.perf_counter
    for action in actions if warm_up is None else warm_up:
        action()
    seconds: list[list[float]] = [[] for _ in actions]
    begin = clock()
    for done in range(max_rounds):
        elapsed = clock() - begin
        if done and (elapsed > TIME_BUDGET_SECONDS or (done >= min_rounds and elapsed > ENOUGH_SECONDS)):
            break
        for action, own in zip(actions, seconds, strict=True):
            start = clock()
            action()
            own.append(clock() - start)
    return seconds


def host_load() -> dict[str, Any]:
    """Return ``load_average`` (runnable processes over the last minute) and ``cores``; empty if unknown."""
    try:
        load = os.getloadavg()[0]
    except (OSError, AttributeError):  # not on Windows
        return {}
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"load_average": round(load, 2), "cores": cores or 1}


def noise_reason(measured: Mapping[str, Any]) -> str:
    """Return why the times of a record are those of a noisy host; empty if they are not, or were not judged.

    ``measured`` is that of the record: the original's times under ``before`` (``after`` if it was not timed), the load
    of the host under ``timing``. A host is noisy if the interquartile range of repeated runs of one and the same model
    is more than 10 % of their median, or if other processes kept its cores busy.
    """
    for side in ("before", "after"):
        values = measured.get(side) or {}
        for key, spread in SPREAD.items():
            median, iqr = _number(values, key), _number(values, spread)
            if median and iqr is not None:
                if iqr > NOISY_SPREAD * median:
                    return f"repeated runs of one model differed by {100 * iqr / median:.0f} % (interquartile range)"
                return _load_reason(measured.get("timing") or {})
    return ""


def is_hidden_by_noise(measured: Mapping[str, Any], side: str, key: str) -> bool:
    """Return True if the host was noisy and a side's time differs from the original's by less than the spread."""
    return bool(noise_reason(measured)) and is_within_spread(measured, side, key)


def is_within_spread(measured: Mapping[str, Any], side: str, key: str) -> bool:
    """Return True if a side's time differs from the original's by no more than the larger of their two spreads."""
    if side == "before" or key not in SPREAD:
        return False
    original, other = (measured.get(name) or {} for name in ("before", side))
    first, second = _number(original, key), _number(other, key)
    spreads = [iqr for values in (original, other) if (iqr := spread_of(values, key)) is not None]
    return first is not None and second is not None and bool(spreads) and abs(first - second) <= max(spreads)


def spread_of(values: Mapping[str, Any], key: str) -> float | None:
    """Return the interquartile range of the time ``key`` of a measurement; None if it has none."""
    return _number(values, SPREAD[key]) if key in SPREAD else None


def _load_reason(timing: Mapping[str, Any]) -> str:
    load, cores = _number(timing, "load_average"), _number(timing, "cores")
    if load is not None and cores is not None and load > cores:
        return f"other processes kept it busy (load average {load:.1f} on {cores:.0f} cores)"
    return ""


def _number(values: Mapping[str, Any], key: str) -> float | None:
    """Return a finite number of a record, which may come from a stranger; None for anything else."""
    value = values.get(key)
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < 1e300 else None
