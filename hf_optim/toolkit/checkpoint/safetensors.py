"""Headers of safetensors files: the names, dtypes, shapes and offsets of the tensors of a checkpoint, no weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch

from ...trust.headers import TensorInfo as TensorInfo
from ...trust.headers import read_header

# The dtypes that hf_optim reads and writes, by their names in safetensors.
TORCH_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
DTYPE_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}

# Floating dtypes that compressed layers are stored in.
FLOAT_DTYPES = ("F64", "F32", "F16", "BF16")


class UnsupportedCheckpoint(Exception):
    """The packed loader does not support this checkpoint; it may be valid, and the stock loader tries next."""


# From the tensors of a checkpoint, by key, to the parameter name of each key.
ParameterNames = Callable[[Mapping[str, TensorInfo]], Mapping[str, str]]


def _same(entries: Mapping[str, TensorInfo]) -> dict[str, str]:
    return {key: key for key in entries}


class SafetensorsHeaders:
    """The tensors of a checkpoint, looked up by the parameter names of a model.

    Attributes:
        entries: the tensors by their names in the files.
    """

    def __init__(self, files: Iterable[str | Path], names: ParameterNames = _same) -> None:
        """Read the headers of ``files``.

        ``names`` returns the parameter names of keys (``key_names.model_names``); by default they are the same. Raises
        ``UnsupportedCheckpoint`` for a file of another format, and ``CheckpointError`` for a corrupt one.
        """
        self.replace_entries({entry.key: entry for path in files for entry in _header(Path(path))}, names)

    def replace_entries(self, entries: Mapping[str, TensorInfo], names: ParameterNames = _same) -> None:
        """Describe other tensors from now on: a part of those of the files. ``names`` as of the class."""
        self.entries = dict(entries)
        self._keys = dict(names(self.entries))
        self._by_name = {name: self.entries[key] for key, name in self._keys.items()}

    def names_of_keys(self) -> dict[str, str]:
        """Return the parameter name of each key that has one."""
        return dict(self._keys)

    def find(self, name: str) -> TensorInfo | None:
        """Return the tensor that is loaded into the parameter ``name``, or None."""
        return self._by_name.get(name)

    def count(self, suffix: str) -> int:
        """Return the number of keys that end with ``suffix``."""
        return sum(key.endswith(suffix) for key in self.entries)


def _header(path: Path) -> list[TensorInfo]:
    if path.suffix != ".safetensors":
        raise UnsupportedCheckpoint(f"{path.name} is not a safetensors file")
    return read_header(path)
