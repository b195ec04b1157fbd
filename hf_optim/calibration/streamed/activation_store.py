"""Storage for activations between blocks: one pytree of tensors per batch, in host memory or in one file per batch.

Space is reused: the output of a block for a batch overwrites its input. For a CUDA device the host buffers are pinned,
so that copies run at full bus speed and overlap with computation.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ...checkpoints.reader import byte_view
from ...errors import CheckpointError
from ...runs.disk_errors import readable_disk_errors

Leaf = Any


class ActivationStore:
    """Pytrees of tensors, by batch number.

    Args:
        device: the device the tensors come from and are returned to.
        directory: the directory to offload to; None for host memory.
        name: prefix of the file names, to distinguish several stores in one directory.
    """

    def __init__(self, device: torch.device, directory: Path | None = None, name: str = "hidden") -> None:
        self.device, self.directory, self.name = device, directory, name
        self._leaves: dict[int, list[Leaf]] = {}
        self._specs: dict[int, Any] = {}

    def __len__(self) -> int:
        return len(self._leaves)

    def __iter__(self) -> Iterator[Any]:
        return (self.get(number) for number in range(len(self)))

    def put(self, number: int, tree: Any) -> None:
        """Store the tree of a batch, in place of the former one. Raises ``CheckpointError`` if the disk is full."""
        leaves, self._specs[number] = pytree.tree_flatten(tree)
        former = self._leaves.get(number, [])
        if self.directory is not None:
            self._leaves[number] = self._write(number, leaves)
            return
        former += [None] * (len(leaves) - len(former))
        self._leaves[number] = [
            self._to_host(leaf, old) if isinstance(leaf, Tensor) else leaf
            for leaf, old in zip(leaves, former, strict=False)
        ]

    def get(self, number: int, device: torch.device | None = None) -> Any:
        """Return the tree of a batch, on ``device`` (default: the device of the store)."""
        device = device or self.device
        leaves = self._leaves[number] if self.directory is None else self._read(number)
        moved = [leaf.to(device, non_blocking=True) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        if device.type == "cpu" and self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # a copy into the pinned buffer may still be running
        return pytree.tree_unflatten(moved, self._specs[number])

    def clear(self) -> None:
        """Drop all trees, and remove their files."""
        for number in self._leaves:
            if self.directory is not None:
                self._path(number).unlink(missing_ok=True)
        self._leaves.clear()

    def _to_host(self, leaf: Tensor, old: Any) -> Tensor:
        if self.device.type != "cuda":
            return leaf.detach().to("cpu")
        reusable = isinstance(old, Tensor) and old.shape == leaf.shape and old.dtype == leaf.dtype
        buffer = old if reusable else torch.empty(leaf.shape, dtype=leaf.dtype, pin_memory=True)
        return buffer.copy_(leaf.detach(), non_blocking=True)

    def _path(self, number: int) -> Path:
        assert self.directory is not None
        return self.directory / f"{self.name}-{number:05d}.activations"

    def _write(self, number: int, leaves: list[Leaf]) -> list[Leaf]:
        """Write the tensors of a batch one after another. Returns the leaves with meta tensors in their place."""
        kept: list[Leaf] = []
        needed = sum(leaf.numel() * leaf.element_size() for leaf in leaves if isinstance(leaf, Tensor))
        assert self.directory is not None
        with (
            readable_disk_errors(self.directory, f"the activations of batch {number}", needed),
            self._path(number).open("wb") as file,
        ):
            for leaf in leaves:
                if isinstance(leaf, Tensor):
                    host = leaf.detach().to("cpu").contiguous()
                    file.write(byte_view(host))
                    leaf = torch.empty(leaf.shape, dtype=leaf.dtype, device="meta")
                kept.append(leaf)
        return kept

    def _read(self, number: int) -> list[Leaf]:
        leaves: list[Leaf] = []
        path = self._path(number)
        try:
            file = path.open("rb")
        except OSError as error:
            raise CheckpointError(f"cannot read activations from {path}: {error.strerror}") from error
        with file:
            for leaf in self._leaves[number]:
                if isinstance(leaf, Tensor):
                    host = torch.empty(leaf.shape, dtype=leaf.dtype, pin_memory=self.device.type == "cuda")
                    if file.readinto(byte_view(host)) != host.numel() * host.element_size():
                        raise CheckpointError(f"{path} is truncated: another program has written to it")
                    leaf = host
                leaves.append(leaf)
        return leaves
