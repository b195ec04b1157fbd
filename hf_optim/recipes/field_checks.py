"""Declare the ranges of a technique's fields, and check values against ranges and annotations."""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Iterable
from dataclasses import field
from typing import Any
from weakref import WeakKeyDictionary

from ..errors import RecipeError
from ..trust.bounds import shown
from ..trust.patterns import compile_pattern

# Larger numbers fit into no tensor, and longer texts name no module.
LARGEST, LONGEST = 2**63, 500


def option(
    default: Any = dataclasses.MISSING,
    *,
    low: float | None = None,
    high: float | None = None,
    below: float | None = None,
    above: float | None = None,
    choices: Iterable[Any] | None = None,
    infinite: bool = False,
) -> Any:
    """Declare a field with a range: ``low <= value <= high``, ``above < value < below``, or one of ``choices``.

    The value is checked when the technique is constructed. ``None`` passes if the annotation admits it. A float must be
    finite, unless ``infinite`` is set; NaN never passes. Raises ``TypeError`` for a mutable default.
    """
    limits = {"low": low, "high": high, "below": below, "above": above, "choices": choices and tuple(choices)}
    metadata = {key: value for key, value in limits.items() if value is not None} | {"infinite": infinite}
    if isinstance(default, (list, dict, set)):
        raise TypeError("a technique is frozen: give a tuple as the default")
    return field(default=default, metadata=metadata)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the nearest of ``known``, or an empty string."""
    word, names = str(word)[:60], [str(name) for name in known]
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.7)
    # A prefix counts, however long the rest of the name is.
    close = close or [name for name in names if len(word) > 2 and name.startswith(word)]
    return f"; did you mean {close[0]!r}?" if close else ""


def nearest(word: str, known: Iterable[str]) -> list[str]:
    """Return at most four of ``known`` that are most like ``word`` (case does not count), the most alike first."""
    names = sorted(map(str, known))
    return difflib.get_close_matches(str(word)[:60].lower(), names, n=4, cutoff=0.4)


_annotations: WeakKeyDictionary[type, dict[str, Any]] = WeakKeyDictionary()


def _hints(cls: type) -> dict[str, Any]:
    """Return the annotations of a class, evaluated once: a catalogue is checked in thousands of combinations."""
    if cls not in _annotations:
        _annotations[cls] = typing.get_type_hints(cls)
    return _annotations[cls]


def check_fields(step: Any) -> None:
    """Raise ``RecipeError`` if a field of a technique (a dataclass with a ``name``) does not fit its type or range.

    Lists become tuples, and whole numbers become floats where the annotation has only ``float``.
    """
    hints = _hints(type(step))
    for f in dataclasses.fields(step):
        value = getattr(step, f.name)
        if isinstance(value, list):
            value = tuple(value)
            object.__setattr__(step, f.name, value)
        if isinstance(value, int) and not isinstance(value, bool) and admits(hints[f.name], 0.5):
            if abs(value) >= LARGEST:
                raise RecipeError(f"{step.name}: {f.name} must be below 2^63, not {shown(value)}")
            value = value if admits(hints[f.name], 1) else float(value)
            object.__setattr__(step, f.name, value)
        if not admits(hints[f.name], value):
            raise _wrong_type(f"{step.name}: {f.name}", value, hints[f.name])
        if value is not None:
            _check_value(f"{step.name}: {f.name}", value, f.metadata.get("infinite", False))
            _check_range(f"{step.name}: {f.name}", value, f.metadata)


def _check_value(what: str, value: Any, infinite: bool) -> None:
    for part in value if isinstance(value, tuple) else (value,):
        if isinstance(part, int) and abs(part) >= LARGEST:
            raise RecipeError(f"{what} must be below 2^63, not {shown(value)}")
        if isinstance(part, str) and len(part) > LONGEST:
            raise RecipeError(f"{what} has a text of {len(part):,} characters; at most {LONGEST} are read")
        if isinstance(part, str) and part.startswith("re:"):
            try:
                compile_pattern(part[3:])
            except ValueError as error:
                raise RecipeError(f"{what}: {error}") from error
        if isinstance(part, float) and not (math.isfinite(part) or (infinite and math.isinf(part))):
            raise RecipeError(f"{what} must be a finite number, not {shown(value)}")


def _check_range(what: str, value: Any, limits: typing.Mapping[str, Any]) -> None:
    if "choices" in limits and value not in limits["choices"]:
        raise _wrong_choice(what, value, limits["choices"])
    for key, sign, holds in (
        ("low", ">=", lambda v, b: v >= b),
        ("high", "<=", lambda v, b: v <= b),
        ("above", ">", lambda v, b: v > b),
        ("below", "<", lambda v, b: v < b),
    ):
        if key in limits and not holds(value, limits[key]):
            raise RecipeError(f"{what} must be {sign} {limits[key]}, not {shown(value)}")


def _wrong_type(what: str, value: Any, hint: Any) -> RecipeError:
    choices = literal_choices(hint)
    if choices:
        return _wrong_choice(what, value, choices)
    remedy = f"; write [{value}]" if isinstance(value, str) and len(value) < 60 and admits(hint, (value,)) else ""
    return RecipeError(f"{what} must be {describe_type(hint)}, not {shown(value)}{remedy}")


def _wrong_choice(what: str, value: Any, choices: Iterable[Any]) -> RecipeError:
    choices = tuple(choices)
    hint = did_you_mean(value, choices) if isinstance(value, str) else ""
    return RecipeError(f"{what} must be one of {', '.join(map(repr, choices))}, not {shown(value)}{hint}")


def literal_choices(hint: Any) -> tuple[Any, ...]:
    """Return the values that a ``Literal`` admits (and None, if a union has it); empty for other types."""
    if typing.get_origin(hint) is typing.Literal:
        return typing.get_args(hint)
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        arms = [(None,) if arm is type(None) else literal_choices(arm) for arm in typing.get_args(hint)]
        found = tuple(value for arm in arms for value in arm)
        return found if all(arms) and found != (None,) else ()
    return ()


def admits(hint: Any, value: Any) -> bool:
    """Return True if a value has the annotated type. A bool is not an int here."""
    origin = typing.get_origin(hint)
    if hint is Any:
        return True
    if hint is None or hint is type(None):
        return value is None
    if origin in (typing.Union, types.UnionType):
        return any(admits(arm, value) for arm in typing.get_args(hint))
    if origin is typing.Literal:
        return value in typing.get_args(hint)
    if origin is tuple:
        arms = typing.get_args(hint)
        if not isinstance(value, tuple):
            return False
        if len(arms) == 2 and arms[1] is Ellipsis:
            return all(admits(arms[0], v) for v in value)
        return len(arms) == len(value) and all(admits(a, v) for a, v in zip(arms, value, strict=True))
    if origin is not None:
        return isinstance(value, origin)
    if hint in (int, float) and isinstance(value, bool):
        return False
    return isinstance(value, hint)


def admits_json(hint: Any, value: Any) -> bool:
    """Return True if a JSON value has the annotated type, keys and values of mappings and lists included.

    Whole numbers pass for floats; a number must be finite and below 2^63.
    """
    kinds = typing.get_args(hint)
    if isinstance(value, dict) and typing.get_origin(hint) is dict:
        return all(admits_json(kinds[0], key) and admits_json(kinds[1], inner) for key, inner in value.items())
    if isinstance(value, list) and typing.get_origin(hint) is list:
        return all(admits_json(kinds[0], inner) for inner in value)
    if isinstance(value, (int, float)) and not isinstance(value, bool) and not abs(value) < LARGEST:
        return False
    return admits(hint, value) or (type(value) is int and admits(hint, float(value)))


_PLURALS = {str: "names", int: "whole numbers", float: "numbers", bool: "booleans"}


def describe_type(hint: Any) -> str:
    """Return a type in words: ``int | None``, ``a list of names``."""
    if hint is None or hint is type(None):
        return "None"
    origin, arms = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " | ".join(map(describe_type, arms))
    if origin is typing.Literal:
        return " | ".join(map(repr, arms))
    if origin is tuple and len(arms) == 2 and arms[1] is Ellipsis:
        return f"a list of {_PLURALS.get(arms[0], describe_type(arms[0]))}"
    return hint.__name__ if isinstance(hint, type) and origin is None else str(hint).replace("typing.", "")
