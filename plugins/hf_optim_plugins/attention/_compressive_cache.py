"""A key/value cache that holds the tokens of a memory, and compressed tokens from before it.

This file is stored beside checkpoints, so it imports only torch and transformers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache

from hf_optim.toolkit.attention import HeadPatterns, PatternLayer, Rows


@dataclass(frozen=True, eq=False)
class Windows:
    """The windows that the new tokens of a batch complete.

    Attributes:
        index: int64 ``[1 or B, W, ratio]``: places of their tokens among ``ratio - 1`` earlier inputs and the new ones.
        number: int64 ``[1 or B, W]``: their numbers in the row; -1 for none.
        latest: int64 ``[1 or B, ratio - 1]``: places of the inputs that a next forward needs, as in ``index``.
    """

    index: Tensor
    number: Tensor
    latest: Tensor

    @property
    def count(self) -> int:
        """The number of windows in the row that has most."""
        return self.number.shape[1]

    def none(self) -> Windows:
        """Return no windows."""
        return Windows(self.index[:, :0], self.number[:, :0], self.latest)

    @classmethod
    def of(cls, before: list[int], first: list[int], new: list[int], ratio: int, device: Any) -> Windows:
        """Return the windows of rows.

        Args:
            before, new: tokens of each row before the forward, and in it.
            first: the place of a row's first new token that is not padding.
            ratio: tokens of a window.
            device: of the result.
        """
        alike = len({*zip(before, first, new, strict=True)}) == 1
        begin, place, count = (
            torch.tensor(part[:1] if alike else part, device=device)[:, None] for part in (before, first, new)
        )
        done, after = begin // ratio, (begin + count) // ratio
        most = max((b + n) // ratio - b // ratio for b, n in zip(before, new, strict=True))
        number = done + torch.arange(most, device=device)
        token = number[:, :, None] * ratio + torch.arange(ratio, device=device) - begin[:, :, None]
        shift = torch.where(token >= 0, place[:, :, None], 0)  # earlier inputs end where the forward begins
        index = (token + shift + ratio - 1).clamp_min(0)
        index = torch.where((number < after)[:, :, None], index, 0)
        latest = count - (ratio - 1) + torch.arange(ratio - 1, device=device)
        latest = (latest + torch.where(latest >= 0, place, 0) + ratio - 1).clamp_min(0)
        return cls(index, torch.where(number < after, number, -1), latest)

    @classmethod
    def ahead(cls, rows: Rows | None, before: int, count: int, batch: int, ratio: int, device: Any) -> Windows:
        """Return the windows of ``count`` new places of a batch behind ``before``; ``rows`` of all, or no padding."""
        if rows is None:
            return cls.of([before] * batch, [0] * batch, [count] * batch, ratio, device)
        known: dict[Any, Windows] = vars(rows).setdefault("_windows", {})
        if before not in known:
            valid = rows.segments[:, : before + count] >= 0
            earlier, own = valid[:, :before], valid[:, before:]
            place = own.to(torch.uint8).argmax(1)
            if rows.holes:
                raise ValueError(
                    "a compressed memory has no padding between tokens, as in a row that was padded at the end and is "
                    "continued: pad rows at the left"
                )
            told, first, new = torch.stack([earlier.sum(1), place, own.sum(1)]).tolist()
            known[before] = cls.of(told, first, new, ratio, device)
        return known[before]


def picked(part: Tensor, index: Tensor) -> Tensor:
    """Return ``[B, n, d]`` at places ``[1 or B, ...]``, as ``[B, ..., d]``."""
    flat = index.flatten(1).expand(len(part), -1)
    return part.gather(1, flat[:, :, None].expand(-1, -1, part.shape[2])).unflatten(1, index.shape[1:])


class CompressiveLayer(PatternLayer):
    """The keys and values of the memory, of compressed tokens, and the inputs that are not in a window yet.

    Attributes:
        slots: keys and values of compressed tokens, each ``[B, G, C, D]``; None before the first ones.
        numbers: int64 ``[B, C]``: the windows of a row; -1 for none.
        inputs: ``[B, ratio - 1, d]``: the last inputs of each row.
        made_for: of the model: tokens of a segment, of the memory and of a window, slots, and the function.
    """

    is_croppable = False

    def _forget(self) -> None:
        super()._forget()
        self.slots: tuple[Tensor, Tensor] | None = None
        self.numbers: Tensor | None = None
        self.inputs: Tensor | None = None
        self._coming: Windows | None = None
        self.made_for: tuple[Any, ...] | None = None

    def require_made_for(self, rows: int, settings: tuple[Any, ...]) -> None:
        """Raise ``ValueError`` if earlier tokens were those of other rows, or of a model with other settings."""
        if self.made_for is None:
            self.made_for = settings
        elif self.made_for != settings:
            raise ValueError("the cache was made by a model with another compressed memory: start a new one")
        if self.keys is not None and len(self.keys) != rows:
            raise ValueError(f"the cache holds {len(self.keys)} rows, and got tokens of {rows}: start a new one")

    def expect(self, windows: Windows) -> None:
        """Say that the first keys of the next ``update`` are those of windows."""
        self._coming = windows

    def _check(self, heads: HeadPatterns, rows: Rows | None) -> None:
        super()._check(heads, rows)
        if rows is not None and not rows.continues(self._rows, self._tokens):
            raise ValueError(
                "the attention_mask hides other earlier tokens than before, and windows were counted by that: start a "
                "new cache, or set use_cache=False"
            )

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Add keys and values ``[B, G, W + N, D]``, of windows and of tokens, and return those of tokens."""
        windows = self._coming
        if windows is None:
            raise ValueError("this cache is of a model with a compressed memory: make a new one for another model")
        self._coming, count = None, windows.count
        if count:
            new = key_states[:, :, :count], value_states[:, :, :count]
            number = windows.number.expand(len(key_states), -1)
            if self.slots is not None and self.numbers is not None:
                new = tuple(torch.cat(pair, 2) for pair in zip(self.slots, new, strict=True))  # type: ignore[assignment]
                number = torch.cat([self.numbers, number], 1)
            self.slots, self.numbers = new, number
        return super().update(key_states[:, :, count:], value_states[:, :, count:], *args, **kwargs)

    def tidy(self) -> None:
        """Drop slots that no later token sees: of each row, all but the latest ones, which keep their order."""
        size, memory, ratio, most, _ = self.made_for  # type: ignore[misc]
        most += (size + memory) // ratio
        if self.slots is None or self.numbers is None or self.numbers.shape[1] <= most:
            return
        last = self.numbers.argsort(dim=1, stable=True)[:, -most:]
        key, value = (
            part.gather(2, last[:, None, :, None].expand(-1, part.shape[1], -1, part.shape[3])) for part in self.slots
        )
        self.slots, self.numbers = (key, value), self.numbers.gather(1, last)

    def nbytes(self) -> int:
        """Return the bytes of keys, values and inputs, with the room for later ones."""
        parts = [*(self.slots or ()), *([] if self.inputs is None else [self.inputs])]
        return super().nbytes() + sum(part.numel() * part.element_size() for part in parts)

    def activate_past_recording(self) -> None:
        """Raise ``ValueError``: tokens of a window cannot be taken back."""
        raise ValueError("a cache with compressed tokens cannot go back: generate without an assistant")

    def crop(self, tokens_to_remove: int) -> None:
        """Raise ``ValueError``: tokens of a window cannot be taken back."""
        if tokens_to_remove:
            raise ValueError("a cache with compressed tokens cannot be cropped: generate without an assistant")

    def _apply_to(self, change: Any) -> None:
        if self.slots is not None and self.numbers is not None:
            self.slots = (change(self.slots[0]), change(self.slots[1]))
            self.numbers = change(self.numbers)
        if self.inputs is not None:
            self.inputs = change(self.inputs)

    def _of_rows(self, index: Tensor) -> None:
        super()._of_rows(index)
        self._apply_to(lambda part: part[index.to(part.device)])

    def _move(self, device: Any) -> None:
        super()._move(device)
        self._apply_to(lambda part: part.to(device, non_blocking=True))


def layer_among(module: nn.Module, given: tuple[Any, ...]) -> CompressiveLayer | None:
    """Return the layer of an attention in the cache among the arguments of its forward; None without a cache.

    An empty layer becomes a ``CompressiveLayer``. Raises ``ValueError`` for layers of other kinds.
    """
    cache = next((value for value in given if isinstance(value, Cache)), None)
    if cache is None:
        return None
    number: Any = module.layer_idx
    layer = cache.layers[number] if number < len(cache.layers) else None
    if type(layer) is PatternLayer and not layer.get_seq_length() and not layer.record_past:
        layer = cache.layers[number] = CompressiveLayer()
    if not hasattr(layer, "expect"):
        raise ValueError(
            "a compressed memory has a cache of its own, which is made from an empty DynamicCache in evaluation: in "
            "training set use_cache=False; static, quantized and filled caches, and those of an assistant, do not go"
        )
    return layer  # type: ignore[return-value]
