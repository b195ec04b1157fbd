"""On-disk cache of a teacher's top-k logits by sample, so that the teacher runs once and not in every epoch.

The key of a sample is a hash of its content, independent of its batch and of padding. Shards are safetensors files that
are written atomically, so that a killed run continues with what was written. A scored token takes ``8 k + 4`` bytes
(int32 classes, float32 log-probabilities, the rest), a thousandth of its float32 logits for ``k = 64`` and a vocabulary
of 128 thousand.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ...errors import CheckpointError
from ...trust.bounds import first_line
from .losses import TopK

FORMAT = "hf_optim.teacher_logits.1"
SHARD_BYTES = 64 * 2**20
PARTS = TopK._fields


class LogitCache:
    """Mapping from the key of a sample to its ``TopK``, in memory and in the shards of a directory.

    Args:
        directory: created if it does not exist.
        settings: what the entries depend on (teacher, temperature, k); shards with other settings are refused.
        writer: index of this process, so that several processes can write to one directory.

    Raises:
        CheckpointError: a shard has other settings, or is not readable.
    """

    def __init__(self, directory: str | Path, settings: Mapping[str, Any], writer: int = 0) -> None:
        self.directory = Path(directory)
        self.directory.mkdir(parents=True, exist_ok=True)
        self.settings = json.dumps({"format": FORMAT, **settings}, sort_keys=True)
        self.writer = writer
        self._where: dict[str, Path] = {}
        self._open: dict[Path, Any] = {}
        self._new: dict[str, TopK] = {}
        self._size = 0
        for path in sorted(self.directory.glob("teacher-*.safetensors")):
            self._index(path)

    @staticmethod
    def has_shards(directory: str | Path) -> bool:
        """Return True if a directory has shards of a cache."""
        return any(Path(directory).glob("teacher-*.safetensors"))

    def __len__(self) -> int:
        return len(self._where) + len(self._new)

    def __contains__(self, key: str) -> bool:
        return key in self._new or key in self._where

    @property
    def bytes_on_disk(self) -> int:
        """Return the size of all shards in the directory."""
        return sum(path.stat().st_size for path in self.directory.glob("teacher-*.safetensors"))

    def get(self, key: str) -> TopK:
        """Return the entry of a sample, on the CPU. Raises ``KeyError``."""
        if key in self._new:
            return self._new[key]
        shard = self._shard(self._where[key])
        return TopK(*(shard.get_tensor(f"{key}.{part}") for part in PARTS))

    def put(self, key: str, entry: TopK) -> None:
        """Add the entry of a sample; it is written with the next shard."""
        self._new[key] = TopK(*(tensor.detach().cpu().contiguous().clone() for tensor in entry))
        self._size += sum(tensor.nbytes for tensor in self._new[key])
        if self._size >= SHARD_BYTES:
            self.flush()

    def flush(self) -> None:
        """Write the entries that are not on disk yet."""
        if not self._new:
            return
        number = len(list(self.directory.glob(f"teacher-{self.writer}-*.safetensors")))
        path = self.directory / f"teacher-{self.writer}-{number:05d}.safetensors"
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        tensors = {f"{key}.{part}": getattr(entry, part) for key, entry in self._new.items() for part in PARTS}
        try:
            save_file(tensors, temporary, metadata={"settings": self.settings})
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        self._where |= dict.fromkeys(self._new, path)
        self._new.clear()
        self._size = 0

    def _index(self, path: Path) -> None:
        shard = self._shard(path)
        made_with = (shard.metadata() or {}).get("settings")
        if made_with != self.settings:
            raise CheckpointError(
                f"the teacher cache {self.directory} was made with {made_with}, and this run has {self.settings}: "
                "use another directory, or the same settings"
            )
        self._where |= {name.removesuffix(".rest"): path for name in shard.keys() if name.endswith(".rest")}  # noqa: SIM118

    def _shard(self, path: Path) -> Any:
        if path not in self._open:
            try:
                self._open[path] = safe_open(path, framework="pt")
            except (SafetensorError, OSError) as error:
                raise CheckpointError(
                    f"{path} is not a readable shard of a teacher cache ({first_line(error)}); delete it"
                ) from error
        return self._open[path]


def cached_top_k(
    cache: LogitCache, inputs: Mapping[str, Any], logits: Tensor, rows: Tensor, compute: Callable[[], TopK]
) -> TopK:
    """Return the teacher's top classes for ``rows`` on the device of ``logits``, from the cache if it has them.

    Args:
        cache: the cache; it takes the entries of a batch with a sample that it does not have.
        inputs: the batch.
        logits: the student's, ``[batch, ..., classes]``.
        rows: int64 ``[rows]``, ascending, the scored rows of ``logits.view(-1, classes)``.
        compute: runs the teacher on the batch and returns its top classes for ``rows``.
    """
    keys = sample_keys(inputs)
    if not all(key in cache for key in keys):
        sample_of_row = rows.cpu() * logits.shape[0] // logits[..., 0].numel()
        sizes = torch.bincount(sample_of_row, minlength=len(keys)).tolist()
        for key, *parts in zip(keys, *(part.split(sizes) for part in compute()), strict=True):
            cache.put(key, TopK(*parts))
    entries = [cache.get(key) for key in keys]
    return TopK(*(torch.cat(parts).to(logits.device) for parts in zip(*entries, strict=True)))


def sample_keys(inputs: Mapping[str, Any]) -> list[str]:
    """Return a key for each sample of a batch: a hash of its tensors without padding.

    Tensors in the shape of the attention mask are restricted to the unmasked tokens; labels of another shape to those
    that are not -100.
    """
    mask = inputs.get("attention_mask")
    tensors = {name: t.detach().cpu() for name, t in sorted(inputs.items()) if isinstance(t, Tensor) and t.dim() > 0}
    keys = []
    for row in range(next(iter(tensors.values())).shape[0]):
        digest = hashlib.sha256()
        for name, tensor in tensors.items():
            value = tensor[row]
            if isinstance(mask, Tensor) and tensor.shape == mask.shape:
                value = value[mask[row].cpu() != 0]
            elif name == "labels" and value.dim():
                value = value[value != -100]
            digest.update(f"{name} {value.dtype} {tuple(value.shape)} ".encode())
            digest.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        keys.append(digest.hexdigest())
    return keys
