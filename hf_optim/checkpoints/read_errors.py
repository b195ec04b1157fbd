"""Translate errors of unreadable weight files into ones that name the file and the remedy."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from ..errors import CheckpointError


class readable_errors:
    """Turns the errors of unreadable weight files into ones that name the file and the remedy."""

    def __init__(self, source: Any) -> None:
        self.source = source

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        from safetensors import SafetensorError

        if isinstance(error, SafetensorError):
            broken = _broken_shards(self.source)
            what = f"{', '.join(broken)} of {self.source}" if broken else f"a weight file of {self.source}"
            raise CheckpointError(f"{what} is truncated or corrupt ({error}); fetch or copy it again") from error
        if isinstance(error, OSError) and "no file named" in str(error) and _pickles(self.source):
            raise CheckpointError(
                f"{self.source} holds pickle files ({', '.join(_pickles(self.source))}); hf_optim reads safetensors "
                "only, since a pickle can run code when it is opened. Convert it once with stock transformers: "
                "AutoModel.from_pretrained(...).save_pretrained(...)"
            ) from error


def _local_files(source: Any, pattern: str) -> list[Path]:
    folder = Path(os.fspath(source)) if source is not None else None
    return sorted(folder.glob(pattern)) if folder is not None and folder.is_dir() else []


def _broken_shards(source: Any) -> list[str]:
    from safetensors import SafetensorError, safe_open

    broken = []
    for path in _local_files(source, "*.safetensors"):
        try:
            with safe_open(path, framework="pt") as shard:
                shard.keys()
        except (SafetensorError, OSError):
            broken.append(path.name)
    return broken


def _pickles(source: Any) -> list[str]:
    return [path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in _local_files(source, pattern)]
