"""Performance goals (``goals.json``): microseconds on one GPU, or on another GPU the same fraction of its floor.

The floor is the roofline bound: the time that the device needs at least for the bytes and operations of the work.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .results import DecodeResult, OpResult, Results

FILE = Path(__file__).parent / "goals.json"


@dataclass(frozen=True)
class Goal:
    """A goal as ``text``, and whether it was ``met``; None if that was not measured."""

    text: str
    met: bool | None


@functools.cache
def load_goals() -> dict[str, Any]:
    """Read the file: ``source``, ``device``, the ``ceilings`` of that device, ``rows`` and ``decode``."""
    return json.loads(FILE.read_text(encoding="utf-8"))


def find_goal(row: OpResult, results: Results) -> Goal | None:
    """Return the goal of one of our rows, or None."""
    found = next((g for g in load_goals()["rows"] if _matches(row, g)), None)
    if found is None or row.role != "ours":
        return None
    if load_goals()["device"] in results.device:
        return Goal(f"<= {found['us']:g} us", None if row.graph_us is None else row.graph_us <= found["us"])
    ceilings = load_goals()["ceilings"]
    rate = ceilings[found.get("math", "bfloat16")]
    share = max(row.bytes / ceilings["copy"], row.flops / rate) / found["us"]
    text = f"{share:.0%} of floor ({found['us']:g} us on an {load_goals()['device']})"
    return Goal(text, None if row.fraction_of_floor is None else row.fraction_of_floor >= share)


def find_decode_goal(row: DecodeResult, results: Results) -> Goal | None:
    """Return the goal of an end-to-end row, or None. On another GPU it is scaled by the copy bandwidth."""
    keys = ("model", "scheme", "batch")
    found = next((g for g in load_goals()["decode"] if all(g[key] == getattr(row, key) for key in keys)), None)
    if found is None or row.mode == "dynamic":
        return None
    limit, text = found["ms"], f"<= {found['ms']:g} ms"
    if load_goals()["device"] not in results.device:
        limit *= load_goals()["ceilings"]["copy"] / results.ceilings["copy"]
        text = f"<= {limit:.2f} ms ({found['ms']:g} on an {load_goals()['device']})"
    return Goal(text, None if row.ms is None else row.ms <= limit)


def _matches(row: OpResult, goal: dict[str, Any]) -> bool:
    same = all(getattr(row, key) == goal[key] for key in ("op", "N", "K", "M"))
    return same and row.contender.startswith(goal["contender"])
