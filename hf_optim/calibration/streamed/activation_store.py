"""What flows between the blocks: one tree of tensors a batch, in host memory or in a file for each batch.

Space is used again: what a batch becomes in a block is written over what it was. In host memory for a CUDA device the
buffers are pinned, so that copies run at the speed of the bus, beside the computation.
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

Leaf = Any


class ActivationStore:
    """Trees of tensors by batch number.

    Args:
        device: where the trees come from and go to.
        directory: where to keep them; None for host memory.
        name: tells the files of several streams in one directory apart.
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
        """Keep the tree of a batch in the place of the one before."""
        leaves, self._specs[number] = pytree.tree_flatten(tree)
        before = self._leaves.get(number, [])
        if self.directory is not None:
            self._leaves[number] = self._write(number, leaves)
            return
        before += [None] * (len(leaves) - len(before))
        self._leaves[number] = [
            self._hold(leaf, old) if isinstance(leaf, Tensor) else leaf
            for leaf, old in zip(leaves, before, strict=False)
        ]

    def get(self, number: int, device: torch.device | None = None) -> Any:
        """The tree of a batch, on the device (default: the stream's)."""
        device = device or self.device
        leaves = self._leaves[number] if self.directory is None else self._read(number)
        moved = [leaf.to(device, non_blocking=True) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        if device.type == "cpu" and self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # a copy into the pinned buffer may be under way
        return pytree.tree_unflatten(moved, self._specs[number])

    def clear(self) -> None:
        """Forget everything, and remove the files."""
        for number in self._leaves:
            if self.directory is not None:
                self._path(number).unlink(missing_ok=True)
        self._leaves.clear()

    def _hold(self, leaf: Tensor, old: Any) -> Tensor:
        if self.device.type != "cuda":
            return leaf.detach().to("cpu")
        fits = isinstance(old, Tensor) and old.shape == leaf.shape and old.dtype == leaf.dtype
        into = old if fits else torch.empty(leaf.shape, dtype=leaf.dtype, pin_memory=True)
        return into.copy_(leaf.detach(), non_blocking=True)

    def _path(self, number: int) -> Path:
        assert self.directory is not None
        return self.directory / f"{self.name}-{number:05d}.activations"

    def _write(self, number: int, leaves: list[Leaf]) -> list[Leaf]:
        """Write the tensors of a batch one after another; of each remains its shape, as a weightless tensor."""
        kept: list[Leaf] = []
        try:
            with self._path(number).open("wb") as file:
                for leaf in leaves:
                    if isinstance(leaf, Tensor):
                        host = leaf.detach().to("cpu").contiguous()
                        file.write(byte_view(host))
                        leaf = torch.empty(leaf.shape, dtype=leaf.dtype, device="meta")
                    kept.append(leaf)
        except OSError as error:
            raise CheckpointError(f"cannot spill activations to {self.directory}: {error.strerror}") from error
        return kept

    def _read(self, number: int) -> list[Leaf]:
        leaves: list[Leaf] = []
        with self._path(number).open("rb") as file:
            for leaf in self._leaves[number]:
                if isinstance(leaf, Tensor):
                    host = torch.empty(leaf.shape, dtype=leaf.dtype, pin_memory=self.device.type == "cuda")
                    file.readinto(byte_view(host))
                    leaf = host
                leaves.append(leaf)
        return leaves
