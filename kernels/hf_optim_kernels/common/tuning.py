"""Tile shapes that were measured to be fast: tables shipped for some generations of GPUs, and the user's cache.

Nothing is timed when a model runs: ``choose`` looks up a configuration, or predicts it if there is none. ``hf-optim
bench --tune`` measures and calls ``remember``. The user's cache is one JSON file per GPU and version of torch and
Triton, under ``$HF_OPTIM_CACHE`` (default ``~/.cache/hf_optim``); it takes precedence. The shipped table
``tables/sm_90.json`` was measured on an H200 (torch 2.11, Triton 3.6) and is used for the whole generation.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from . import choice

Config = dict[str, Any]
SHIPPED = Path(__file__).parent / "tables"


def bucket(rows: int) -> int:
    """Return the next power of two: calls with the same bucket of rows share a configuration."""
    return 1 << max(rows - 1, 0).bit_length()


def rounded(rows: int) -> int:
    """Return the rows that a configuration is chosen for: above 64 the next multiple of 64, or of an eighth."""
    if rows <= 64:
        return bucket(rows)
    step = max(64, bucket(rows) // 16)
    return -(-rows // step) * step


# The guesses for these have the names of all configurations: kernels for few and for many rows have different ones.
_BUCKETS = (1, 64, 4096)
_CHOSEN: dict[tuple, Config] = {}
_FORCED: dict[str, Config] = {}


def choose(
    op: str,
    shape: tuple[int, ...],
    rows: int,
    dtype: torch.dtype,
    device: torch.device,
    guess: Callable[[int], Config],
    usable: Callable[[Config], bool] = lambda config: True,
    variant: object = None,
) -> Config:
    """Return the configuration of ``op``, looked up once per process and arguments until one is remembered.

    It is that of a table, else the fastest by prediction (``common.choice``), else ``guess``.

    Args:
        shape: what precedes the rows in the key of an entry: out, in, and what else the entries depend on.
        guess: a bucket of rows -> a configuration. A table may be older than the code: an entry whose names are not
            those of a guess is ignored.
        usable: False for configurations that cannot run.
        variant: what ``usable`` depends on.
    """
    if _FORCED and op in _FORCED:
        return _FORCED[op]
    rows = rounded(rows)
    key = (op, shape, rows, dtype, device, variant)
    found = _CHOSEN.get(key)
    if found is None:
        found = _CHOSEN[key] = _choose(op, shape, rows, dtype, device, guess, usable)
    return found


def _choose(
    op: str,
    shape: tuple[int, ...],
    rows: int,
    dtype: torch.dtype,
    device: torch.device,
    guess: Callable[[int], Config],
    usable: Callable[[Config], bool],
) -> Config:
    default = guess(bucket(rows))
    entry = table(device).get(key_of(op, (*shape, bucket(rows)), dtype))
    if entry is not None and any(entry.keys() == guess(each).keys() for each in _BUCKETS) and usable(entry):
        return dict(entry)
    if device.type != "cuda":
        return dict(default)
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    found = choice.best(op, rows, shape[0], shape[1], processors, usable)
    return dict(default if found is None else found)


@contextlib.contextmanager
def forced(op: str, config: Mapping[str, Any]) -> Iterator[None]:
    """Let ``choose`` return a configuration for ``op`` inside the context, whatever the tables say: to time it."""
    before = _FORCED.get(op)
    _FORCED[op] = dict(config)
    try:
        yield
    finally:
        if before is None:
            _FORCED.pop(op)
        else:
            _FORCED[op] = before


def remember(
    op: str, shape: tuple[int, ...], dtype: torch.dtype, config: Mapping[str, Any], device: torch.device
) -> Path:
    """Write a configuration into the user's cache, atomically; return the path of the file."""
    path = cache_file(device)
    path.parent.mkdir(parents=True, exist_ok=True)
    entries = _read(path) | {key_of(op, shape, dtype): dict(config)}
    handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(dumps(entries))
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    table.cache_clear()
    _CHOSEN.clear()
    return path


def dumps(entries: Mapping[str, Mapping[str, Any]]) -> str:
    """Return a table as JSON, one entry per line."""
    lines = [f"{json.dumps(key)}: {json.dumps(entries[key])}" for key in sorted(entries)]
    return "{\n" + ",\n".join(lines) + "\n}\n"


def key_of(op: str, shape: tuple[int, ...], dtype: torch.dtype) -> str:
    """Return the name of an entry in a table: ``wna16 14336x4096x16 bfloat16``."""
    return f"{op} {'x'.join(map(str, shape))} {str(dtype).removeprefix('torch.')}"


@functools.cache
def table(device: torch.device) -> dict[str, dict[str, Any]]:
    """Return every entry for a device, the user's over the shipped ones; empty for a CPU."""
    if device.type != "cuda":
        return {}
    major, minor = torch.cuda.get_device_capability(device)
    return _read(SHIPPED / f"sm_{major}{minor}.json") | _read(cache_file(device))


def cache_file(device: torch.device) -> Path:
    """Return the file of the user's entries for this GPU, torch and Triton."""
    import triton

    home = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    folder = Path(os.environ.get("HF_OPTIM_CACHE") or Path(home, "hf_optim")) / "tuning"
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return folder / f"{_slug(name)}-torch{_slug(torch.__version__)}-triton{triton.__version__}.json"


def _slug(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9.]+", "_", name)


def _read(path: Path) -> dict[str, dict[str, Any]]:
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        warnings.warn(f"{path} is ignored: {error}", stacklevel=3)
        return {}
    if not isinstance(entries, dict) or not all(isinstance(entry, dict) for entry in entries.values()):
        warnings.warn(f"{path} is ignored: not a table of configurations", stacklevel=3)
        return {}
    return entries
