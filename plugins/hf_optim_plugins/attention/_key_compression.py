"""Keys and values of several tokens made one by a strided convolution, and what a batch of rows holds of them.

A row is cut into windows of ``stride`` tokens, from its first one that is not padding. A window is *compressed* for a
query if it is complete and each of its tokens is ``local`` or more positions away; in a causal model each must be the
query itself or lie before it. Tokens of other windows are seen as they are. So a token is seen once: by itself, or in
its window.

This file is stored beside checkpoints, so it imports only torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn


class MeanConv1d(nn.Conv1d):
    """A convolution over windows that do not overlap, each head by itself, that begins as their mean.

    The weight is ``[heads * width, width, stride]``. Windows that do not overlap are rows of a matrix, so there is a
    product for each head: convolutions in groups are slow on a GPU.
    """

    def __init__(self, heads: int, width: int, stride: int, **about: Any) -> None:
        self.heads, self.width = heads, width
        size = heads * width
        super().__init__(size, size, stride, stride=stride, groups=heads, bias=False, **about)

    def reset_parameters(self) -> None:
        """Make the output the mean of each window."""
        with torch.no_grad():
            eye = torch.eye(self.width, dtype=self.weight.dtype, device=self.weight.device) / self.kernel_size[0]
            self.weight.copy_(eye.repeat(self.heads, 1)[:, :, None].expand_as(self.weight))

    def forward(self, input: Tensor) -> Tensor:
        """Return ``[B, G, n // stride, D]`` of ``[B, G, n, D]``; tokens of an incomplete window are left out."""
        stride = self.kernel_size[0]
        count = input.shape[2] // stride
        if not count:
            return input[:, :, :0]
        windows = input[:, :, : count * stride].unflatten(2, (count, stride)).flatten(3)
        matrix = self.weight.unflatten(0, (self.heads, self.width)).permute(0, 3, 2, 1).flatten(1, 2)
        return (windows.to(matrix.dtype) @ matrix).to(input.dtype)


class Compression(nn.Module):
    """The convolutions of one attention: ``key`` and ``value``."""

    def __init__(self, heads: int, width: int, stride: int, **about: Any) -> None:
        super().__init__()
        self.key = MeanConv1d(heads, width, stride, **about)
        self.value = MeanConv1d(heads, width, stride, **about)


@dataclass(frozen=True, eq=False)
class Held:
    """Keys and values of the tokens so far of a batch of rows, each row from its position 0.

    Attributes:
        stride, local: see above.
        key, value: of compressed windows, ``[B, G, M, D]``; the first ``windows[b]`` of row b.
        raw_key, raw_value: of tokens, ``[B, G, R, D]``; in row b those from position ``first[b]`` to ``tokens[b]``.
        windows, first, tokens: a number for each row.
    """

    stride: int
    local: int
    key: Tensor
    value: Tensor
    raw_key: Tensor
    raw_value: Tensor
    windows: tuple[int, ...]
    first: tuple[int, ...]
    tokens: tuple[int, ...]

    @classmethod
    def nothing(cls, stride: int, local: int, like: Tensor) -> Held:
        """Return the state before the first token of rows whose keys are like ``[B, G, N, D]``."""
        empty, zeros = like[:, :, :0], (0,) * len(like)
        return cls(stride, local, empty, empty, empty, empty, zeros, zeros, zeros)

    @property
    def even(self) -> bool:
        """True if all rows have the same number of tokens."""
        return len(set(self.tokens)) < 2

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The keys and values."""
        return self.key, self.value, self.raw_key, self.raw_value

    def added(self, key: Tensor, value: Tensor, valid: Tensor | None, counts: Sequence[int]) -> Held:
        """Return the state with more tokens, none of them compressed.

        Args:
            key, value: ``[B, G, N, D]``.
            valid: bool ``[B, N]``, False for padding, which is left out; None if there is none.
            counts: tokens of each row without padding.
        """
        raw_key, raw_value = _appended(self.raw_key, key), _appended(self.raw_value, value)
        tokens = tuple(old + new for old, new in zip(self.tokens, counts, strict=True))
        if valid is not None or not self.even:
            new = torch.ones(len(key), key.shape[2], dtype=torch.bool, device=key.device) if valid is None else valid
            old = _below([b - a for a, b in zip(self.first, self.tokens, strict=True)], self.raw_key)
            lengths = [b - a for a, b in zip(self.first, tokens, strict=True)]
            raw_key, raw_value = _moved([raw_key, raw_value], torch.cat([old, new], 1), max(lengths))
        return replace(self, raw_key=raw_key, raw_value=raw_value, tokens=tokens)

    def compressed(self, compression: Compression, causal: bool) -> Held:
        """Return the state with all windows compressed that are so for the last query of a row, raw tokens kept."""
        local = self.local if causal else 0
        due = tuple(max(0, tokens - local) // self.stride for tokens in self.tokens)
        new = [b - a for a, b in zip(self.windows, due, strict=True)]
        if not any(new):
            return self
        raw = [part[:, :, : max(new) * self.stride] for part in (self.raw_key, self.raw_value)]
        made = [convolution(part) for convolution, part in zip((compression.key, compression.value), raw, strict=True)]
        both = [_appended(self.key, made[0]), _appended(self.value, made[1])]
        if not self.even:
            both = _moved(both, torch.cat([_below(self.windows, self.key), _below(new, made[0])], 1), max(due))
        return replace(self, key=both[0], value=both[1], windows=due)

    def tidied(self) -> Held:
        """Return the state without the raw tokens of compressed windows."""
        first = tuple(windows * self.stride for windows in self.windows)
        gone = [b - a for a, b in zip(self.first, first, strict=True)]
        left = max(b - a for a, b in zip(first, self.tokens, strict=True))
        raw = [self.raw_key, self.raw_value]
        if self.even:
            raw = [part[:, :, gone[0] : gone[0] + left].clone() for part in raw]  # a view would keep all of them
        else:
            lengths = [b - a for a, b in zip(self.first, self.tokens, strict=True)]
            raw = _moved(raw, _below(lengths, raw[0]) & ~_below(gone, raw[0]), left)
        return replace(self, raw_key=raw[0], raw_value=raw[1], first=first)

    def of_rows(self, index: Tensor) -> Held:
        """Return the state of chosen rows of the batch, int64 ``[rows]``."""
        chosen = index.tolist()
        names = "windows", "first", "tokens"
        counts: Any = {name: tuple(getattr(self, name)[row] for row in chosen) for name in names}
        return replace(self._with([part.index_select(0, index.to(part.device)) for part in self.tensors]), **counts)

    def to(self, device: torch.device | str) -> Held:
        """Return the state on a device."""
        return self._with([part.to(device, non_blocking=True) for part in self.tensors])

    def _with(self, tensors: Sequence[Tensor]) -> Held:
        key, value, raw_key, raw_value = tensors
        return replace(self, key=key, value=value, raw_key=raw_key, raw_value=raw_value)


def _appended(before: Tensor, after: Tensor) -> Tensor:
    """Return ``after`` behind ``before``, along the tokens of both; without a copy if there are none before."""
    return torch.cat([before, after], 2) if before.shape[2] else after


def _below(counts: Sequence[int], part: Tensor) -> Tensor:
    """Return bool ``[B, n]`` of ``[B, G, n, D]``: True for the first ``counts[b]`` tokens of row b."""
    return torch.arange(part.shape[2], device=part.device) < torch.tensor(counts, device=part.device)[:, None]


def _moved(parts: Sequence[Tensor], kept: Tensor, length: int) -> list[Tensor]:
    """Return ``[B, G, n, D]`` with the tokens where ``kept``, bool ``[B, n]``, at the beginning, ``length`` of them."""
    places = (~kept).to(torch.int8).argsort(dim=1, stable=True)[:, :length]
    return [part.gather(2, places[:, None, :, None].expand(-1, part.shape[1], -1, part.shape[3])) for part in parts]
