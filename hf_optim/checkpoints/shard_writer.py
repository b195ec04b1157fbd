"""Writing a safetensors file from tensors and from bytes of other files, a piece at a time."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from ..toolkit.checkpoint.safetensors import DTYPE_NAMES, TORCH_DTYPES, TensorInfo
from .reader import byte_view

PIECE = 1 << 24
METADATA = {"format": "pt"}


def write_shard(path: Path, tensors: Mapping[str, Tensor | TensorInfo], metadata: Mapping[str, str] = METADATA) -> None:
    """Write a shard that appears whole or not at all. An ``TensorInfo`` is copied from its own file, byte by byte.

    Wide types come first, so that every tensor is aligned, then names in order: equal tensors make equal files.
    """
    order = sorted(tensors, key=lambda name: (-_dtype(tensors[name]).itemsize, name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    at = 0
    for name in order:
        value = tensors[name]
        size = _size(value)
        header[name] = {
            "dtype": DTYPE_NAMES[_dtype(value)],
            "shape": list(value.shape),
            "data_offsets": [at, at + size],
        }
        at += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    beside = path.with_name(path.name + ".writing")
    with beside.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in order:
            _write(file, tensors[name])
    os.replace(beside, path)


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
            piece = source.read(min(PIECE, left))
            if not piece:
                raise OSError(f"{value.file.name} ends inside {value.key}")
            file.write(piece)
            left -= len(piece)
