"""Headers of safetensors files, checked before anything else reads the file.

The format: eight bytes with the length of the header (little endian), the header (JSON: name -> dtype, shape and the
range of the data), the data. The ranges cover the data completely and do not overlap.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from .bounds import first_line, shown
from .documents import loads

MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library
# Bits of one value, by the names of the format.
BITS = {
    "BOOL": 8,
    "U8": 8,
    "I8": 8,
    "U16": 16,
    "I16": 16,
    "U32": 32,
    "I32": 32,
    "U64": 64,
    "I64": 64,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "F8_E8M0": 8,
    "F8_E4M3": 8,
    "F8_E5M2": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "F16": 16,
    "BF16": 16,
    "F32": 32,
    "F64": 64,
    "C64": 64,
}


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a checkpoint.

    Attributes:
        key: its name in the file.
        type: its dtype, by the name in safetensors.
        shape: its shape.
        file: the file.
        begin, end: the range of its bytes in the file.
    """

    key: str
    type: str
    shape: tuple[int, ...]
    file: Path = Path()
    begin: int = 0
    end: int = 0


def read_header(path: Path, of: object = "") -> list[TensorInfo]:
    """Read and check the header of a safetensors file, which must be a regular file.

    ``of`` is the checkpoint, for messages. Raises ``CheckpointError``, which names the file, if the file is truncated,
    or anything in its header is not what the format allows.
    """
    name = f"{path.name} of {of}" if of else path.name
    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
                raise ValueError(f"its header would have {length} bytes, the file has {size}")
            header = loads(file.read(length).decode("utf-8"))
        return _entries(header, path, 8 + length, size)
    except ValueError as error:
        raise CheckpointError(
            f"{name} is truncated or corrupt ({first_line(error)}); download or copy it again"
        ) from error
    except OSError as error:
        raise CheckpointError(f"{name} cannot be read: {error.strerror}") from error


def require_disjoint(files: Iterable[tuple[Path, list[TensorInfo]]], of: object) -> None:
    """Raise ``CheckpointError`` if two files hold a tensor of the same name: it would be arbitrary which is loaded."""
    found: dict[str, Path] = {}
    for path, entries in files:
        for entry in entries:
            if entry.key in found:
                raise CheckpointError(
                    f"{found[entry.key].name} and {path.name} of {of} both have a tensor {entry.key!r}"
                )
            found[entry.key] = path


def _entries(header: Any, file: Path, start: int, size: int) -> list[TensorInfo]:
    if not isinstance(header, dict):
        raise ValueError("its header is not a mapping")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("its __metadata__ is not a mapping of texts")
    entries = sorted((_entry(key, value, file, start) for key, value in header.items()), key=lambda e: (e.begin, e.end))
    at = start
    for entry in entries:
        if entry.end > size:
            raise ValueError(f"{shown(entry.key)} ends beyond the end of the file")
        if entry.begin != at:
            raise ValueError(f"{shown(entry.key)} begins at byte {entry.begin}, and the data before it ends at {at}")
        at = entry.end
    if at != size:
        raise ValueError(f"its tensors end at byte {at}, and the file has {size}")
    return entries


def _entry(key: str, value: Any, file: Path, start: int) -> TensorInfo:
    name = shown(key)
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{name} has no dtype, shape and data_offsets, or more than these")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        raise ValueError(f"{name} has the unknown dtype {shown(dtype)}")
    if not _sizes(shape):
        raise ValueError(f"{name} has a shape that is not a list of whole numbers >= 0")
    if not _sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError(f"{name} has data_offsets that are not a range")
    bits = math.prod(shape) * BITS[dtype]
    if bits != 8 * (offsets[1] - offsets[0]):
        raise ValueError(f"{name} has {offsets[1] - offsets[0]} bytes of data, not those of {dtype} {shape[:8]}")
    return TensorInfo(key, dtype, tuple(shape), file, start + offsets[0], start + offsets[1])


def _sizes(value: Any) -> bool:
    """Return True for a list of at most 64 whole numbers from 0 to 2**63."""
    return (
        isinstance(value, list) and len(value) <= 64 and all(type(size) is int and 0 <= size < 2**63 for size in value)
    )
