"""Code of a checkpoint: it runs with the caller's word, or if this very run wrote it.

A checkpoint brings code in three ways: Python files that an ``auto_map`` names (its own, or those of another
repository: ``org/name--module.Class``), a folder ``custom_generate``, and a kernel on the Hub that its configuration
names as its attention (``org/name``). transformers asks on the terminal if it got neither True nor False, so every call
of hf_optim passes one of them.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from .bounds import shown
from .documents import read_json
from .headers import MAX_HEADER_BYTES
from .lookup import Where

AUTO_MAP = "auto_map"
CONFIG = "config.json"
# Keys of configurations that name code: modules by class name, and pipelines of their own.
REFERENCES = (AUTO_MAP, "custom_pipelines")
KERNELS = ("attn_implementation", "_attn_implementation", "experts_implementation", "_experts_implementation")
CODE_SUFFIXES = (".py", ".pyc", ".pyd", ".so", ".pth")


def may_run(word: object) -> bool:
    """Return True if the caller allowed the code of a checkpoint: by True itself, and by nothing that counts as true.

    A text such as ``"false"`` would count as true for transformers.
    """
    return word is True


@dataclass(frozen=True)
class WrittenCode:
    """The code that a run generated for its result.

    Attributes:
        hashes: name of each file -> the SHA-256 of its content, in hex.
        auto_map: the ``auto_map`` that names its classes.
    """

    hashes: Mapping[str, str]
    auto_map: Mapping[str, str]

    @classmethod
    def of(cls, name: str, text: str, auto_map: Mapping[str, str]) -> WrittenCode:
        """Return that of one file with this text (stored as UTF-8)."""
        return cls({name: sha256(text.encode("utf-8"))}, dict(auto_map))


def sha256(content: bytes) -> str:
    """Return the SHA-256 of ``content`` in hex."""
    return hashlib.sha256(content).hexdigest()


def is_written_by_run(home: Path, written: WrittenCode | None) -> bool:
    """Return True if all code in the checkpoint in ``home``, and all that it names, is what the run wrote.

    False if there is a file of code that it did not write or that has other content, a reference to any other class, or
    a configuration that cannot be read; also if the run wrote no code.
    """
    if written is None:
        return False
    found = {str(path.relative_to(home)): path for path in home.rglob("*") if path.suffix in CODE_SUFFIXES}
    if found.keys() != written.hashes.keys():
        return False
    if any(path.is_symlink() or not path.is_file() for path in found.values()):
        return False
    if any(sha256(path.read_bytes()) != written.hashes[name] for name, path in found.items()):
        return False
    try:
        named = [pair for path in sorted(home.rglob("*.json")) for pair in _named_code(_read(path))]
    except CheckpointError:
        return False
    return all(key == AUTO_MAP and written.auto_map.get(auto) == name for key, auto, name in named)


def drop_references(path: Path, kept: Mapping[str, str] | None = None) -> None:
    """Remove the references to code from a configuration file, except those of ``kept`` (auto class -> class).

    The stock class that wrote the file has kept what its source said, although it never used it. A file that does not
    exist, or names no code, is not touched.
    """
    if not path.is_file():
        return
    data = _read(path)
    cleaned = _without_references(data, dict(kept or {}))
    if cleaned != data:
        path.write_text(json.dumps(cleaned, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def is_stock(thing: object) -> bool:
    """Return True if the class of ``thing`` is one of transformers, and not code of a checkpoint that it imported."""
    return type(thing).__module__.partition(".")[0] == "transformers"


def require_no_kernels(source: str | os.PathLike[str], word: object = False, **lookup: Any) -> None:
    """Raise ``CheckpointError`` if a configuration names a kernel on the Hub, without the caller's word.

    A kernel is compiled code, which transformers downloads and imports.

    Args:
        source: the Hub id or directory of the checkpoint.
        word: the caller's ``trust_remote_code``.
        lookup: how files are found on the Hub (``revision``, ``token`` ...).
    """
    config = (
        None if may_run(word) else Where(os.fspath(source), lookup.pop("subfolder", None) or "", lookup).find(CONFIG)
    )
    if config is None:
        return
    for key, value in _items(_read(config, f"{CONFIG} of {source}")):
        names = value.values() if key in KERNELS and isinstance(value, dict) else [value] if key in KERNELS else []
        for name in names:
            if isinstance(name, str) and "/" in name:
                raise CheckpointError(
                    f"config.json of {source} names the kernel {shown(name)}, which is code: if you trust it, pass "
                    "trust_remote_code=True (--trust-remote-code), or remove the entry"
                )


def _read(path: Path, name: object = None) -> Any:
    # transformers writes Infinity (Mamba's limits of time steps).
    return read_json(path, name, max_bytes=MAX_HEADER_BYTES, nonfinite=True)


def _named_code(data: Any) -> Iterator[tuple[str, str, Any]]:
    """Yield (key, auto class, class) of every reference to code in a configuration, nested ones included."""
    for key, value in _items(data):
        if key not in REFERENCES or not value:
            continue
        if not isinstance(value, dict):
            yield key, "", value
            continue
        for auto, name in value.items():
            yield key, auto, name


def _items(data: Any) -> Iterator[tuple[str, Any]]:
    """Yield all entries of nested mappings and lists."""
    waiting = [data]
    while waiting:
        part = waiting.pop()
        if isinstance(part, dict):
            yield from part.items()
            waiting += part.values()
        elif isinstance(part, list):
            waiting += part


def _without_references(data: Any, kept: Mapping[str, str]) -> Any:
    def allowed(key: str, value: Any) -> Any:
        named = value.items() if key == AUTO_MAP and isinstance(value, dict) else ()
        return {auto: name for auto, name in named if kept.get(auto) == name}

    return _rebuilt(data, allowed)


def _rebuilt(data: Any, allowed: Callable[[str, Any], Any]) -> Any:
    if isinstance(data, list):
        return [_rebuilt(value, allowed) for value in data]
    if not isinstance(data, dict):
        return data
    cleaned = {}
    for key, value in data.items():
        if key not in REFERENCES:
            cleaned[key] = _rebuilt(value, allowed)
        elif rest := allowed(key, value):
            cleaned[key] = rest
    return cleaned
