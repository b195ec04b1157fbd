"""Transformer-XL in the models of transformers: segments with a memory, and relative positions.

This file is stored beside checkpoints, so it imports only torch and transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache

from hf_optim.toolkit.attention import (
    FIELD,
    Apart,
    Attachment,
    Band,
    HeadPatterns,
    Kept,
    Pattern,
    PatternConfig,
    PatternModel,
    Rows,
    Segments,
    Term,
    chosen,
    flag,
    masked_attention,
    mixed,
    seen_mask,
    take_tokens,
    whole,
)

from ._position_bound import require_positions
from ._relative_positions import RelativePositions
from ._segment_walk import attend_segments
from ._stream_memory import CORE, MEMORY, STREAM, StreamMemory, WithStreams, models_within

POSITIONS = ("carried", "relative")
COPIED, EARLIER = "hf_optim_copied_inputs", "hf_optim_earlier_keys"  # keywords of the attention function
CHUNK = 128  # of a chunk of tokens that reads a cache
LONGEST_MEMORY = 2**30  # tokens


def segment_of(settings: Mapping[str, Any]) -> tuple[int, int]:
    """Return the tokens of a segment, and those of the memory."""
    return whole(settings, "segment", 1, LONGEST_MEMORY), whole(settings, "memory", 1, LONGEST_MEMORY)


def build(settings: Mapping[str, Any], layer: int, heads: int, causal: bool) -> list[Pattern]:
    """Return the pattern: a query sees its segment up to itself, and ``memory`` tokens before the segment."""
    size, memory = segment_of(settings)
    term: Term = Band(memory) if size == 1 else Segments(size, memory)
    return [Pattern((term,), causal)]


class XLAttachment(Attachment):
    """The attention function: memories without gradients, streams, and relative positions."""

    def read_others(self, settings: Mapping[str, Any]) -> None:
        """Read what ``build`` does not."""
        chosen(settings, "positions", POSITIONS)
        flag(settings, "stop_gradient"), flag(settings, "untie")
        whole(settings, "clamp"), whole(settings, "table")

    def attention(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, None]:
        """Compute the attention of a module; the first ``COPIED`` tokens are there for their keys and values alone."""
        copied = kwargs.pop(COPIED, 0)
        if not copied:
            return super().attention(module, query, key, value, *args, **kwargs)
        kwargs[EARLIER] = key[:, :, :copied], value[:, :, :copied]
        query, key, value = (part[:, :, copied:] for part in (query, key, value))
        out, _ = super().attention(module, query, key, value, *args, **kwargs)
        return torch.cat([out.new_zeros(len(out), copied, *out.shape[2:]), out], 1), None

    def compute(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, heads: HeadPatterns, scale: float,
        rows: Rows | None, mask: Tensor | None, dropout: float, given: dict[str, Any],
    ) -> Tensor:  # fmt: skip
        settings = getattr(module.config, FIELD)
        size, memory = segment_of(settings)
        relative: RelativePositions | None = getattr(module, "relative", None)
        count, stream = query.shape[2], given.get(MEMORY)
        stops = settings["stop_gradient"] and module.training and torch.is_grad_enabled() and count > size
        if relative is None and stream is None and not (stops and key.shape[2] == count):
            return super().compute(module, query, key, value, heads, scale, rows, mask, dropout, given)
        if mask is not None:
            raise ValueError("a memory of segments takes attention_mask as [batch, length], and no masks of pairs")
        if key.shape[2] != count:
            return self._over_all(relative, query, key, value, heads, scale, rows, dropout)  # type: ignore[arg-type]
        earlier: Any = given.get(EARLIER)
        if stream is not None and relative is None:
            held = stream.earlier(module.layer_idx, (key, value))  # type: ignore[arg-type]
            stream.keep(module.layer_idx, held, (key, value))  # type: ignore[arg-type]
            later = (key.detach(), value.detach()) if settings["stop_gradient"] else (key, value)
            earlier = tuple(torch.cat(pair, 2) for pair in zip(held, later, strict=True))
        elif earlier is None and not settings["stop_gradient"]:
            earlier = key, value
        there = None if stream is None else stream.there
        if rows is not None and (rows.left or rows.packed or rows.holes):
            apart = Apart.of(rows)
            parts = [apart.take(part) for part in (query, key, value)]
            taken = None if earlier is None else tuple(apart.take(part) for part in earlier)
            out = _by_segments(relative, parts, size, memory, scale, dropout, taken, None)
            return apart.put(out, len(query))
        out = _by_segments(relative, [query, key, value], size, memory, scale, dropout, earlier, there)
        return out if rows is None else out.masked_fill((rows.segments < 0)[:, None, :, None], 0)

    def compute_kept(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, kept: Kept, scale: float,
        rows: Rows | None, mask: Tensor | None, dropout: float, given: dict[str, Any],
    ) -> Tensor:  # fmt: skip
        relative: RelativePositions | None = getattr(module, "relative", None)
        if relative is None:
            return super().compute_kept(module, query, key, value, kept, scale, rows, mask, dropout, given)
        if mask is not None:
            raise ValueError("relative positions take attention_mask as [batch, length], and no masks of pairs")
        begin, parts = kept.tokens - query.shape[2], []
        for start in range(begin, kept.tokens, CHUNK):
            stop = min(start + CHUNK, kept.tokens)
            reading = kept.reading(start, stop, rows)
            k, v = (key, value) if reading.index is None else (take_tokens(x, reading.index) for x in (key, value))
            places = torch.arange(start, stop, device=query.device)[None]
            far = reading.places
            if rows is not None:
                positions = rows.positions()
                places = positions[:, start:stop]
                far = positions.gather(1, far.clamp_min(0).expand(len(positions), -1))
            distance = places[:, :, None] - far[:, None, :]
            asked = query[:, :, start - begin : stop - begin]
            parts.append(_attend_at(relative, asked, k, v, distance, reading.seen, scale, dropout))
        return torch.cat(parts, 2)

    def _over_all(
        self, relative: RelativePositions, query: Tensor, key: Tensor, value: Tensor, heads: HeadPatterns, scale: float,
        rows: Rows | None, dropout: float,
    ) -> Tensor:  # fmt: skip
        """Compute attention of some queries over the keys of a cache that holds all, and room for later ones."""
        count, length = query.shape[2], key.shape[2]
        seen = seen_mask(heads, count, length, rows, query.device)
        places = torch.arange(length, device=query.device)[None] if rows is None else rows.positions()
        start = length - count if rows is None else rows.offset
        distance = places[:, start : start + count, None] - places[:, None, :]
        return _attend_at(relative, query, key, value, distance, seen, scale, dropout)


def _by_segments(
    relative: RelativePositions | None, parts: list[Tensor], size: int, memory: int, scale: float, *more: Any
) -> Tensor:
    query, key, value = parts
    if relative is None:
        return attend_segments(query, key, value, size, memory, scale, *more)

    def bias(begin: int, end: int, held: int) -> Tensor:
        return relative.by_key(query[:, :, begin:end], held) * scale

    dropout, earlier, there = more
    return attend_segments(
        relative.content_query(query), key, value, size, memory, scale, dropout, earlier, there, bias
    )


def _attend_at(
    relative: RelativePositions, query: Tensor, key: Tensor, value: Tensor, distance: Tensor, seen: Tensor | None,
    scale: float, dropout: float,
) -> Tensor:  # fmt: skip
    """Compute attention over keys at distances ``[1 or B, n, K]``; ``seen`` as in ``Reading``."""
    seen = distance.new_ones(1, 1, 1, key.shape[2], dtype=torch.bool) if seen is None else seen
    most = 1 + max(0, int(torch.where(seen, distance[:, None], 0).max()))
    bias = relative.at(query, distance, most) * scale
    return masked_attention(relative.content_query(query), key, value, seen, bias, scale, dropout)


ATTACHMENT = XLAttachment("hf_optim_transformer_xl", build)


class ProjectsMemory:
    """Mixin of a module of attention whose memory is projected by its present weights, in training."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Compute the attention of ``hidden_states``, the first argument, with copies of inputs before them."""
        states: Tensor = args[0] if args else kwargs["hidden_states"]
        settings = getattr(self.config, FIELD)  # type: ignore[attr-defined]
        stream: StreamMemory | None = kwargs.get(MEMORY)
        stops, several = settings["stop_gradient"], states.shape[1] > settings["segment"]
        learns = self.training and torch.is_grad_enabled()  # type: ignore[attr-defined]
        copies = (
            [states.detach() if stops else states] if several and (stream is not None or (stops and learns)) else []
        )
        if stream is not None:
            number = self.layer_idx  # type: ignore[attr-defined]
            earlier = stream.earlier(number, (states,))
            stream.keep(number, earlier, (states,))
            copies.insert(0, earlier[0].to(states))
        copied = sum(part.shape[1] for part in copies)
        if not copied:
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        if any(isinstance(part, Cache) for part in (*args, *kwargs.values())):
            raise ValueError("a memory is projected again in training, and a cache holds projections: use_cache=False")
        wider = torch.cat([*copies, states], 1)
        args, kwargs = ((wider, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": wider})
        out, *more = super().forward(*args, **{**kwargs, COPIED: copied})  # type: ignore[misc]
        return (out[:, copied:], *more)


class TransformerXLBase(PatternConfig):
    """Base of the configuration classes."""

    attachment = ATTACHMENT


class XLStreams(WithStreams):
    """Mixin of a class whose forward takes ``stream``; of a body, it sees to positions."""

    def prepare_body(self, given: dict[str, Any], stream: Tensor | None) -> Any:
        """Change the arguments of the forward in place, and return the memory of ``stream``, or None."""
        settings = getattr(self.config, FIELD, None)  # type: ignore[attr-defined]
        if settings is None:
            return None
        memory = None
        if stream is not None:
            memory = self.start_stream(given, stream, *segment_of(settings))
        elif self.training and given.get("use_cache") is None and settings["stop_gradient"]:  # type: ignore[attr-defined]
            given["use_cache"] = False
        if settings["positions"] == "relative":
            _without_positions(given, self)
        elif settings["table"]:
            require_positions(given, settings["table"])
        return memory


def _without_positions(given: dict[str, Any], model: Any) -> None:
    """Give every token the position 0, where a rotation is the identity and a table adds the same row."""
    asked = given.get("position_ids")
    held = any(given.get(name) is not None for name in ("cache", "past_key_values"))
    told_apart = asked is not None and given.get("attention_mask") is None and not held
    if told_apart and bool((asked[..., 1:] - asked[..., :-1] != 1).any()):  # type: ignore[index]
        raise ValueError(
            "relative positions count from the beginning of a row, and position_ids do not tell the documents of a "
            "packed row apart: give each a row of its own"
        )
    ids = given.get("input_ids")
    like = given["inputs_embeds"] if ids is None else ids
    given["position_ids"] = torch.zeros(1, 1, dtype=torch.int64, device=like.device)


class TransformerXLModel(XLStreams, PatternModel):
    """Mixin of a model class, first among its bases. ``forward`` takes ``stream``."""

    can_detach = False  # positions are added in another way

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get(STREAM) is not None and kwargs.get("use_cache") is None:
            kwargs["use_cache"] = False
        return super().__call__(*args, **kwargs)

    def set_up_attention(self) -> None:
        super().set_up_attention()
        settings = getattr(self.config, FIELD, None)  # type: ignore[attr-defined]
        if settings is None:
            return
        within = models_within(self)  # type: ignore[arg-type]
        for each in within:
            each.__class__ = mixed(XLStreams, type(each))  # type: ignore[arg-type]
            each.__dict__[CORE] = each is within[-1]
        if settings["positions"] == "relative":
            add_relative(self, settings)

    def initialize_weights(self) -> None:
        """Initialize what a checkpoint does not have."""
        for module in self.modules():  # type: ignore[attr-defined]
            if isinstance(module, RelativePositions) and not all(
                getattr(weight, "_is_hf_initialized", False) for weight in module.parameters()
            ):
                module.initialize(getattr(self.config, "initializer_range", 0.02))  # type: ignore[attr-defined]
                for each in module.modules():
                    each._is_hf_initialized = True  # type: ignore[assignment]
        super().initialize_weights()  # type: ignore[misc]


def add_relative(model: Any, settings: Mapping[str, Any], **about: Any) -> list[RelativePositions]:
    """Give each attention of a model weights of relative positions where it has none, and return those that are new."""
    config, shared, made = model.config, None, []
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    for module in [each for each in model.modules() if hasattr(each, "is_causal")]:
        if not hasattr(module, "relative"):
            module.relative = RelativePositions(
                config.hidden_size, heads, width, settings["clamp"], None if settings["untie"] else shared, **about
            )
            made.append(module.relative)
        shared = shared or module.relative.held[0]
        module.__class__ = mixed(ProjectsMemory, type(module))  # type: ignore[arg-type]
    return made
