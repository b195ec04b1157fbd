"""Bytes of weights, on disk and in memory. Cheap to import, unlike the rest of measuring."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from ..errors import CheckpointError


def bytes_on_disk(directory: str | Path) -> int:
    """Bytes of the weights of a checkpoint: its safetensors files. Raises ``CheckpointError`` when there are none."""
    files = list(Path(directory).glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{directory} has no safetensors weights")
    return sum(path.stat().st_size for path in files)


def parameter_bytes(model: nn.Module) -> int:
    """Bytes of the parameters and buffers of a model in memory; what is shared counts once."""
    storages = {}
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.device.type != "meta":
            storage = tensor.untyped_storage()
            storages[(tensor.device, storage.data_ptr())] = storage.nbytes()
    return sum(storages.values())
