"""Bytes of weights, on disk and in memory. Cheap to import, unlike the rest of ``evaluation``."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from ..errors import CheckpointError


def bytes_on_disk(directory: str | Path) -> int:
    """Return the bytes of a checkpoint's safetensors files. Raises ``CheckpointError`` if there are none."""
    files = list(Path(directory).glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{directory} has no safetensors weights")
    return sum(path.stat().st_size for path in files)


def parameter_bytes(model: nn.Module) -> int:
    """Return the bytes of a model's parameters and buffers in memory; shared storage counts once."""
    storages = {}
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.device.type != "meta":
            storage = tensor.untyped_storage()
            storages[(tensor.device, storage.data_ptr())] = storage.nbytes()
    return sum(storages.values())
