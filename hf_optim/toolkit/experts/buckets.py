"""Capacities of experts that follow their load: buckets, when to change them, and how a checkpoint stores the setting.

An expert has room for ``bucket(peak + deviations sqrt(peak))`` tokens, with the peak of the last forwards: so shapes
stay the same while the load moves within a bucket, and a captured CUDA graph stays valid. Nothing is ever dropped: a
forward in which an expert has more tokens than room is computed without buckets, and room is made for the next one.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ...trust.bounds import shown
from .stored import store, stored

KEY = "buckets"
RULES = ("power", "64")


@dataclass(frozen=True)
class Buckets:
    """How capacities follow the load.

    Attributes:
        rule: room is a power of two (``power``), or a multiple of 64 (``64``).
        deviations: room over the peak load, before rounding, in square roots of it: the standard deviation of a load
        that
            is random about its mean.
        window: forwards over which the peak is taken.
        trigger: forwards of the window with too little room, at which capacities change.
        slack: capacities also change if room is more than this multiple of what the window needs.
        graphs: captured graphs that a layer keeps.
        stable: in training, a sequence whose assignment has not changed so many times in a row keeps it, and its router
            is not computed (``assignments``); 0 computes all routers.
    """

    rule: str = "power"
    deviations: float = 2.0
    window: int = 16
    trigger: int = 1
    slack: float = 1.5
    graphs: int = 8
    stable: int = 0

    def __post_init__(self) -> None:
        if self.rule not in RULES:
            raise ValueError(f"rule must be one of {', '.join(RULES)}, not {shown(self.rule)}")
        for key, low, high in (("deviations", 0.0, 100.0), ("slack", 1.0, 1e6)):
            value = getattr(self, key)
            if not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value):
                raise ValueError(f"{key} must be a finite number, not {shown(value)}")
            if not low <= value <= high:
                raise ValueError(f"{key} must be from {low:g} to {high:g}, not {shown(value)}")
        for key, low, high in (("window", 1, 4096), ("trigger", 1, 4096), ("graphs", 1, 1024), ("stable", 0, 4096)):
            number = getattr(self, key)
            if not isinstance(number, int) or isinstance(number, bool) or not low <= number <= high:
                raise ValueError(f"{key} must be an integer from {low} to {high}, not {shown(number)}")
        if self.trigger > self.window:
            raise ValueError(f"trigger must be at most window ({self.window}), not {self.trigger}")


def store_buckets(config: Any, buckets: Buckets | None) -> None:
    """Write the setting into a configuration; None removes it."""
    store(config, KEY, buckets)


def stored_buckets(config: Any) -> Buckets | None:
    """Return the setting in a configuration, or None. Raises ``CheckpointError`` if it is malformed."""
    return stored(config, KEY, Buckets)


def bucket(tokens: float, rule: str, limit: int) -> int:
    """Return the room for so many tokens: a power of two or a multiple of 64, at most ``limit``; 0 for none."""
    if tokens <= 0:
        return 0
    needed = math.ceil(tokens)
    room = 1 << (needed - 1).bit_length() if rule == "power" else -(-needed // 64) * 64
    return min(room, limit)


class CapacityWatch:
    """The capacities of the experts of one layer for one number of tokens, and the loads that they follow.

    Attributes:
        capacities: room of each expert; None before the first forward.
        versions: how often capacities were set.
    """

    def __init__(self, buckets: Buckets, tokens: int) -> None:
        self.buckets, self.tokens = buckets, tokens
        self.loads: deque[tuple[int, ...]] = deque(maxlen=buckets.window)
        self.overflows: deque[bool] = deque(maxlen=buckets.window)
        self.capacities: tuple[int, ...] | None = None
        self.versions = 0

    def fits(self, loads: Sequence[int]) -> bool:
        """Return True if every expert has room for its tokens."""
        held = self.capacities
        return held is not None and all(load <= room for load, room in zip(loads, held, strict=True))

    def observe(self, loads: Sequence[int]) -> bool:
        """Take note of the tokens of each expert in a forward; return True if capacities changed, for the next one."""
        overflowed = self.capacities is not None and not self.fits(loads)
        self.loads.append(tuple(loads))
        self.overflows.append(overflowed)
        wanted = self._wanted()
        if self.capacities is None:
            return self._set(wanted)
        if sum(self.overflows) >= self.buckets.trigger:
            # Of all experts: what one needed before the window would pad, as long as another one's load grows.
            return self._set(wanted)
        full = len(self.loads) == self.buckets.window
        if full and sum(self.capacities) > self.buckets.slack * max(1, sum(wanted)):
            return self._set(wanted)
        return False

    def _wanted(self) -> tuple[int, ...]:
        peaks = (max(column) for column in zip(*self.loads, strict=True))
        spread = self.buckets.deviations
        return tuple(bucket(peak + spread * math.sqrt(peak), self.buckets.rule, self.tokens) for peak in peaks)

    def _set(self, capacities: tuple[int, ...]) -> bool:
        self.overflows.clear()
        if capacities == self.capacities:
            return False
        self.capacities = capacities
        self.versions += 1
        return True
