"""Memory-compressed attention in the models of transformers.

This file is stored beside checkpoints, so it imports only torch and transformers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_optim.toolkit.attention import (
    FIELD,
    SEGMENTS,
    Apart,
    Attachment,
    Pattern,
    PatternConfig,
    PreparedModel,
    Rows,
    is_detached,
    mixed,
    whole,
)

from ._compressed_attention import compressed_attention
from ._compressed_cache import CompressedLayer, hold_compressed
from ._key_compression import Compression, Held, MeanConv1d


def sizes_of(settings: Any) -> tuple[int, int, int, int]:
    """Return stride, local, key heads and their width from the settings. Raises ``ValueError`` for other settings."""
    if not isinstance(settings, Mapping):
        raise ValueError("compressed attention needs config.attention_pattern")
    stride = whole(settings, "stride", low=1, high=4096)
    sizes = whole(settings, "key_heads", low=1, high=4096), whole(settings, "head_width", low=1, high=4096)
    return stride, whole(settings, "local"), *sizes


def no_pattern(settings: Mapping[str, Any], layer: int, heads: int, causal: bool) -> Sequence[Pattern]:
    """Raise ``ValueError``: a pattern of pairs does not express keys that are made of several tokens."""
    raise ValueError("compressed attention makes keys of several tokens: they are not counted as keys of tokens")


class CompressedAttachment(Attachment):
    """The attention function: convolutions, cache, padding and packed documents around ``compressed_attention``."""

    def require_settings(self, config: Any) -> None:
        """Raise ``ValueError`` for settings that are not those of compressed attention."""
        if getattr(config, FIELD, None) is not None:
            stride, context = sizes_of(getattr(config, FIELD))[0], self._context(config)
            if context is not None and stride > context:
                raise ValueError(f"windows of {stride} tokens do not fit into the {context} that the model reads")

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
        """Compute the attention of a module of transformers; arguments and result as in ``Attachment.attention``."""
        for what, extra in (("soft caps", softcap), ("attention sinks", s_aux), ("position biases", position_bias)):
            if extra is not None:
                raise ValueError(f"compressed attention has no {what}: set another attn_implementation")
        if attention_mask is not None and attention_mask.dtype != SEGMENTS:
            raise ValueError(
                "compressed attention takes padding and packed documents, and no other masks: those of pairs, from a "
                "caller or of a sliding window, mean nothing for keys that are made of several tokens"
            )
        stride, local, _, _ = sizes_of(getattr(module.config, FIELD, None))
        causal = bool(getattr(module, "is_causal", False) if is_causal is None else is_causal)
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        weights: Compression = module.compression  # type: ignore[assignment]
        layer: CompressedLayer | None = getattr(key, "hf_optim_compressed", None)
        dropped = dropout if module.training else 0.0
        given = Given.read(attention_mask, query.shape[2], key, layer)
        if given.documents is not None:
            apart = given.documents
            q, k, v = (apart.take(part) for part in (query, key, value))
            held = Held.nothing(stride, local, k).added(k, v, apart.segments() >= 0, apart.lengths().tolist())
            at = torch.arange(q.shape[2], device=q.device)[None]
            out = compressed_attention(q, held.compressed(weights, causal), at, causal, scale, dropped, 0)
            return apart.put(out, len(query)).transpose(1, 2).contiguous(), None
        if layer is not None and not causal:
            raise ValueError("windows of this model are complete only at the end of a row: set use_cache=False")
        before = layer.held if layer is not None and layer.held is not None else Held.nothing(stride, local, key)
        if (before.stride, before.local) != (stride, local):
            raise ValueError("the cache was made by a model with another compression: start a new one")
        given.require_all(before)
        new, own = slice(given.begin, given.end), slice(given.end - query.shape[2], given.end)
        key, value = key[:, :, : given.end - given.begin], value[:, :, : given.end - given.begin]
        valid = given.valid
        padded = valid is not None and min(given.counts) < key.shape[2]
        held = before.added(key, value, valid[:, new] if valid is not None and padded else None, given.counts)
        held = held.compressed(weights, causal)
        places = torch.arange(given.end, device=key.device)[None] if valid is None else valid.cumsum(1) - 1
        begin = own.start if valid is None else None
        out = compressed_attention(query, held, places[:, own], causal, scale, dropped, begin)
        if valid is not None:
            out = out.masked_fill(~valid[:, None, own, None], 0)
        if layer is not None:
            layer.keep(held.tidied(), key.shape[2])
        return out.transpose(1, 2).contiguous(), None


@dataclass(frozen=True, eq=False)
class Given:
    """What an attention function is given of a batch.

    Attributes:
        begin, end: places of the new keys in the rows; the queries are the last of them.
        valid: bool ``[B, end]``, False for padding; None if there is none.
        earlier, counts: tokens of each row before ``begin``, and after it.
        documents: those of packed rows.
    """

    begin: int
    end: int
    valid: Tensor | None
    earlier: tuple[int, ...]
    counts: tuple[int, ...]
    documents: Apart | None = None

    @classmethod
    def read(cls, handed: Tensor | None, count: int, key: Tensor, layer: CompressedLayer | None) -> Given:
        """Return what is meant by ``handed``, the result of the mask function, for ``count`` queries and ``key``."""
        batch, length = len(key), key.shape[2]
        begin = 0 if layer is None else layer.seen
        if handed is None:
            return cls(begin, begin + length, None, (begin,) * batch, (length,) * batch)
        segments = handed[:, 0, 0].int()
        rows = getattr(handed, "hf_optim_rows", None)  # lost where the tensor was copied
        end = (segments.shape[1] - count if rows is None else rows.offset) + count
        if end > begin + length:
            raise ValueError(
                f"compressed attention got keys of {length} tokens for a row of {end - begin}: the cache has dropped "
                "some. Set use_cache=False"
            )
        known: dict[int, Given] = vars(handed).setdefault("hf_optim_given", {})
        if begin not in known:
            known[begin] = cls._of_segments(segments[:, :end], begin, count, layer is not None)
        return known[begin]

    @classmethod
    def _of_segments(cls, segments: Tensor, begin: int, count: int, cached: bool) -> Given:
        """Return what segments ``[B, end]`` mean. This waits for the device."""
        valid, end = segments >= 0, segments.shape[1]
        earlier, counts = torch.stack([valid[:, :begin].sum(1), valid[:, begin:].sum(1)]).tolist()
        documents = None
        if bool((segments > 0).any()):
            if cached or count != end:
                raise ValueError("rows of several documents have no cache: set use_cache=False")
            documents = Apart.of(Rows.of(segments))
        whole = sum(earlier) + sum(counts) == valid.numel()
        return cls(begin, end, None if whole else valid, tuple(earlier), tuple(counts), documents)

    def require_all(self, held: Held) -> None:
        """Raise ``ValueError`` unless ``held`` are the tokens before the new ones."""
        if held.tokens != self.earlier:
            raise ValueError(
                "the cache holds other tokens than the attention_mask says: pass the mask of all tokens, those in the "
                "cache among them"
            )


ATTACHMENT = CompressedAttachment("hf_optim_compressed", no_pattern)


class HoldsCompressed(nn.Module):
    """Mixin of an attention module whose caches hold compressed keys."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not self.training and not is_detached(getattr(self, "config", None)):
            hold_compressed(self, (*args, *kwargs.values()))
        return super().forward(*args, **kwargs)


