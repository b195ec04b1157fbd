"""Write a safetensors file from tensors in memory and byte ranges of other files, in chunks."""

from __future__ import annotations

import contextlib
import json
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from ..runs.disk_errors import readable_disk_errors
from ..toolkit.checkpoint.safetensors import DTYPE_NAMES, TORCH_DTYPES, TensorInfo
from .reader import byte_view

CHUNK_BYTES = 1 << 24
METADATA = {"format": "pt"}


def write_shard(path: Path, tensors: Mapping[str, Tensor | TensorInfo], metadata: Mapping[str, str] = METADATA) -> None:
    """Write a shard; the file is moved into place once it is complete.

    A ``TensorInfo`` is copied bytewise from its own file. Tensors are ordered by item size, widest first, so that every
    tensor is aligned, then by name: equal tensors make equal files.

    Raises ``CheckpointError`` if writing fails; what was written is then removed.
    """
    order = sorted(tensors, key=lambda name: (-_dtype(tensors[name]).itemsize, name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    offset = 0
    for name in order:
        value = tensors[name]
        size = _size(value)
        header[name] = {
            "dtype": DTYPE_NAMES[_dtype(value)],
            "shape": list(value.shape),
            "data_offsets": [offset, offset + size],
        }
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    partial = path.with_name(path.name + ".writing")
    with readable_disk_errors(path.parent, path.name, offset, "free some space and add --resume"):
        try:
            with partial.open("wb") as file:
                file.write(struct.pack("<Q", len(text)) + text)
                for name in order:
                    _write(file, tensors[name])
            os.replace(partial, path)
        except BaseException:
            with contextlib.suppress(OSError):
                partial.unlink()
            raise


def _dtype(value: Tensor | TensorInfo) -> torch.dtype:
    return value.dtype if isinstance(value, Tensor) else TORCH_DTYPES[value.type]


def _size(value: Tensor | TensorInfo) -> int:
    return value.numel() * value.element_size() if isinstance(value, Tensor) else value.end - value.begin


def _write(file: BinaryIO, value: Tensor | TensorInfo) -> None:
    if isinstance(value, Tensor):
        host = value.detach().to("cpu").contiguous()
        if host.numel():
            file.write(byte_view(host))
        return
    with value.file.open("rb") as source:
        source.seek(value.begin)
        left = value.end - value.begin
        while left:
            chunk = source.read(min(CHUNK_BYTES, left))
            if not chunk:
                raise OSError(f"{value.file.name} ends inside {value.key}")
            file.write(chunk)
            left -= len(chunk)
