"""Goals set beforehand (``goals.json``): microseconds on one card, or, on another card, the same share of its floor."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .results import Decode, Results, Row

FILE = Path(__file__).parent / "goals.json"


@dataclass(frozen=True)
class Goal:
    """``text`` says what was asked, ``met`` whether it came true (None: not measured)."""

    text: str
    met: bool | None


@functools.cache
def goals() -> dict[str, Any]:
    """The file: ``source``, ``device``, ``ceilings`` there, ``rows`` and ``decode``."""
    return json.loads(FILE.read_text(encoding="utf-8"))


def goal_of(row: Row, results: Results) -> Goal | None:
    """The goal of one of our rows, if it has one."""
    found = next((g for g in goals()["rows"] if _about(row, g)), None)
    if found is None or row.role != "ours":
        return None
    if goals()["device"] in results.device:
        return Goal(f"<= {found['us']:g} us", None if row.graph_us is None else row.graph_us <= found["us"])
    ceilings = goals()["ceilings"]
    rate = ceilings[found.get("math", "bfloat16")]
    share = max(row.bytes / ceilings["copy"], row.flops / rate) / found["us"]
    text = f"{share:.0%} of floor ({found['us']:g} us on an {goals()['device']})"
    return Goal(text, None if row.of_floor is None else row.of_floor >= share)


def decode_goal(row: Decode, results: Results) -> Goal | None:
    """The goal of an end-to-end row, if it has one. On another card the goal is scaled by the copy bandwidth."""
    keys = ("model", "scheme", "batch")
    found = next((g for g in goals()["decode"] if all(g[key] == getattr(row, key) for key in keys)), None)
    if found is None or row.mode == "dynamic":
        return None
    limit, text = found["ms"], f"<= {found['ms']:g} ms"
    if goals()["device"] not in results.device:
        limit *= goals()["ceilings"]["copy"] / results.ceilings["copy"]
        text = f"<= {limit:.2f} ms ({found['ms']:g} on an {goals()['device']})"
    return Goal(text, None if row.ms is None else row.ms <= limit)


def _about(row: Row, goal: dict[str, Any]) -> bool:
    same = all(getattr(row, key) == goal[key] for key in ("op", "N", "K", "M"))
    return same and row.contender.startswith(goal["contender"])
