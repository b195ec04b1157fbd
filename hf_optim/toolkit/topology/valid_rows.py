"""The rows of a module's input that count: those of real tokens, not of padding.

A calibration driver enters ``statistics.BatchRows.of(batch)`` around each forward. In it, ``select`` and ``mask_of``
return what counts of the rows that a module reads, given the masks of the part of the model that the module belongs to.

Rows are matched to a mask ``[B, T]`` by shape: ``[B, T, ...]``, ``[T, B, ...]``, ``[B, ..., T]``, or flattened to
``[B T]``. Rows of any other shape (a pooled vector, the last token alone, windows) all count: nothing is dropped that
cannot be matched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(eq=False)
class StreamMask:
    """The mask of one part of a model on one batch.

    Attributes:
        masks: bool ``[B, T]`` each, True where a row counts; the first whose shape fits is used.
        resample: maps a number of rows ``S`` to a mask ``[B, S]`` or None, for a part that changes the length of its
            input (a convolutional stem, padding to a multiple).
    """

    masks: Sequence[Tensor]
    resample: Callable[[int], Tensor | None] = lambda length: None
    _resampled: dict[int, Tensor | None] = field(default_factory=dict)

    @property
    def has_padding(self) -> bool:
        """True if any row does not count."""
        return any(not bool(mask.all()) for mask in self.masks)

    def fit(self, shape: Sequence[int]) -> Tensor | None:
        """Return the mask for rows of this shape (an input's shape without the features), or None if none fits."""
        for mask in self.masks:
            if (fitted := fit(mask, shape)) is not None:
                return fitted
        for length in dict.fromkeys(shape[:2]) if len(shape) > 1 else ():
            if length not in self._resampled:
                self._resampled[length] = self.resample(length)
            made = self._resampled[length]
            if made is not None and (fitted := fit(made, shape)) is not None:
                return fitted
        return None

    def fit_sequences(self, shape: Sequence[int]) -> Tensor | None:
        """Return a mask for rows of which each sequence has any number: those of sequences that are not all padding.

        None if no sequence is all padding, or the number of sequences does not fit.
        """
        sequences = [mask.any(1) for mask in self.masks]
        for real in sequences:
            if len(shape) and shape[0] == len(real) and not bool(real.all()):
                return real.view(-1, *[1] * (len(shape) - 1)).expand(tuple(shape))
        return None


def fit(mask: Tensor, shape: Sequence[int]) -> Tensor | None:
    """Return ``mask [B, T]`` in the shape of rows that were made from ``[B, T]``, or None if they do not fit."""
    batch, length = mask.shape
    shape = tuple(shape)
    if shape == (batch * length,):
        return mask.reshape(-1)
    if len(shape) < 2:
        return None
    ones = [1] * (len(shape) - 2)
    if shape[:2] == (batch, length):
        return mask.view(batch, length, *ones).expand(shape)
    if shape[0] == batch and shape[-1] == length:
        return mask.view(batch, *ones, length).expand(shape)
    if shape[:2] == (length, batch):
        return mask.T.reshape(length, batch, *ones).expand(shape)
    return None


class ValidRows:
    """The rows of one batch that count, for every module of a model.

    Args:
        masks: stream -> its mask.
        stream_of: returns the stream of a module.
        labels: the labels of the batch, for losses on recorded batches; they are not given to the model.

    Attributes:
        foreign: tensors of another stream that modules of the decoder read, by the module that got them: these rows
            follow the mask of the encoder.
        gathered: id of a module -> mask ``[n]`` of the rows that a router gathered for it, or None if unknown.
    """

    def __init__(
        self, masks: Mapping[str, StreamMask], stream_of: Callable[[Any], str], labels: Tensor | None = None
    ) -> None:
        self.masks, self.stream_of, self.labels = masks, stream_of, labels
        self.has_padding = any(mask.has_padding for mask in masks.values())
        self.foreign: dict[Any, Tensor] = {}
        self.gathered: dict[int, Tensor | None] = {}
        self._fitted: dict[Any, Tensor | None] = {}
        self._places: dict[int, tuple[Tensor, Tensor]] = {}
        self._selected: tuple[Tensor, int, Tensor, Tensor] | None = None

    def mask_of(self, module: Any, inputs: Tensor) -> Tensor | None:
        """Return bool in the shape of ``inputs`` without its last dimension, on its device; None if all rows count."""
        # The matrix of an expert gets only the tokens that count: the dispatch on its experts has selected them.
        if not self.has_padding or not isinstance(module, nn.Module):
            return None
        shape = tuple(inputs.shape[:-1])
        if id(module) in self.gathered:
            mask = self.gathered[id(module)]
            return mask if mask is not None and tuple(mask.shape) == shape else None
        if any(_is_same(inputs, tensor) for tensor in self.foreign.values()):
            return self._fit(("encoder",), shape, inputs.device)
        stream = self.stream_of(module)
        # A decoder also reads keys and values of the encoder, whose length may differ from its own.
        return self._fit((stream, "encoder") if stream == "decoder" else (stream,), shape, inputs.device)

    def select(self, module: Any, inputs: Tensor) -> Tensor:
        """Return the rows that count, ``[n, features]``; ``inputs`` itself if all do.

        Modules that read the same tensor get the same tensor.
        """
        mask = self.mask_of(module, inputs)
        if mask is None:
            return inputs
        version = 0 if inputs.is_inference() else inputs._version
        if self._selected is not None:
            tensor, seen, used, rows = self._selected
            if tensor is inputs and seen == version and used is mask:
                return rows
        if id(mask) not in self._places:  # found once for each mask, since finding it synchronizes an accelerator
            self._places[id(mask)] = (mask, mask.flatten().nonzero().flatten())
        places = self._places[id(mask)][1]
        rows = inputs if len(places) == mask.numel() else inputs.reshape(-1, inputs.shape[-1])[places]
        self._selected = (inputs, version, mask, rows)
        return rows

    def _fit(self, streams: Sequence[str], shape: tuple[int, ...], device: torch.device) -> Tensor | None:
        key = (streams, shape, device)
        if key not in self._fitted:
            masks = [self.masks[stream] for stream in streams if stream in self.masks]
            fitted = [*(mask.fit(shape) for mask in masks), *(mask.fit_sequences(shape) for mask in masks)]
            found = next((mask for mask in fitted if mask is not None), None)
            self._fitted[key] = None if found is None else found.to(device)
        return self._fitted[key]


def _is_same(first: Tensor, second: Tensor) -> bool:
    """Return True if two tensors are one, or views of all of the same memory."""
    return first is second or (
        first.numel() == second.numel()
        and first.dtype == second.dtype
        and first.device == second.device
        and first.device.type != "meta"
        and first.data_ptr() == second.data_ptr()
    )


_current: ContextVar[ValidRows | None] = ContextVar("valid_rows", default=None)


@contextmanager
def during(rows: ValidRows) -> Iterator[ValidRows]:
    """Make ``rows`` those of the current batch for the length of a ``with`` block."""
    token = _current.set(rows)
    try:
        yield rows
    finally:
        _current.reset(token)


def current() -> ValidRows | None:
    """Return the rows of the batch that runs through the model, or None outside of calibration."""
    return _current.get()


def mask_of(module: Any, inputs: Tensor) -> Tensor | None:
    """Return which rows of a module's input (or output) count: bool ``inputs.shape[:-1]``, or None if all do."""
    rows = _current.get()
    return None if rows is None else rows.mask_of(module, inputs)


def select(module: Any, inputs: Tensor) -> Tensor:
    """Return the rows of a module's input ``[..., features]`` that count.

    These are ``[n, features]``, or ``inputs`` itself if all rows count, also outside of calibration.
    """
    rows = _current.get()
    return inputs if rows is None else rows.select(module, inputs)
