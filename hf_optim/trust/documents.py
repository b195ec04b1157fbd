"""YAML and JSON from files of others: regular files, bounded in size, depth and number of values, plain types only.

A few hundred bytes of nested aliases are gigabytes once they are expanded, a pipe never ends, and a parser that
recurses overflows. So a file is measured before it is read, and a document before it is built.
"""

from __future__ import annotations

import json
import math
import os
import re
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, OptimError
from .bounds import first_line, shown

MAX_BYTES = 50_000_000
MAX_RECIPE_BYTES = 200_000
MAX_DEPTH = 100
MAX_YAML_NODES = 20_000
MAX_DIGITS = 40
# What plain YAML resolves to. The others (timestamps, binary data, sets, objects of a language) stay out.
_TAGS = {f"tag:yaml.org,2002:{name}" for name in ("null", "bool", "int", "float", "str", "seq", "map")}
# A text that does not end is matched to its end, so that the search is linear in any input.
_BRACKETS = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"?|[\[\]{}]', re.DOTALL)


def read_json(
    path: str | Path,
    name: object = None,
    *,
    error: type[OptimError] = CheckpointError,
    max_bytes: int = MAX_BYTES,
    nonfinite: bool = False,
) -> Any:
    """Read a JSON document.

    Args:
        path: a regular file of UTF-8 text, with or without a byte order mark.
        name: the document in messages; None means ``path``.
        error: the type of the errors.
        max_bytes: the largest size.
        nonfinite: accept NaN and Infinity, which Python writes.

    Raises ``error``, which names the document, for everything else: no such file, a directory, a pipe, other text, a
    key that occurs twice, numbers of more than 40 digits, nesting of more than 100 levels.
    """
    text = read_text(path, name, error=error, max_bytes=max_bytes)
    return parse_json(text, shown_path(path) if name is None else name, error=error, nonfinite=nonfinite)


def read_mapping(
    path: str | Path,
    name: object = None,
    *,
    error: type[OptimError] = CheckpointError,
    max_bytes: int = MAX_BYTES,
    nonfinite: bool = False,
) -> dict[str, Any]:
    """Read a JSON document that is a mapping. Raises ``error`` as ``read_json`` does, and for other documents."""
    data = read_json(path, name, error=error, max_bytes=max_bytes, nonfinite=nonfinite)
    return require_mapping(data, shown_path(path) if name is None else name, error=error)


def require_mapping(data: Any, name: object, *, error: type[OptimError] = CheckpointError) -> dict[str, Any]:
    """Return ``data``, which must be a mapping. Raises ``error``, which names the document."""
    if not isinstance(data, dict):
        raise error(f"{name} is corrupt: it holds a value of type {type(data).__name__}, not a mapping")
    return data


def read_text(
    path: str | Path, name: object = None, *, error: type[OptimError] = CheckpointError, max_bytes: int = MAX_BYTES
) -> str:
    """Read a regular file of UTF-8 text. Raises ``error``, which names it as ``name`` (None means ``path``)."""
    name = shown_path(path) if name is None else name
    try:
        # Opening a pipe waits for a writer, unless it is opened without blocking.
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
        with open(descriptor, "rb") as file:
            kind = os.fstat(descriptor)
            if not stat.S_ISREG(kind.st_mode):
                raise error(f"{name} is not a regular file")
            if kind.st_size > max_bytes:
                raise error(f"{name} has {kind.st_size:,} bytes; at most {max_bytes:,} are read")
            raw = file.read(max_bytes + 1)
    except OptimError:
        raise
    except (OSError, ValueError) as reason:
        raise error(f"{name} cannot be read: {getattr(reason, 'strerror', None) or first_line(reason)}") from reason
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as reason:
        raise error(f"{name} is not UTF-8 text (byte {reason.start}): save it as UTF-8") from reason


def shown_path(path: object) -> str:
    """Return a path for a message: as it is, or escaped and shortened if it is not printable."""
    text = str(path)
    return text if text.isprintable() and len(text) < 4000 else shown(text)


def parse_json(text: str, name: object, *, error: type[OptimError] = CheckpointError, nonfinite: bool = False) -> Any:
    """Parse JSON text under the limits of ``read_json``; ``name`` is the document in messages. Raises ``error``."""
    try:
        return loads(text, nonfinite=nonfinite)
    except ValueError as reason:
        raise error(f"{name} is corrupt ({first_line(reason)}); write or copy it again") from reason


def loads(text: str, *, nonfinite: bool = False) -> Any:
    """Parse JSON text under the limits of ``read_json``. Raises ``ValueError``."""
    try:
        _require_shallow(text)
        return json.loads(
            text,
            object_pairs_hook=_without_duplicates,
            parse_int=_integer,
            parse_float=_number if not nonfinite else float,
            parse_constant=float if nonfinite else _refuse_constant,
        )
    except RecursionError as reason:
        raise ValueError("it is nested too deeply") from reason


