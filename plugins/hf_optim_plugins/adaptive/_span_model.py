"""Adaptive attention spans in the models of transformers.

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
    Attachment,
    Band,
    HeadGroupsLayer,
    HeadPatterns,
    Pattern,
    PatternConfig,
    PatternModel,
    attend_biased,
    constant_on,
    groups_of,
    nearest_keys,
    read_mask,
    require_all_keys,
    whole,
    with_bias,
)

from ._span_mask import HeadSpans, SpanBias, support, untouched

NAMES = ("max_span", "ramp", "windows")
LONGEST = 2**30  # tokens


def sizes_of(settings: Any) -> tuple[int, int]:
    """Return S and R from the settings. Raises ``ValueError`` for others."""
    if not isinstance(settings, Mapping) or any(name not in settings for name in NAMES):
        raise ValueError(f"adaptive spans need config.{FIELD} with {', '.join(NAMES)}")
    return whole(settings, "max_span", low=1, high=LONGEST), whole(settings, "ramp", low=1, high=LONGEST)


def windows_of(settings: Mapping[str, Any]) -> list[list[int]] | None:
    """Return the fixed windows of each layer and head, in tokens; None while spans are learned. ``ValueError`` too."""
    found, (size, _) = settings["windows"], sizes_of(settings)
    if found is None:
        return None
    if not isinstance(found, list) or not found or not all(isinstance(each, list) and each for each in found):
        raise ValueError("the windows of adaptive spans are a list for each layer, with a number for each head")
    return [[whole({"windows": each}, "windows", low=1, high=size) for each in layer] for layer in found]


def build(settings: Mapping[str, Any], layer: int, heads: int, causal: bool) -> list[Pattern]:
    """Return the pattern of each head: its fixed window, or the largest that a span can become."""
    size, _ = sizes_of(settings)
    windows = windows_of(settings)
    counts = [size] * heads if windows is None else windows[layer] if layer < len(windows) else []
    if len(counts) != heads:
        raise ValueError(f"the windows of adaptive spans are not those of {heads} heads in layer {layer}")
    return [Pattern((Band(count - 1, 0 if causal else count - 1),), causal) for count in counts]


@dataclass(frozen=True)
class SpanSet:
    """What the heads of one attention see.

    Attributes:
        counts: of how many nearest keys each head sees any, the query among them.
        unbiased: how many of these it sees fully.
        causal: keys behind the query are not seen.
        bias: what the mask adds to scores; None for fixed windows.
    """

    counts: tuple[int, ...]
    unbiased: tuple[int, ...]
    causal: bool
    bias: SpanBias | None

    @property
    def heads(self) -> HeadPatterns:
        """The patterns of the keys that are seen."""
        return nearest_keys(self.counts, self.causal)

    def of(self, heads: Sequence[int]) -> SpanSet:
        """Return those of some heads."""
        bias = None if self.bias is None else self.bias.of(constant_on(tuple(heads), self.bias.z.device))
        counts, unbiased = (tuple(part[head] for head in heads) for part in (self.counts, self.unbiased))
        return SpanSet(counts, unbiased, self.causal, bias)


class SpanAttachment(Attachment):
    """The attention function: softmax over what the spans leave on, with a cache by groups of heads."""

    def require_settings(self, config: Any) -> None:
        """Raise ``ValueError`` for settings that are not those of this model."""
        super().require_settings(config)
        windows = windows_of(self._settings(config))
        layers = config.get_text_config().num_hidden_layers
        if windows is not None and len(windows) != layers:
            raise ValueError(f"adaptive spans have windows of {len(windows)} layers, and the model has {layers}")

    def spans(self, module: Any, query: Tensor, causal: bool) -> SpanSet:
        """Return the spans of an attention module for ``query`` ``[B, H, N, D]``.

        In evaluation a step of one token reads again only spans that have changed, and does not wait for the device.
        """
        heads, again = query.shape[1], module.training or query.shape[2] > 1
        settings = self._settings(module.config)
        size, ramp = sizes_of(settings)
        learned: HeadSpans | None = getattr(module, "span", None)
        if learned is None:
            if settings["windows"] is None:
                raise ValueError("this attention has no learned spans: load the model by its own class")
            layer = getattr(module, "layer_idx", None) or 0
            one = self.patterns(module.config, layer, heads, causal)
            counts = tuple(one.patterns[each].terms[0].before + 1 for each in one.heads)  # type: ignore[attr-defined]
            return SpanSet(counts, counts, causal, None)
        if len(learned.z) != heads:
            raise ValueError(f"this attention has {heads} heads, and spans of {len(learned.z)}")
        shares = learned.shares(again)
        bias = SpanBias(learned.z.to(torch.promote_types(learned.z.dtype, query.dtype)), size, ramp)
        counts = tuple(support(share, size, ramp) for share in shares)
        return SpanSet(counts, tuple(untouched(share, size) for share in shares), causal, bias)

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
        for what, extra in (("soft caps of scores", softcap), ("attention sinks", s_aux)):
            if extra is not None:
                raise ValueError(f"attention with adaptive spans does not support {what}")
        causal = bool(getattr(module, "is_causal", False) if is_causal is None else is_causal)
        count = query.shape[2]
        spans = self.spans(module, query, causal)
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        rows, other = read_mask(attention_mask, count, spans.heads)
        if position_bias is not None:
            other = position_bias if other is None else with_bias(position_bias, other)
        dropped = dropout if module.training else 0.0
        held = getattr(key, "held_by", None)
        if held is None:
            require_all_keys(spans.heads, query, key, rows, other)
            out = attend_spans(query, key, value, spans, scale, rows, other, dropped)
        else:
            key = key.plain()  # type: ignore[attr-defined]
            rows = None if rows is None or rows.plain else rows
            out = _cached(held, query, key, value, spans, scale, rows, other, dropped)
        return out.transpose(1, 2).contiguous(), None


def attend_spans(
    query: Tensor, key: Tensor, value: Tensor, spans: SpanSet, scale: float,
    rows: Any = None, mask: Tensor | None = None, dropout: float = 0.0, way: str = "auto",
) -> Tensor:  # fmt: skip
    """Compute ``softmax(s + log m)`` over what each head sees, ``[B, H, N, D]``; arguments as in ``attend_biased``."""
    return attend_biased(
        query, key, value, spans.counts, spans.unbiased, spans.bias, spans.causal, scale, rows, mask, dropout, way
    )


def _cached(
    held: Any, query: Tensor, key: Tensor, value: Tensor, spans: SpanSet, scale: float,
    rows: Any, mask: Tensor | None, dropout: float,
) -> Tensor:  # fmt: skip
    """Compute the attention of new tokens and of those that a cache holds, and let the cache drop keys."""
    if hasattr(held, "attend_nearest"):  # keys in rings, on a kernel
        return held.attend_nearest(query, spans.counts, spans.bias, scale, rows, mask, dropout)  # type: ignore[no-any-return]
    if not hasattr(held, "take"):
        raise ValueError("the cache was made for another attention pattern: start a new one")
    shared, first = query.shape[1] // key.shape[1], held.fresh
    seen = [max(spans.counts[head * shared : (head + 1) * shared]) for head in range(key.shape[1])]
    groups = groups_of(seen)
    out = query.new_zeros(*query.shape[:3], value.shape[-1])
    for (part, keys, values), group in zip(held.take(groups), groups, strict=True):
        heads = [head * shared + each for head in group for each in range(shared)]
        own = spans if len(groups) == 1 else spans.of(heads)
        kept = part.settle(own.heads, rows)
        if first:
            continue  # all keys are in ``key``
        index = constant_on(tuple(heads), query.device)
        some = mask if mask is None or mask.shape[1] == 1 else mask[:, index]
        # A step reads at most as many tokens as there are, or as fixed buffers have room for.
        bias = None if min(own.unbiased) >= getattr(kept, "length", kept.tokens) else own.bias
        found = kept.attend(query[:, index], keys, values, scale, rows, some, dropout, bias)
        out = found if len(groups) == 1 else out.index_copy(1, index, found.to(out.dtype))
    return attend_spans(query, key, value, spans, scale, rows, mask, dropout) if first else out


ATTACHMENT = SpanAttachment("hf_optim_adaptive_span", build)


def attentions(model: nn.Module) -> list[nn.Module]:
    """Return the attention modules of a model, those of a layer in its place."""
    return [module for module in model.modules() if hasattr(module, "is_causal")]


class AdaptiveSpanBase(PatternConfig):
    """Base of the configuration classes."""

    attachment = ATTACHMENT


class AdaptiveSpanModel(PatternModel):
    """Base of the model classes: attention modules have learned spans until ``fix_spans`` makes windows of them."""

    cache_layer = HeadGroupsLayer
    _keep_in_fp32_modules_strict: Any

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        # In bfloat16 a span of 1,000 tokens would move in steps of four.
        cls._keep_in_fp32_modules_strict = {*(getattr(cls, "_keep_in_fp32_modules_strict", None) or ()), "span.z"}

    def set_up_attention(self) -> None:
        """Number the layers, and add spans to the attention modules of a model whose spans are learned."""
        super().set_up_attention()
        settings = getattr(self.config, FIELD, None)  # type: ignore[attr-defined]
        if settings is None or settings["windows"] is not None:
            return
        heads = self.config.get_text_config().num_attention_heads  # type: ignore[attr-defined]
        for module in attentions(self):  # type: ignore[arg-type]
            if not hasattr(module, "span"):
                weight = next(module.parameters(), None)
                module.span = HeadSpans(heads, device=None if weight is None else weight.device)
                module.span.train(module.training)  # type: ignore[operator]
        found = (getattr(module, "span", None) for module in attentions(self))  # type: ignore[arg-type]
        spans: list[HeadSpans] = [each for each in found if each is not None]
        for each in spans:
            each.read_with(spans)

    def initialize_weights(self) -> None:
        """Initialize what a checkpoint does not have; spans as the longest."""
        for module in self.modules():  # type: ignore[attr-defined]
            if isinstance(module, HeadSpans) and not getattr(module.z, "_is_hf_initialized", False):
                nn.init.ones_(module.z)
                module._is_hf_initialized = True  # type: ignore[assignment]
        super().initialize_weights()  # type: ignore[misc]

    def fix_spans(self) -> list[list[int]]:
        """Make windows of the learned spans, in place, and return them, by layer and head, in tokens.

        A window is as long as what the ramp leaves on: nothing that the model sees is lost, and the keys of the ramp
        count fully. Raises ``ValueError`` for a model whose spans are fixed.
        """
        config = self.config  # type: ignore[attr-defined]
        size, ramp = sizes_of(getattr(config, FIELD))
        modules = [module for module in attentions(self) if hasattr(module, "span")]  # type: ignore[arg-type]
        if not modules:
            raise ValueError("the spans of this model are fixed already")
        each = [[support(share, size, ramp) for share in module.span.shares(True)] for module in modules]  # type: ignore
        layers = config.get_text_config().num_hidden_layers
        windows = each * layers if len(each) == 1 else each  # one attention that all layers share
        numbers = [getattr(module, "layer_idx", None) for module in modules]
        if len(windows) != layers or (len(each) > 1 and sorted(map(str, numbers)) != sorted(map(str, range(layers)))):
            raise ValueError("the attention modules of this model are not those of its layers, one each")
        if len(each) > 1:
            windows = [windows[numbers.index(layer)] for layer in range(layers)]
        settings = {"max_span": size, "ramp": ramp, "windows": windows}
        for held in {id(part.config): part.config for part in self.modules() if hasattr(part, "config")}.values():  # type: ignore
            if getattr(held, FIELD, None) is not None:
                setattr(held, FIELD, settings)
        for module in modules:
            del module.span
        return windows
