"""Read the numbers of a card back: each must be a number of the record, or follow from some by simple arithmetic."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

_NAME = re.compile(r"`[^`]*`")
_NUMBER = re.compile(r"(?<![\w.,])[-+]?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?(?!\w)")


def scrambled(reported: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entry of a step with every number replaced by another one, no two of them alike."""
    return dict(_changed(copy.deepcopy(dict(reported)), iter(range(1, 100_000))))


def _changed(value: Any, count: Iterator[int]) -> Any:
    if isinstance(value, Mapping):
        return {key: _changed(part, count) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_changed(part, count) for part in value]
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return value
    return value + 7 * next(count) if isinstance(value, int) else (value or 0.01) * (1.1 + 0.013 * next(count))


def unexplained(
    shown: Sequence[Mapping[str, Any]], before: Sequence[Mapping[str, Any]], entry: Mapping[str, Any]
) -> list[str]:
    """Return the numbers of sections that changed with the record, and are none of it.

    Args:
        shown: the sections that a step added to the card for ``entry``.
        before: those that it added for another entry; a number that is the same in both comes from the fields of the
            step, or is part of the text.
        entry: what the step reported.
    """
    wrong = []
    for section, former in zip(shown, before, strict=True):
        for text, old, candidates, where in _texts(section, former, entry):
            tokens, olds = _numbers(text), _numbers(old)
            changed = [t for i, t in enumerate(tokens) if len(olds) != len(tokens) or t != olds[i]]
            wrong += [f"{where}: {token}" for token in changed if not any(_rounds_to(c, token) for c in candidates)]
    return wrong


def _texts(
    section: Mapping[str, Any], former: Mapping[str, Any], entry: Mapping[str, Any]
) -> Iterator[tuple[str, str, list[float], str]]:
    """Yield the texts of a section with numbers, each with the numbers that it may show."""
    whole = _derived(entry)
    if section["kind"] == "paragraph":
        yield section["markdown"], former["markdown"], whole, section["title"]
    if section["kind"] != "table":
        return
    sums = whole + _group_sums(entry)
    for row, old in zip(section["rows"], former["rows"], strict=True):
        where, name = f"{section['title']}, {row[0]}", str(row[0]).strip("`")
        own = [value[name] for value in entry.values() if isinstance(value, Mapping) and name in value]
        in_order = next((part for part in own if isinstance(part, (list, tuple)) and len(part) == len(row) - 1), None)
        for column, (cell, former_cell) in enumerate(zip(row[1:], old[1:], strict=True)):
            one = [in_order[column]] if in_order is not None else own
            yield str(cell), str(former_cell), _derived(one) if own else sums, where


def _numbers(text: str) -> list[str]:
    return _NUMBER.findall(_NAME.sub("", text))


def _leaves(value: Any) -> Iterator[float]:
    if isinstance(value, (Mapping, list, tuple)):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from _leaves(part)
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield float(value)


def _sizes(value: Any) -> Iterator[float]:
    if isinstance(value, (Mapping, list, tuple)):
        yield float(len(value))
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from _sizes(part)


def _derived(value: Any) -> list[float]:
    """Return the numbers of an entry, shares of 1 and in percent, ratios of its own numbers, and lengths."""
    found = list(_leaves(value))
    own = [float(v) for v in value.values() if isinstance(v, (int, float))] if isinstance(value, Mapping) else []
    ratios = [a / b for a in own for b in own if b and a is not b]
    shares = [share for v in (*found, *ratios) for share in (v, 1 - v)]
    return [*shares, *(100 * share for share in shares), *_sizes(value)]


def _group_sums(entry: Mapping[str, Any]) -> list[float]:
    """Return what a table shows of layers whose names differ in the block index: count, sums and shares of zeros."""
    groups: dict[str, list[Sequence[int]]] = {}
    for name, counts in entry.get("counted", {}).items():
        groups.setdefault(re.sub(r"\.\d+(?=\.|$)", ".*", name), []).append(counts)
    found: list[float] = []
    for counts in groups.values():
        weights, zeros = (sum(column) for column in zip(*counts, strict=True))
        shares = [own / size for size, own in counts]
        found += [len(counts), weights, *(100 * share for share in (zeros / weights, min(shares), max(shares)))]
    return found


def _rounds_to(value: float, token: str) -> bool:
    """Return True if a number, written with as many digits as ``token`` has, is that token."""
    mantissa, _, exponent = token.replace(",", "").partition("e")
    unit = 10.0 ** (int(exponent or 0) - len(mantissa.partition(".")[2]))
    return abs(value - float(token.replace(",", ""))) <= 0.5001 * unit


def title(section: Mapping[str, Any]) -> tuple[str, str]:
    """Return kind and title of a section, which tell it from the others of a card."""
    return section["kind"], section["title"]