def parse_yaml(text: str, name: object, *, error: type[OptimError] = CheckpointError, what: str = "plain YAML") -> Any:
    """Parse one YAML document of plain types; ``name`` is the document in messages, ``what`` what it should be.

    Aliases are followed while the document with all of them written out has at most 20,000 values. Raises ``error``
    for more, for an alias inside its own anchor, tags, merge keys, keys that are not text or occur twice, numbers of
    more than 40 digits, and nesting of more than 100 levels.
    """
    import yaml

    kind: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml, where it is: ten times as fast
    try:
        depth = 0
        for count, event in enumerate(yaml.parse(text, Loader=kind)):
            if isinstance(event, (yaml.MappingStartEvent, yaml.SequenceStartEvent)):
                depth += 1
            elif isinstance(event, (yaml.MappingEndEvent, yaml.SequenceEndEvent)):
                depth -= 1
            if depth > MAX_DEPTH:
                raise ValueError(f"it is nested more than {MAX_DEPTH} levels deep")
            if count > 2 * MAX_YAML_NODES:
                raise ValueError(f"it has more than {MAX_YAML_NODES:,} values")
        loader = kind(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            _count(node, {}, set())
            return _build(node, loader)
        finally:
            loader.dispose()
    except (yaml.YAMLError, ValueError, RecursionError, OverflowError) as reason:
        raise error(f"{name} is not {what}: {_yaml_reason(reason)}") from reason


def _require_shallow(text: str) -> None:
    depth = 0
    for match in _BRACKETS.finditer(text):
        mark = match.group()
        depth += (mark in "[{") - (mark in "]}") if len(mark) == 1 else 0
        if depth > MAX_DEPTH:
            raise ValueError(f"it is nested more than {MAX_DEPTH} levels deep")


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {shown(twice)} occurs twice")
    return found


def _integer(text: str) -> int:
    if len(text) > MAX_DIGITS:
        raise ValueError(f"a number has {len(text)} digits")
    return int(text)


def _number(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"the number {shown(text)} is too large")
    return number


def _refuse_constant(text: str) -> float:
    raise ValueError(f"{text} is not a JSON number")


# -- YAML -------------------------------------------------------------------------------------------------------------
def _children(node: Any) -> list[Any]:
    import yaml

    if isinstance(node, yaml.MappingNode):
        return [part for pair in node.value for part in pair]
    return list(node.value) if isinstance(node, yaml.SequenceNode) else []


def _count(node: Any, known: dict[int, int], above: set[int]) -> int:
    """Return the number of values of a node with its aliases written out. Raises ``ValueError`` above the limit."""
    if id(node) in above:
        raise ValueError("an alias stands inside its own anchor")
    if id(node) not in known:
        above.add(id(node))
        known[id(node)] = 1 + sum(_count(part, known, above) for part in _children(node))
        above.remove(id(node))
    if known[id(node)] > MAX_YAML_NODES or len(above) > MAX_DEPTH:
        raise ValueError(f"it has more than {MAX_YAML_NODES:,} values with its aliases written out")
    return known[id(node)]


def _build(node: Any, loader: Any) -> Any:
    import yaml

    if node.tag == "tag:yaml.org,2002:timestamp":
        return node.value  # a date is text: recipes and records have none
    if node.tag == "tag:yaml.org,2002:merge":
        raise ValueError("merge keys (<<) are not supported: write the fields out")
    if node.tag not in _TAGS:
        raise ValueError(f"the tag {shown(node.tag)} is not supported: write plain texts, numbers, lists and mappings")
    if isinstance(node, yaml.SequenceNode):
        _require_tag(node, "seq")
        return [_build(part, loader) for part in node.value]
    if isinstance(node, yaml.MappingNode):
        _require_tag(node, "map")
        found: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = _build(key_node, loader)
            if not isinstance(key, str):
                raise ValueError(f"the key {shown(key)} is not text: put it in quotation marks")
            if key in found:
                raise ValueError(f"the key {shown(key)} occurs twice")
            found[key] = _build(value_node, loader)
        return found
    kind = node.tag.rpartition(":")[2]
    if kind in ("int", "float") and len(node.value) > MAX_DIGITS:
        raise ValueError(f"a number has {len(node.value)} digits")
    builder: Callable[[Any], Any] = getattr(loader, f"construct_yaml_{kind}")
    try:
        return builder(node)
    except (KeyError, IndexError, AttributeError, TypeError) as error:
        raise ValueError(f"{shown(node.value)} is not a {kind}") from error


def _require_tag(node: Any, kind: str) -> None:
    if node.tag.rpartition(":")[2] != kind:
        raise ValueError(f"a {kind} has the tag {shown(node.tag)}")


def _yaml_reason(error: BaseException) -> str:
    problem, mark = getattr(error, "problem", None), getattr(error, "problem_mark", None)
    if problem is None:
        return first_line(error)
    return f"{str(problem)[:200]}" + (f" (line {mark.line + 1}, column {mark.column + 1})" if mark is not None else "")
