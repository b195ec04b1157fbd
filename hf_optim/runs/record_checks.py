"""What the entries of a record may be: checks of ``hf_optim.json``, which may come from a stranger.

A shape is a type, a tuple of types, ``[shape]`` for a list, ``{"key": shape}`` for a mapping with optional known keys
(others are kept as they are) or ``{...: shape}`` for one with any keys.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..recipes.contract import Reload
from ..trust.bounds import shown

NUMBER = (int, float, type(None))
TEXT = (str, type(None))
SCALAR = (str, int, float, bool, type(None))
# Longer lists and larger numbers belong to no model.
MAX_STEPS, LARGEST = 1000, 1e18


def _index(key: str) -> None:
    if not (key.isascii() and key.isdigit() and int(key) < MAX_STEPS):
        raise ValueError("its keys must be the indices of steps")


def _path(value: str) -> None:
    parts = value.replace("\\", "/").split("/")
    if not value or ".." in parts or parts[0] in ("", "~") or ":" in value or len(value) > 500:
        raise ValueError("it must be a path in the checkpoint")


def _pattern(value: list[int]) -> None:
    if len(value) != 2 or not 0 < value[0] <= value[1]:
        raise ValueError("it must be [N, M] with 0 < N <= M")


class Of:
    """A shape with a further check of the value."""

    def __init__(self, shape: Any, check: Callable[[Any], None]) -> None:
        self.shape, self.check = shape, check


_RECIPE = {
    "steps": [{"technique": str}],
    "calibration": {...: SCALAR},
    "training": {...: object},
    "driver": str,
    "description": str,
}
_COVERAGE = {
    "weights_touched": (int, float),
    "weights_total": (int, float),
    "share": (int, float),
    "skipped": {...: [str]},
    "left_alone": {...: {"reason": str, "names": [str], "weights": (int, float)}},
}
_SECTION = {
    "kind": str,
    "title": str,
    "markdown": str,
    "header": [str],
    "rows": [[SCALAR]],
    "path": Of(str, _path),
    "alt": str,
}
_REQUIRED = {
    "paragraph": ("title", "markdown"),
    "table": ("title", "header", "rows"),
    "figure": ("title", "path", "alt"),
}
SHAPES: dict[str, Any] = {
    "recipe": _RECIPE,
    "base_model": {...: SCALAR},
    "calibration": {...: SCALAR},
    "stages": [
        {
            "steps": [str],
            "driver": TEXT,
            "device": TEXT,
            "data": TEXT,
            "seconds": NUMBER,
            "peak_memory_bytes": NUMBER,
            "peak_memory_of": TEXT,
        }
    ],
    "coverage": {...: _COVERAGE},
    "steps": {...: {"technique": str, "layer_metric": TEXT}},
    "measured": {
        "before": {...: SCALAR},
        "after": {...: SCALAR},
        "control": {...: SCALAR},
        "accelerated": {...: SCALAR},
        "timing": {...: SCALAR},
        "evaluation": {...: SCALAR},
    },
    "reload": str,
    "traits": [str],
    "pruned": {...: {"weights": int, "zeros": int, "pattern": Of([int], _pattern)}},
    "notes": [str],
    "sections": [_SECTION],
    "finished": bool,
    "weights": {...: str},
    "versions": {...: str},
    "schema": int,
}


def check_record(data: dict[str, Any]) -> dict[str, Any]:
    """Return the entries of a record. Raises ``ValueError``, which names the first that has another shape."""
    for key, value in data.items():
        _check(value, SHAPES[key], key)
    for step in data.get("recipe", {}).get("steps", ()):
        _require(step, ("technique",), "recipe.steps")
    for key in data.get("steps", {}):
        _index(key)
    for entry in data.get("coverage", {}).values():
        _require(entry, ("weights_touched", "weights_total", "share", "skipped"), "coverage")
        for part in entry.get("left_alone", {}).values():
            _require(part, ("reason", "names", "weights"), "coverage.left_alone")
    for entry in data.get("pruned", {}).values():
        _require(entry, ("weights", "zeros"), "pruned")
    for section in data.get("sections", ()):
        kind = section.get("kind")
        if kind not in _REQUIRED:
            raise ValueError(f"sections has the unknown kind {shown(kind)}")
        _require(section, _REQUIRED[kind], f"a {kind} of sections")
        if kind == "table" and any(len(row) != len(section["header"]) for row in section["rows"]):
            raise ValueError("a table of sections has rows of another length than its header")
    if data.get("reload", "STOCK_DENSE") not in Reload.__members__:
        raise ValueError(f"reload is {shown(data['reload'])}, not one of {', '.join(Reload.__members__)}")
    evaluation = data.get("measured", {}).get("evaluation")
    if evaluation:
        _require(evaluation, ("dataset",), "measured.evaluation")
    return data


def _check(value: Any, shape: Any, where: str) -> None:
    if isinstance(shape, Of):
        _check(value, shape.shape, where)
        try:
            shape.check(value)
        except ValueError as error:
            raise ValueError(f"{where} is {shown(value)}: {error}") from None
    elif isinstance(shape, list):
        if not isinstance(value, list):
            raise ValueError(f"{where} is {shown(value)}, not a list")
        for part in value:
            _check(part, shape[0], where)
    elif isinstance(shape, dict):
        if not isinstance(value, dict):
            raise ValueError(f"{where} is {shown(value)}, not a mapping")
        for key, part in value.items():
            if key in shape or ... in shape:
                _check(part, shape.get(key, shape.get(...)), f"{where}.{key[:60]}")
    else:
        _check_plain(value, shape, where)


def _check_plain(value: Any, shape: Any, where: str) -> None:
    types = shape if isinstance(shape, tuple) else (shape,)
    # True is an int for Python.
    if not isinstance(value, types) or (isinstance(value, bool) and bool not in types and object not in types):
        raise ValueError(f"{where} is {shown(value)}, not {' or '.join(sorted(t.__name__ for t in types))}")
    if isinstance(value, (int, float)) and not isinstance(value, bool) and LARGEST < abs(value) < float("inf"):
        raise ValueError(f"{where} is {shown(value)}, which is too large")


def _require(entry: dict[str, Any], keys: tuple[str, ...], where: str) -> None:
    for key in keys:
        if key not in entry:
            raise ValueError(f"{where} has no {key}")
