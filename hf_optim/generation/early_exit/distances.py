"""How far two sequences of tokens are apart, from 0 to 1."""

from __future__ import annotations

from collections.abc import Callable, Sequence

Tokens = Sequence[int]


def rouge_l(found: Tokens, expected: Tokens) -> float:
    """Return 1 - F1 of the longest common subsequence (Lin 2004), over tokens. Two empty sequences are equal."""
    if not found and not expected:
        return 0.0
    head, found, expected = _without_common_ends(found, expected)
    length = len(found) + len(expected) + 2 * head
    row = [0] * (len(expected) + 1)
    for token in found:
        before = 0
        for place, other in enumerate(expected, 1):
            here = row[place]
            row[place] = before + 1 if token == other else max(here, row[place - 1])
            before = here
    return 1 - 2 * (row[-1] + head) / length


def edit_distance(found: Tokens, expected: Tokens) -> float:
    """Return the least insertions, deletions and substitutions of tokens, as a share of the longer sequence."""
    longest = max(len(found), len(expected))
    if not longest:
        return 0.0
    _, found, expected = _without_common_ends(found, expected)
    row = list(range(len(expected) + 1))
    for line, token in enumerate(found, 1):
        before, row[0] = row[0], line
        for place, other in enumerate(expected, 1):
            here = row[place]
            row[place] = min(here + 1, row[place - 1] + 1, before + (token != other))
            before = here
    return row[-1] / longest


def _without_common_ends(found: Tokens, expected: Tokens) -> tuple[int, Tokens, Tokens]:
    """Return how many tokens two sequences share at their ends, and the sequences without them."""
    shorter = min(len(found), len(expected))
    head = next((i for i in range(shorter) if found[i] != expected[i]), shorter)
    rest = shorter - head
    tail = next((i for i in range(rest) if found[-1 - i] != expected[-1 - i]), rest)
    return head + tail, found[head : len(found) - tail], expected[head : len(expected) - tail]


DISTANCES: dict[str, Callable[[Tokens, Tokens], float]] = {"rouge_l": rouge_l, "edit_distance": edit_distance}