def attentions(model: nn.Module) -> list[nn.Module]:
    """Return the attention modules of a model."""
    return [module for module in model.modules() if hasattr(module, "is_causal")]


def add_compression(model: nn.Module, settings: Any, **about: Any) -> None:
    """Add the convolutions to each attention of a model, in place. Raises ``ValueError`` for other settings."""
    stride, _, heads, width = sizes_of(settings)
    for module in attentions(model):
        module.compression = Compression(heads, width, stride, **about).train(module.training)
        if module.is_causal:
            module.__class__ = mixed(HoldsCompressed, type(module))  # type: ignore[arg-type]


class CompressedBase(PatternConfig):
    """Base of the configuration classes."""

    attachment = ATTACHMENT


class CompressedModel(PreparedModel):
    """Base of the model classes."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        if getattr(config, FIELD, None) is not None:
            add_compression(self, getattr(config, FIELD))  # type: ignore[arg-type]

    def initialize_weights(self) -> None:
        """Initialize what a checkpoint does not have; convolutions as means."""
        for module in self.modules():  # type: ignore[attr-defined]
            if isinstance(module, MeanConv1d) and not getattr(module.weight, "_is_hf_initialized", False):
                module.reset_parameters()
                module._is_hf_initialized = True  # type: ignore[assignment]
        super().initialize_weights()  # type: ignore[misc]
