"""Mutations of documents and files, drawn from a seeded generator."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from random import Random
from typing import Any

# fmt: off
VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2, 7, 2**31, 2**63, 10**30, 0.5, -0.0, 1e30, 1e-30, "", " ", "0", "x", "auto",
    "x" * 5000, "../../../x", "/etc/passwd", "a/b", "\x00", "\u202e", "\x1b[31m", "<script>", "$x^{", "`", "org/name",
    "[]", [], {}, [[]], [{}], {"": None}, [None], [0] * 50, {"a": {"b": {"c": {}}}}, ["a", 1, None], "re:(",
    "re:(.*)*x", "*", "Linear", "float32", "int8", "nan", float("nan"), float("inf"),
)
# fmt: on
NUMBERS = (lambda n: -n, lambda n: n + 1, lambda n: n - 1, lambda n: n * 2, lambda n: n * 1000003, lambda n: n / 2)
WORDS = (b"\xff", b"\x00", b"\xef\xbb\xbf", b"\n", *b'{ } [ " : , NaN *a &a <<: - !!python/object:x \\ 1e999'.split())


def places(tree: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the paths of all values in nested mappings and lists."""
    found = [path]
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        found += places(value, (*path, key))
    return found


def mutate_tree(tree: Any, random: Random) -> Any:
    """Return a copy of a JSON document with one to three changes."""
    tree = copy.deepcopy(tree)
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        tree = _change(tree, random.choice(places(tree)), random)
    return tree


def _change(tree: Any, path: tuple[Any, ...], random: Random) -> Any:
    if not path:
        return random.choice(VALUES) if random.random() < 0.1 else tree
    holder = tree
    for key in path[:-1]:
        holder = holder[key]
    last, kind = path[-1], random.random()
    value = holder[last]
    if kind < 0.5:
        holder[last] = copy.deepcopy(random.choice(VALUES))
    elif kind < 0.6 and isinstance(value, (int, float)) and not isinstance(value, bool):
        holder[last] = random.choice(NUMBERS)(value)
    elif kind < 0.7:
        del holder[last]
    elif kind < 0.8 and isinstance(holder, dict):
        holder[random.choice(("", "x", "__class__", f"{last}_", last[:-1]))] = holder.pop(last)
    elif kind < 0.9 and isinstance(value, str):
        holder[last] = _scramble(value.encode(), random).decode("utf-8", "replace")
    elif isinstance(holder, list):
        holder.insert(random.randrange(len(holder) + 1), copy.deepcopy(value))
    else:
        holder[f"{last}2"] = copy.deepcopy(value)
    return tree


def _scramble(raw: bytes, random: Random) -> bytes:
    return mutate_bytes(raw, random) if raw else b"x"


def mutate_bytes(raw: bytes, random: Random) -> bytes:
    """Return ``raw`` with flipped bits, something cut out, inserted or repeated, or other content altogether."""
    data = bytearray(raw)
    for _ in range(random.choice((1, 1, 2, 8))):
        at = random.randrange(len(data) + 1)
        end = min(len(data), at + random.choice((1, 4, 64, 10_000)))
        kind = random.randrange(7)
        if kind == 0 and at < len(data):
            data[at] ^= 1 << random.randrange(8)
        elif kind == 1:
            del data[at:end]
        elif kind == 2:
            data[at:at] = random.choice(WORDS)
        elif kind == 3:
            data[at:at] = data[at:end]
        elif kind == 4:
            del data[at:]
        elif kind == 5:
            data[at:at] = random.randbytes(random.choice((1, 16)))
        elif random.random() < 0.2:
            data = bytearray(random.choice((b"", b"\x00" * 100, b"[" * 20_000, b"{}", random.randbytes(50))))
    return bytes(data)


def mutate_json(raw: bytes, random: Random) -> bytes:
    """Return a JSON document with changed values, or with changed bytes."""
    if random.random() < 0.2:
        return mutate_bytes(raw, random)
    return dumps(mutate_tree(json.loads(raw), random))


def dumps(tree: Any) -> bytes:
    """Return JSON text of a document that may hold any text and number."""
    return json.dumps(tree, default=str).encode("utf-8", "surrogatepass")


Mutation = Callable[[bytes, Random], bytes]


def mutate_safetensors(raw: bytes, random: Random) -> bytes:
    """Return a safetensors file with a changed header, or with changed bytes."""
    if random.random() < 0.3:
        return mutate_bytes(raw, random)
    length = int.from_bytes(raw[:8], "little")
    header = mutate_json(raw[8 : 8 + length], random)
    stated = len(header) if random.random() < 0.9 else random.choice((0, 7, 2**40, 2**63 + 1))
    return stated.to_bytes(8, "little") + header + raw[8 + length :]
