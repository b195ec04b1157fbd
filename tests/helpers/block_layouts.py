"""Layouts of ``sparse_attention`` from dense masks, block by block in plain Python: a reference for other builders."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_optim_kernels.sparse_attention.naive import Layout


def layout_of(
    seen: Tensor, block: int = 32, heads: list[int] | None = None, order_q: Tensor | None = None,
    order_k: Tensor | None = None, whole: bool = True,
) -> Layout:  # fmt: skip
    """Return the layout of a mask over places, bool ``[L, places of queries, places of keys]``, on its device.

    Args:
        heads: the head layout of each query head; None: one head for each.
        order_q, order_k: token at each place.
        whole: False writes a mask for blocks that are visible in whole, too.
    """
    L = len(seen)
    seen = _filled(seen.cpu(), block)
    tiles = seen.unflatten(2, (-1, block)).unflatten(1, (-1, block)).transpose(2, 3)  # [L, q, k, block, block]
    unique: dict[tuple, int] = {}
    bits: list[Tensor] = []
    numbers = torch.full(tiles.shape[:3], -2)
    for kind, q, k in (tiles.any(-1).any(-1)).nonzero().tolist():
        tile = tiles[kind, q, k]
        if whole and tile.all():
            numbers[kind, q, k] = -1
            continue
        words = _words(tile)
        name = tuple(words.flatten().tolist())
        if name not in unique:
            unique[name] = len(bits)
            bits.append(words)
        numbers[kind, q, k] = unique[name]
    made = []
    for table in (numbers, numbers.transpose(1, 2)):
        starts, others, masks = [], [], []
        for kind in range(L):
            starts.append([])
            for row in table[kind]:
                starts[-1].append(len(others))
                listed = (row > -2).nonzero().flatten().tolist()
                others += listed
                masks += row[listed].tolist()
            starts[-1].append(len(others))
        made += [starts, others, masks]
    device = order_q.device if order_q is not None else seen.device
    of_bits = torch.stack(bits) if bits else torch.zeros(0, block, block // 32, dtype=torch.int32)
    tensors = [torch.tensor(each, dtype=torch.int32, device=device) for each in (heads or list(range(L)), *made)]
    return Layout(block, *tensors[:4], of_bits.to(device), *tensors[4:], order_q, order_k)


def to(layout: Layout, device: str) -> Layout:
    """Return a layout with its tensors on a device."""
    return Layout(*(each.to(device) if isinstance(each, Tensor) else each for each in vars(layout).values()))


def _filled(seen: Tensor, block: int) -> Tensor:
    """Return the mask with whole blocks of places, those added seeing nothing."""
    L, N, M = seen.shape
    found = seen.new_zeros(L, -(-N // block) * block, -(-M // block) * block)
    found[:, :N, :M] = seen
    return found


def _words(tile: Tensor) -> Tensor:
    """Return a mask ``[block, block]`` as int32 words ``[block, block // 32]``."""
    return torch.tensor(
        [
            [_signed(sum(int(bit) << place for place, bit in enumerate(word))) for word in row]
            for row in tile.unflatten(1, (-1, 32)).tolist()
        ],
        dtype=torch.int32,
    )


def _signed(word: int) -> int:
    return word - (1 << 32) if word >= 1 << 31 else word
