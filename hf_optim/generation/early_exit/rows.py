"""A batch whose rows grow by different numbers of tokens, over one cache.

A cache has one length. What a row did not accept stays in it as a hole, which the attention mask leaves out; when the
holes are many, the rows are moved together, to the right end as with left padding.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# Holes that are left in place; more are closed if they are also a quarter of the cache.
FEW_HOLES = 64


class Rows:
    """Tokens of each row, and which of the cache's positions belong to it.

    Args:
        tokens: prompt ``[rows, P]``.
        mask: of the cache's positions ``[rows, T]``, or None for all ones.
        cached: T.
        room: the most tokens that a row can come to have.
        pad: token behind the end of a row.

    Attributes:
        tokens: ``[rows, room]``, of which ``count`` of each row are its own.
        count: int64 ``[rows]``.
        mask: ``[rows, T]``; None while all positions belong to all rows.
    """

    def __init__(self, tokens: Tensor, mask: Tensor | None, cached: int, room: int, pad: int) -> None:
        rows, prompt = tokens.shape
        self.tokens = tokens.new_full((rows, room), pad)
        self.tokens[:, :prompt] = tokens
        self.count = torch.full((rows,), prompt, device=tokens.device)
        self.mask = tokens.new_ones(rows, cached) if mask is None else mask.long()

    def append(self, row: int, chosen: Tensor) -> None:
        """Append tokens ``[n]`` to a row."""
        start = int(self.count[row])
        self.tokens[row, start : start + len(chosen)] = chosen
        self.count[row] += len(chosen)

    def sequence(self, row: int) -> Tensor:
        """Return the tokens of a row ``[1, n]``."""
        return self.tokens[row : row + 1, : int(self.count[row])]

    def reach(self, positions: int) -> Tensor:
        """Return the mask ``[rows, T + positions]`` of a pass over that many new positions."""
        return torch.cat([self.mask, self.mask.new_ones(len(self.mask), positions)], dim=1)

    def accept(self, cache: Any, computed: int, accepted: Tensor) -> None:
        """Keep the first ``accepted`` (int64 ``[rows]``) of the positions that a pass wrote into the cache."""
        longest = int(accepted.max())
        if longest < computed:
            cache.crop(longest - computed)
        places = torch.arange(longest, device=accepted.device)
        self.mask = torch.cat([self.mask, (places < accepted[:, None]).to(self.mask.dtype)], dim=1)
        held = self.mask.sum(dim=1)
        holes = self.mask.shape[1] - int(held.max())
        if holes > FEW_HOLES and holes * 4 > self.mask.shape[1]:
            self._close_holes(cache, int(held.max()))

    def _close_holes(self, cache: Any, length: int) -> None:
        # A stable sort puts what belongs to a row behind what does not, in its order.
        order = self.mask.argsort(dim=1, stable=True)[:, -length:]
        for layer in cache.layers:
            index = order[:, None, :, None]
            layer.keys = layer.keys.gather(2, index.expand(-1, layer.keys.shape[1], -1, layer.keys.shape[3]))
            layer.values = layer.values.gather(2, index.expand(-1, layer.values.shape[1], -1, layer.values.shape[3]))
        self.mask = self.mask.gather(1, order)
