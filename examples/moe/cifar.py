"""CIFAR-10 for ``vmoe.py``: reading, packing into one small file, and the images and shifts of every training step."""

from __future__ import annotations

import lzma
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

PACKED = "cifar10.xz"
SPLITS = {"train": 10_000, "test": 2_000}
SIDE, SHIFT = 32, 4


def load(folder: Path, split: str) -> tuple[Tensor, Tensor]:
    """Return the images uint8 ``[n, 3, 32, 32]`` and classes int64 ``[n]`` of a split.

    From what ``pack`` wrote, if the folder has it, otherwise from ``train.parquet`` and ``test.parquet``.
    """
    packed = folder / PACKED
    if packed.exists():
        images, labels = _unpacked(packed)[split]
    else:
        from datasets import Image, load_dataset

        rows = load_dataset("parquet", data_files=str(folder / f"{split}.parquet"), split="train")
        rows = rows.cast_column("image", Image())
        images = np.stack([np.asarray(picture.convert("RGB")) for picture in rows["image"]]).transpose(0, 3, 1, 2)
        labels = np.asarray(rows["label"], np.uint8)
    return torch.from_numpy(np.ascontiguousarray(images)), torch.from_numpy(labels.copy()).long()


def pack(folder: Path, target: Path) -> Path:
    """Write both splits of ``folder`` into one file (19 MB), which needs nothing but numpy to be read; return it.

    Red and blue are stored as differences from green, and pixels as differences from the one on the left, which
    compresses to half of the pixels themselves. No bit is lost.
    """
    parts = {split: load(folder, split) for split in SPLITS}
    images = np.concatenate([part[0].numpy() for part in parts.values()])
    images = images - np.stack([images[:, 1], np.zeros_like(images[:, 1]), images[:, 1]], 1)
    images[..., 1:] -= images[..., :-1].copy()
    labels = np.concatenate([part[1].numpy() for part in parts.values()]).astype(np.uint8)
    target.mkdir(parents=True, exist_ok=True)
    held = np.ascontiguousarray(images.transpose(1, 0, 2, 3)).tobytes() + labels.tobytes()
    (target / PACKED).write_bytes(lzma.compress(held, preset=6))
    return target / PACKED


def _unpacked(path: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    held = np.frombuffer(lzma.decompress(path.read_bytes()), np.uint8)
    total = sum(SPLITS.values())
    images = held[:-total].reshape(3, total, SIDE, SIDE).transpose(1, 0, 2, 3).cumsum(-1, dtype=np.uint8)
    images += np.stack([images[:, 1], np.zeros_like(images[:, 1]), images[:, 1]], 1)
    found, begin = {}, 0
    for split, count in SPLITS.items():
        found[split] = (images[begin : begin + count], held[-total:][begin : begin + count])
        begin += count
    return found


def pixels(images: Tensor) -> Tensor:
    """Return images as the model reads them, float ``[n, 3, 32, 32]``."""
    return (images.float() / 255 - 0.47) / 0.25


class Schedule:
    """The images of every step of a training, and how each is shifted: models of equal seed see the same.

    Attributes:
        images: int64 ``[steps, batch]``.
        rows, columns: int64 ``[steps, batch]``: shifts, 0 to 8.
        mirrored: bool ``[steps, batch]``.
    """

    def __init__(self, seed: int, steps: int, batch: int, count: int, device: str) -> None:
        generator = torch.Generator().manual_seed(seed)
        draw = lambda high: torch.randint(0, high, (steps, batch), generator=generator)  # noqa: E731
        self.images, self.rows, self.columns = draw(count), draw(2 * SHIFT + 1), draw(2 * SHIFT + 1)
        self.mirrored = draw(2).bool()
        for name, value in vars(self).items():
            setattr(self, name, value.to(device))

    def become(self, other: Schedule) -> None:
        """Take the images and shifts of another schedule, in place: captured steps read the same memory."""
        for name, value in vars(self).items():
            value.copy_(getattr(other, name))

    def at(self, step: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return the numbers int64 ``[batch]`` and inputs ``[batch, 3, 32, 32]`` of a step, an int64 tensor ``[1]``."""
        chosen = self.images.index_select(0, step)[0]
        steps = torch.arange(SIDE, device=images.device)
        rows = self.rows.index_select(0, step)[0].unsqueeze(1) + steps
        columns = self.columns.index_select(0, step)[0].unsqueeze(1) + steps
        mirrored = self.mirrored.index_select(0, step)[0].unsqueeze(1)
        columns = torch.where(mirrored, columns.flip(1), columns)
        padded = functional.pad(pixels(images[chosen]), (SHIFT,) * 4, mode="reflect").permute(0, 2, 3, 1)
        one = torch.arange(len(chosen), device=images.device).view(-1, 1, 1)
        return chosen, padded[one, rows.unsqueeze(2), columns.unsqueeze(1)].permute(0, 3, 1, 2)
