"""Patterns in transformers: an attention function and a mask of the same name.

A technique makes one ``Attachment``, with the name of the implementation and the function that builds the patterns of a
layer from the settings in the configuration. transformers has the padding of a batch only where masks are made, so the
mask of that name hands over segments, and the attention function does the rest.

This file is stored beside checkpoints, so it imports only torch and transformers.
"""

from __future__ import annotations

import json
import weakref
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, bidirectional_mask_function, causal_mask_function

from .attend import attend
from .head_patterns import HeadPatterns
from .kept import Kept
from .pattern import Pattern
from .rows import SEGMENTS, UNWRITTEN, Rows
from .settings import ReadSettings, wholes

FIELD = "attention_pattern"  # of the configuration: the settings of the technique, a dict

Builder = Callable[[Mapping[str, Any], int, int, bool], Sequence[Pattern]]


@dataclass(frozen=True)
class Attachment:
    """An attention implementation that computes the patterns of a technique.

    Attributes:
        name: of the implementation, as in ``attn_implementation``; a number for the module of ``build`` is added.
        build: ``build(settings, layer, heads, causal)`` returns the pattern of all heads, or one for each.
        check: ``check(settings, context)`` raises ``ValueError`` if the settings do not fit a model that reads at most
            ``context`` tokens; None: any that ``build`` takes fit.
        by_layer: ``by_layer(settings)`` returns the names of lists that have one entry for each layer, or one for all.
        users: models that compute by it.
    """

    name: str
    build: Builder
    check: Callable[[Mapping[str, Any], int], None] | None = None
    by_layer: Callable[[Mapping[str, Any]], Sequence[str]] = lambda settings: ()
    users: WeakSet[nn.Module] = field(default_factory=WeakSet, repr=False, compare=False)

    def __post_init__(self) -> None:
        # Checkpoints bring their code, of the version that wrote them: each module has a name of its own, so that none
        # computes with the code of another.
        object.__setattr__(self, "name", f"{self.name}_{zlib.crc32(self.code_module().encode()):08x}")

    def code_module(self) -> str:
        """Return the name of the module with the code of the technique."""
        return self.build.__module__

    def register(self) -> None:
        """Register the function and the mask with transformers. Repeated calls replace what was there."""
        AttentionInterface.register(self.name, self.attention)
        AttentionMaskInterface.register(self.name, mask)

    def unregister(self) -> None:
        """Remove both again."""
        for interface in (AttentionInterface, AttentionMaskInterface):
            interface._global_mapping.pop(self.name, None)

    def use(self, model: nn.Module) -> None:
        """Register both for a model, until it is released or deleted."""
        if model not in self.users:
            # Callbacks of weak references run from the latest to the first: the set forgets a model before this looks.
            weakref.finalize(model, self._collect).atexit = False
            self.users.add(model)
        if self.name not in AttentionInterface._global_mapping:
            self.register()

    def release(self, model: nn.Module) -> None:
        """Say that a model computes by them no longer; the last one that did takes both out of the registries."""
        self.users.discard(model)
        self._collect()

    def _collect(self) -> None:
        if not self.users:
            self.unregister()

    def patterns(self, config: Any, layer: int, heads: int, causal: bool) -> HeadPatterns:
        """Return the patterns of a layer. Raises ``ValueError`` for settings that make none."""
        settings = json.dumps(self._settings(config), sort_keys=True)
        return _patterns(self, settings, self._context(config), layer, heads, causal)

    def require_settings(self, config: Any) -> None:
        """Raise ``ValueError`` if the settings of a configuration give no pattern for a layer, or hold others."""
        text, settings = config.get_text_config(), ReadSettings(self._settings(config))
        layers = text.num_hidden_layers
        for name in self.by_layer(settings):
            count = len(wholes(settings, name))
            if count not in (0, 1, layers):
                raise ValueError(f"the attention pattern has {count} {name}, and the model {layers} layers")
        for layer in range(layers):
            self.make(settings, self._context(config), layer, text.num_attention_heads, False)
        self.read_others(settings)
        settings.require_all_read()

    def read_others(self, settings: Mapping[str, Any]) -> None:
        """Read the settings that ``build`` does not."""

    def _settings(self, config: Any) -> Mapping[str, Any]:
        settings = getattr(config, FIELD, None)
        if not isinstance(settings, Mapping):
            raise ValueError(f"attn_implementation={self.name!r} needs config.{FIELD}")
        return settings

    def _context(self, config: Any) -> int | None:
        context = getattr(config, "max_position_embeddings", None)
        return context if isinstance(context, int) else None

    def make(
        self, settings: Mapping[str, Any], context: int | None, layer: int, heads: int, causal: bool
    ) -> HeadPatterns:
        """Return the patterns of a layer of a model that reads at most ``context`` tokens; ``ValueError`` as above."""
        if self.check is not None and context is not None:
            self.check(settings, context)
        return HeadPatterns.of(self.build(settings, layer, heads, causal), heads)

    def attention(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        dropout: float = 0.0,
        is_causal: bool | None = None,
        softcap: float | None = None,
        s_aux: Tensor | None = None,
        position_bias: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """Compute the attention of a module of transformers under its patterns.

        Args:
            module: has ``config``, ``layer_idx`` and ``is_causal``.
            query: ``[B, H, N, D]``.
            key, value: ``[B, G, M, D]``; those that are held if they come from a ``PatternLayer``.
            attention_mask: what ``mask`` returned, or a mask ``[B, 1, N, M]`` that the caller made.
            scaling: of the scores; 1 / sqrt(D) if it is None.
            dropout: share of the weights that is dropped.

        Returns:
            The output ``[B, N, H, D]``, and None: weights are not formed.
        """
        if softcap is not None or s_aux is not None:
            what = "a soft cap of the scores" if softcap is not None else "attention sinks"
            raise ValueError(f"attention under a pattern does not support {what}")
        causal = bool(getattr(module, "is_causal", False) if is_causal is None else is_causal)
        layer = getattr(module, "layer_idx", None)
        heads = self.patterns(module.config, 0 if layer is None else layer, query.shape[1], causal)
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        rows, other = read_mask(attention_mask, query.shape[2], heads)
        if position_bias is not None:
            other = position_bias if other is None else with_bias(position_bias, other)
        dropped = dropout if module.training else 0.0
        held = getattr(key, "held_by", None)
        if held is not None:
            key = key.plain()  # type: ignore[attr-defined]
            rows = None if rows is None or rows.plain else rows
            kept = held.settle(heads, rows)
        else:
            require_all_keys(heads, query, key, rows, other)
        if held is not None and kept.tokens > query.shape[2]:
            out = self.compute_kept(module, query, key, value, kept, scale, rows, other, dropped, kwargs)
        else:
            out = self.compute(module, query, key, value, heads, scale, rows, other, dropped, kwargs)
        return out.transpose(1, 2).contiguous(), None

    def compute(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, heads: HeadPatterns, scale: float,
        rows: Rows | None, mask: Tensor | None, dropout: float, given: dict[str, Any],
    ) -> Tensor:  # fmt: skip
        """Return ``attend`` of the patterns, ``[B, H, N, D]``; ``given`` are other keywords of the module's call."""
        return attend(query, key, value, heads, scale, rows, mask, dropout)

    def compute_kept(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, kept: Kept, scale: float,
        rows: Rows | None, mask: Tensor | None, dropout: float, given: dict[str, Any],
    ) -> Tensor:  # fmt: skip
        """Return the attention over the keys of a cache, ``[B, H, N, D]``; ``given`` as in ``compute``."""
        return kept.attend(query, key, value, scale, rows, mask, dropout)


def require_all_keys(heads: HeadPatterns, query: Tensor, key: Tensor, rows: Rows | None, mask: Tensor | None) -> None:
    """Raise ``ValueError`` unless keys that are not from a ``PatternLayer`` are those of all tokens, in their order."""
    count, length = query.shape[2], key.shape[2]
    if count == length:
        return
    told = mask.shape[-1] if mask is not None else length if rows is None else rows.segments.shape[1]
    if told != length:
        raise ValueError(
            f"the attention pattern gets keys of {length} tokens for a row of {told}, and not which these are: "
            "set use_cache=False"
        )
    if heads.reads_length or not heads.causal:
        raise ValueError("what a token sees under this attention pattern changes with later ones: set use_cache=False")


@lru_cache(maxsize=1024)
def _patterns(
    attachment: Attachment, settings: str, context: int | None, layer: int, heads: int, causal: bool
) -> HeadPatterns:
    return attachment.make(json.loads(settings), context, layer, heads, causal)


def mask(
    *,
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any],
    attention_mask: Tensor | None = None,
    device: torch.device | None = None,
    **kwargs: Any,
) -> Tensor | None:
    """Return what the attention function needs of a batch, in the place of a mask.

    Raises ``ValueError`` for an ``attention_mask`` that does not reach to the last query.

    None: each row is one document without padding. ``SEGMENTS`` ``[B, 1, 1, M]``: the segments of ``Rows``. bool
    ``[B, 1, N, M]``: the mask of a model that restricts attention in ways of its own. Rows are an attribute of either.
    """
    parts = list(_leaves(mask_function))
    documents = [part for part in parts if isinstance(part, Tensor)]
    begin = int(q_offset) - int(kv_offset)
    known = None if attention_mask is None else attention_mask[:, int(kv_offset) : int(kv_offset) + kv_length]
    if known is not None and known.shape[1] < min(kv_length, begin + q_length):
        raise ValueError(
            f"the attention_mask has {known.shape[1]} columns for {begin + q_length} tokens: pass that of all tokens, "
            "those in the cache among them"
        )
    traced = _is_traced(known, *documents)  # without values, of which padding and documents could be read
    padded = known is not None and not traced and not bool(known.all())
    if traced:
        documents = []
    rows = None
    if documents or padded or q_length != kv_length:
        segments = torch.zeros(batch_size, kv_length, dtype=torch.int32, device=device)
        if documents:
            segments = segments + documents[0].to(segments)
        if known is not None and padded:
            segments[:, : known.shape[1]].masked_fill_(~known.bool(), -1)
        segments[:, begin + q_length :] = UNWRITTEN
        rows = Rows.of(segments, begin) if documents or padded else Rows(segments, begin)
    if any(part is None for part in parts):
        if begin + q_length != kv_length:
            raise ValueError(
                "a static cache does not go with an attention pattern and a window of the model: leave "
                "cache_implementation out"
            )
        stock: Callable[..., Any] = AttentionMaskInterface()["sdpa"]
        more = {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
        sizes = {"batch_size": batch_size, "q_length": q_length, "kv_length": kv_length, "device": device}
        offsets = {"q_offset": q_offset, "kv_offset": kv_offset}
        masks = {"mask_function": mask_function, "attention_mask": attention_mask}
        handed = stock(**{**kwargs, **sizes, **offsets, **masks, **more})
    elif rows is None:
        return None
    else:
        handed = rows.segments[:, None, None, :].to(SEGMENTS)
    handed.hf_optim_rows = rows
    return handed


def _is_traced(*tensors: Tensor | None) -> bool:
    """Return True if tensors have shapes alone: the model is analysed, not run."""
    return any(t is not None and (t.is_meta or type(t).__name__ == "FakeTensor") for t in tensors)


def read_mask(handed: Tensor | None, count: int, heads: HeadPatterns) -> tuple[Rows | None, Tensor | None]:
    """Return rows and mask from what ``mask`` returned, or from a mask of the caller.

    Raises ``ValueError`` for a mask of the caller if the patterns need positions, which it does not tell.
    """
    if handed is None:
        return None, None
    known = hasattr(handed, "hf_optim_rows")
    rows: Rows | None = getattr(handed, "hf_optim_rows", None)
    if handed.dtype == SEGMENTS:
        if rows is None:  # lost where the tensor was copied
            segments = handed[:, 0, 0].int()
            rows = Rows.of(segments, int((segments[0] != UNWRITTEN).sum()) - count)
        return rows, None
    if handed.dtype != torch.bool and not handed.is_floating_point():
        raise ValueError(f"an attention mask of four dimensions must be bool or floating point, not {handed.dtype}")
    if not known and (heads.reads_length or not heads.moves_along) and not heads.is_full(handed.shape[-1]):
        raise ValueError(
            "under this attention pattern the position of a token counts, which a mask of four dimensions does not "
            "tell: pass attention_mask as [batch, length]"
        )
    return rows, handed


def with_bias(bias: Tensor, other: Tensor) -> Tensor:
    if other.dtype == torch.bool:
        return bias.masked_fill(~other, torch.finfo(bias.dtype).min)
    return bias + other


def _leaves(function: Any) -> Iterator[Any]:
    """Yield for each part of a mask function: its documents, True if it only orders or pads, None if it is unknown."""
    if function in (causal_mask_function, bidirectional_mask_function):
        yield True
        return
    name = getattr(function, "__qualname__", "")
    cells = [cell.cell_contents for cell in getattr(function, "__closure__", None) or ()]
    if name == "packed_sequence_mask_function.<locals>.inner_mask" and len(cells) == 1:
        yield cells[0]
    elif name == "remap_positions_for_packed_sequence.<locals>.inner_mask":
        # Causality by position inside of a document is causality by place.
        for inner in cells:
            if callable(inner):
                yield from _leaves(inner)
    elif name == "and_masks.<locals>.and_mask":
        for inner in cells[0]:
            yield from _leaves(inner)
    else:
        yield None
