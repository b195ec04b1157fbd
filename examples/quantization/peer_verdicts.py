"""Who is better in which cell of the comparison with other tools, by a rule that is stated on the page."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from peer_cells import BITS, DRAWS, GROUP, PEERS, SUBJECTS, Cell

LOWER_IS_BETTER = ("babyllama-1m", "stories260k")
GOAL = 10  # of the cells with groups
HEADLINE = "best"  # the method that the goal is about
MODEL, MOST = "babyllama-1m", {4: 2.248, 3: 2.315, 2: 3.0}  # the goal for perplexity there, by bits
TIMED = "AutoRound"  # the tool whose time is not to be exceeded there

RULE = (
    "A cell is a model and a width. A method of ours is *better than or equal* to the other tools there if the mean "
    "over its draws is not worse than that of any of them, over the draws that both have; *clearly better* if it is "
    "better than each by more than the spread (largest less smallest of the draws) of either, where ours has two draws "
    "at least. So a difference within "
    "the spread counts by the sign of the means alone, and a worse mean within it is not a win. A tool that cannot do "
    "a cell does not count there, as the table says; where no tool can, or one has not run, the cell is not decided."
)


@dataclass(frozen=True)
class Verdict:
    """A method of ours beside the other tools in one cell.

    Attributes:
        missing: the methods without a result or a failure; with one, or without any tool to compare with, the cell is
            not decided.
        worse: the tools whose mean is better, with both means (theirs, ours).
        clear: better than each tool by more than the spread.
    """

    subject: str
    bits: int
    missing: tuple[str, ...]
    worse: Mapping[str, tuple[float, float]]
    clear: bool

    @property
    def decided(self) -> bool:
        return not self.missing

    @property
    def won(self) -> bool:
        return self.decided and not self.worse


def qualities(cells: Mapping[str, Any], subject: str, bits: int, group: int | None, method: str) -> dict[int, float]:
    """Return the quality of each draw that was measured."""
    found = {draw: cells.get(Cell(subject, bits, group, method, draw).key, {}) for draw in range(DRAWS)}
    return {draw: result["quality"] for draw, result in found.items() if "quality" in result}


def failure(cells: Mapping[str, Any], subject: str, bits: int, group: int | None, method: str) -> str:
    """Return why a method has no figure in a cell, or an empty string."""
    found = (cells.get(Cell(subject, bits, group, method, draw).key, {}) for draw in range(DRAWS))
    return next((result["failed"] for result in found if "failed" in result), "")


def judge(cells: Mapping[str, Any], subject: str, bits: int, group: int | None, method: str) -> Verdict:
    """Compare one of our methods with the other tools in a cell, by ``RULE``."""
    ours = qualities(cells, subject, bits, group, method)
    sign = -1.0 if subject in LOWER_IS_BETTER else 1.0
    missing = [] if ours else [method]
    worse: dict[str, tuple[float, float]] = {}
    compared, clear = 0, True
    for peer in PEERS:
        theirs = qualities(cells, subject, bits, group, peer)
        common = sorted(set(ours) & set(theirs))
        if not common:
            if not failure(cells, subject, bits, group, peer):
                missing.append(peer)
            continue
        compared += 1
        a, b = [ours[draw] for draw in common], [theirs[draw] for draw in common]
        gain = sign * (sum(a) - sum(b)) / len(common)
        spread = max(max(draws.values()) - min(draws.values()) for draws in (ours, theirs))
        clear &= len(ours) > 1 and gain > spread  # one draw of ours has no spread to be beyond
        if gain < 0:
            worse[peer] = (sum(b) / len(b), sum(a) / len(a))
    if not compared and not missing:
        missing = list(PEERS)
    return Verdict(subject, bits, tuple(missing), worse, clear)


def judge_all(cells: Mapping[str, Any], group: int | None, method: str) -> list[Verdict]:
    """Return the verdicts of all models and widths."""
    return [judge(cells, subject, bits, group, method) for subject in SUBJECTS for bits in BITS]


def summary(verdicts: list[Verdict], group: int | None, method: str) -> str:
    """Return the sentence on one of our methods: how many cells are won, clearly won, lost, and not decided.

    Of the method that the goal is about, the lost cells are named.
    """
    won = [v for v in verdicts if v.won]
    lost = [v for v in verdicts if v.decided and v.worse]
    clear = sum(v.clear for v in won)
    grouping = f"groups of {group}" if group else "one scale per channel"
    parts = [
        f"With {grouping}, `{method}` is better than or equal to every other tool in {len(won)} of {len(verdicts)} "
        f"cells, clearly better in {clear}"
    ]
    if lost:
        named = ", ".join(f"{v.subject} at {v.bits} bits ({_behind(v)})" for v in lost)
        parts.append(f"behind in {named if method == HEADLINE else len(lost)}")
    undecided = len(verdicts) - len(won) - len(lost)
    if undecided:
        parts.append(f"{undecided} not decided")
    return "; ".join(parts) + "."


def goal(verdicts: list[Verdict]) -> str:
    """Return whether the goal is met, missed, or still open."""
    won = sum(v.won for v in verdicts)
    possible = won + sum(not v.decided for v in verdicts)
    state = "met" if won >= GOAL else "missed" if possible < GOAL else "open"
    return f"The goal, {GOAL} of {len(verdicts)} cells with groups of {GROUP} for `{HEADLINE}`, is {state}."


def bars(cells: Mapping[str, Any]) -> list[str]:
    """Return whether the goals for perplexity and time on ``MODEL`` are met; open while draws are missing."""
    lines = []
    for bits, most in MOST.items():
        found = list(qualities(cells, MODEL, bits, GROUP, HEADLINE).values())
        state = "open" if len(found) < DRAWS else "met" if statistics.fmean(found) <= most else "missed"
        mean = f"{statistics.fmean(found):.4f} in {len(found)} draws" if found else "not run"
        lines.append(f"- Perplexity of at most {most:.3f} at {bits} bits: {mean}, {state}.")
    pairs = _beside(cells)
    if pairs:
        ours, theirs = (statistics.median(each) for each in zip(*pairs, strict=True))
        state = "met" if ours <= theirs else "missed"
        lines.append(
            f"- No more time than {TIMED}: {ours:.0f} s in the median, {theirs:.0f} s, in {len(pairs)} "
            f"cell{'s' * (len(pairs) != 1)} that one machine computed for both, {state}."
        )
    return lines


def above_dense(cells: Mapping[str, Any], dense: Mapping[str, Any], methods: Sequence[str]) -> list[str]:
    """Return what is better than the model itself by more than the spread of its draws, with groups.

    It is an accident of rounding on that data: no method that comes closer to the model can reach it.
    """
    found = []
    for subject in (each for each in SUBJECTS if each in dense):
        sign = -1.0 if subject in LOWER_IS_BETTER else 1.0
        for bits in BITS:
            better = []
            for method in methods:
                values = list(qualities(cells, subject, bits, GROUP, method).values())
                if len(values) < 2:
                    continue
                mean = statistics.fmean(values)
                if sign * (mean - dense[subject]["quality"]) > max(values) - min(values):
                    better.append(f"{method} {mean:.4f}")
            if better:
                found.append(f"{subject} at {bits} bits ({dense[subject]['quality']:.4f}): {', '.join(better)}")
    return found


def _beside(cells: Mapping[str, Any]) -> list[tuple[float, float]]:
    """Return the processor seconds of ``HEADLINE`` and of ``TIMED`` in the cells that one machine computed for both."""
    found = []
    for bits in BITS:
        for draw in range(DRAWS):
            pair = [cells.get(Cell(MODEL, bits, GROUP, m, draw).key, {}) for m in (HEADLINE, TIMED)]
            if all("quality" in each for each in pair) and pair[0].get("machine") == pair[1].get("machine"):
                found.append((pair[0]["processor_seconds"], pair[1]["processor_seconds"]))
    return found


def _behind(verdict: Verdict) -> str:
    return "; ".join(f"{peer} {theirs:.4f}, ours {ours:.4f}" for peer, (theirs, ours) in verdict.worse.items())
