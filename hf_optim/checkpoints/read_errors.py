"""Translate the errors of unreadable weight files into ones that name the file and the remedy."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import CheckpointError

IdOrPath = str | os.PathLike[str] | None


@contextmanager
def readable_errors(source: IdOrPath) -> Iterator[None]:
    """Raise ``CheckpointError`` in place of the errors of truncated weight files, and of checkpoints with pickles only.

    Args:
        source: the Hub id or directory that the body loads; None if unknown.
    """
    from safetensors import SafetensorError

    try:
        yield
    except SafetensorError as error:
        broken = _broken_shards(source)
        what = f"{', '.join(broken)} of {source}" if broken else f"a weight file of {source}"
        raise CheckpointError(f"{what} is truncated or corrupt ({error}); download or copy it again") from error
    except OSError as error:
        pickles = _pickles(source) if "no file named" in str(error) else []
        if not pickles:
            raise
        raise CheckpointError(
            f"{source} holds pickle files ({', '.join(pickles)}); hf_optim reads only safetensors, because opening a "
            "pickle can run arbitrary code. Convert the checkpoint once with stock transformers: "
            "AutoModel.from_pretrained(...).save_pretrained(...)"
        ) from error


def _local_files(source: IdOrPath, pattern: str) -> list[Path]:
    folder = Path(os.fspath(source)) if source is not None else None
    return sorted(folder.glob(pattern)) if folder is not None and folder.is_dir() else []


def _broken_shards(source: IdOrPath) -> list[str]:
    from safetensors import SafetensorError, safe_open

    broken = []
    for path in _local_files(source, "*.safetensors"):
        try:
            with safe_open(path, framework="pt") as shard:
                shard.keys()
        except (SafetensorError, OSError):
            broken.append(path.name)
    return broken


def _pickles(source: IdOrPath) -> list[str]:
    return [path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in _local_files(source, pattern)]
