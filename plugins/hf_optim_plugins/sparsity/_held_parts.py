"""What a model reads of its batch beside hidden states, and states that stand beside keys and values in a cache.

A convolution or a recurrence over the length must know which tokens are padding and where documents begin, and in
decoding what came before. ``ReadsRows`` hands the first to the layers of a model, as the keyword ``ROWS``; ``hold``
makes a layer of a cache keep the second, which beams reorder with the keys.

This file is stored beside checkpoints, so it imports only torch and transformers.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, EncoderDecoderCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from hf_optim.toolkit.modules import mixed

ROWS = "hf_optim_rows_of_tokens"  # keyword of a layer
CORE = "_hf_optim_hands_rows"  # attribute of the part of a model that has the layers


@dataclass(frozen=True, eq=False)
class TokenRows:
    """The rows of the new tokens of a forward.

    Attributes:
        seen: places that were read before, padding included.
        valid: bool ``[B, N]``: False for padding; None if there is none.
        documents: int ``[B, N]``: a number for each document of packed rows; None if rows are not packed.
    """

    seen: int = 0
    valid: Tensor | None = None
    documents: Tensor | None = None

    def cleared(self, part: Tensor) -> Tensor:
        """Return ``[B, N, ...]`` with zeros at padding."""
        if self.valid is None:
            return part
        return part.masked_fill(~self.valid.view(*self.valid.shape, *(1,) * (part.dim() - 2)), 0)

    def same_document(self, distance: int) -> Tensor | None:
        """Return bool ``[B, N]``: whether the token ``distance`` places before is of the same document.

        None if rows are not packed. The first tokens of a row, which have none before them, get False.
        """
        if self.documents is None:
            return None
        same = torch.zeros_like(self.documents, dtype=torch.bool)
        same[:, distance:] = self.documents[:, distance:] == self.documents[:, : self.documents.shape[1] - distance]
        return same


def rows_of(given: Mapping[str, Any]) -> TokenRows:
    """Return the rows of the arguments of a model's forward.

    Raises ``ValueError`` for a mask that does not say which tokens are padding.
    """
    ids, mask, positions = (given.get(name) for name in ("input_ids", "attention_mask", "position_ids"))
    hidden = ids if ids is not None else given.get("inputs_embeds")
    if hidden is None:
        return TokenRows()  # the model says what is missing
    batch, count = hidden.shape[:2]
    cache = cache_among(given.values())
    seen = 0 if cache is None else int(cache.get_seq_length())
    if mask is not None and (not isinstance(mask, Tensor) or mask.dim() != 2):
        raise ValueError(
            "convolutions and recurrences over the length take attention_mask as [batch, length]: a mask of pairs does "
            "not say which tokens are padding"
        )
    if mask is not None:
        if mask.shape[1] < seen + count:
            raise ValueError(
                f"the attention_mask has {mask.shape[1]} columns for {seen + count} tokens: pass that of all tokens, "
                "those in the cache among them"
            )
        return TokenRows(seen, mask[:, seen : seen + count].bool())
    if any(given.get(name) is not None for name in ("cu_seq_lens_q", "seq_idx")) and positions is None:
        raise ValueError("packed rows need position_ids, which begin at 0 with each document")
    if positions is None or seen or not isinstance(positions, Tensor) or positions.dim() != 2 or count < 2:
        return TokenRows(seen)
    if cache is not None:
        return TokenRows(seen)  # as transformers does: packed rows have no cache
    begins = nn.functional.pad(positions[:, 1:] != positions[:, :-1] + 1, (1, 0))
    return TokenRows(seen, None, begins.cumsum(1).expand(batch, -1))


def cache_among(values: Any) -> Cache | None:
    """Return the cache among arguments, that of the decoder itself; None if there is none."""
    for value in values:
        if isinstance(value, EncoderDecoderCache):
            return value.self_attention_cache
        if isinstance(value, Cache):
            return value
    return None


class ReadsRows(nn.Module):
    """Mixin of the part of a model that has its layers: they get the rows of the batch as the keyword ``ROWS``."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return super().__call__(*args, **self.with_rows(args, kwargs))

    def with_rows(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """Return the keyword arguments of a forward, with the rows if this part has the layers."""
        names = self.__dict__.get(CORE)
        if names is None:
            return kwargs
        return {**kwargs, ROWS: rows_of(dict(zip(names, args, strict=False)) | kwargs)}


def read_rows(model: Any) -> None:
    """Let the part of a model that has its layers hand the rows of a batch to them, in place."""
    every = sum(hasattr(module, "is_causal") for module in model.modules())
    core: Any = [
        part
        for part in model.modules()
        if isinstance(part, PreTrainedModel) and sum(hasattr(m, "is_causal") for m in part.modules()) == every
    ][-1]
    core.__class__ = mixed(ReadsRows, type(core))  # type: ignore[arg-type]
    core.__dict__[CORE] = tuple(inspect.signature(type(core).forward).parameters)[1:]


def require_rows(given: Mapping[str, Any], title: str) -> TokenRows:
    """Return the rows among the arguments of a layer. Raises ``ValueError`` if they did not arrive."""
    rows: Any = given.get(ROWS)
    if not hasattr(rows, "same_document"):  # of the code of a checkpoint it has a class of its own
        raise ValueError(f"{title} was called without its model, which tells padding from tokens: call the model")
    return rows  # type: ignore[no-any-return]


class HeldParts(DynamicLayer):
    """Mixin of a layer of a cache that holds states beside keys and values, each after a number of places."""

    is_croppable = False
    held: Any = None  # name -> (places read, tensors with the rows of the batch first)

    def take(self, name: str, seen: int, rows: int) -> dict[str, Tensor] | None:
        """Return the state ``name`` after ``seen`` places; None before the first.

        Raises ``ValueError`` if the cache has it after other places, or for another number of rows.
        """
        places, tensors = (self.held or {}).get(name, (0, None))
        if places != seen:
            raise ValueError(
                f"the cache holds {seen} tokens, and the states beside its keys were computed after {places}: a "
                "forward failed, or the cache is of another model. Start a new one"
            )
        if tensors is not None and len(next(iter(tensors.values()))) != rows:
            raise ValueError(
                f"the cache holds {len(next(iter(tensors.values())))} rows of states, and got tokens of {rows}"
            )
        return tensors

    def put(self, name: str, places: int, tensors: dict[str, Tensor]) -> None:
        """Hold the state ``name`` after so many places."""
        self.held = {**(self.held or {}), name: (places, tensors)}

    def _change(self, change: Any) -> None:
        if self.held:
            self.held = {
                name: (places, {key: change(part) for key, part in tensors.items()})
                for name, (places, tensors) in self.held.items()
            }

    def crop(self, tokens_to_remove: int) -> None:
        """Raise ``ValueError``: the states of earlier tokens are gone."""
        if tokens_to_remove:
            raise ValueError(
                "a cache that holds the state of a convolution or a recurrence cannot be cropped: generate without an "
                "assistant"
            )

    def reset(self) -> None:
        """Forget all tokens."""
        super().reset()
        self.held = None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Choose rows of the batch, for beam search."""
        super().reorder_cache(beam_idx)  # type: ignore[arg-type]
        self._change(lambda part: part.index_select(0, beam_idx.to(part.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row of the batch."""
        super().batch_repeat_interleave(repeats)
        self._change(lambda part: part.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep chosen rows of the batch, by number or as bool ``[B]``."""
        super().batch_select_indices(indices)
        self._change(lambda part: part[indices.to(part.device)])

    def offload(self) -> None:
        """Move the states to the CPU with the keys."""
        super().offload()
        self._change(lambda part: part.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        """Move the states back with the keys."""
        super().prefetch()
        if getattr(self, "device", None) is not None:
            self._change(lambda part: part.to(self.device, non_blocking=True))


def hold(given: Any, number: int | None) -> Any:
    """Return the layer ``number`` of the cache among arguments, which from now on holds states; None without a cache.

    Raises ``ValueError`` for a layer that cannot: static, quantized and offloaded ones are for keys and values.
    """
    cache = cache_among(given)
    if cache is None or number is None:
        return None
    while len(cache.layers) <= number and cache.layer_class_to_replicate is not None:
        cache.layers.append(cache.layer_class_to_replicate())
    layer = cache.layers[number]
    if not isinstance(layer, HeldParts):
        if not isinstance(layer, DynamicLayer) or getattr(layer, "quantized_data", None) is not None:
            raise ValueError(
                f"this model keeps states beside keys and values, which a {type(layer).__name__} cannot hold: leave "
                "cache_implementation out"
            )
        layer.__class__ = mixed(HeldParts, type(layer))
    return layer
