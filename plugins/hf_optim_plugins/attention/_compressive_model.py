"""The Compressive Transformer in the models of transformers.

This file is stored beside checkpoints, so it imports only torch and transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel

from hf_optim.toolkit.attention import (
    FIELD,
    SEGMENTS,
    Apart,
    Attachment,
    HeadPatterns,
    Kept,
    Pattern,
    PatternConfig,
    PatternModel,
    Rows,
    Segments,
    chosen,
    masked_attention,
    mixed,
    take_tokens,
    whole,
)
from hf_optim.toolkit.modules import read_own_loss, watch_own_loss

from ._compression import FUNCTIONS, LOSSES, Compression, WindowConv1d, WindowDecoder, reconstruction
from ._compressive_cache import CompressiveLayer, Windows, layer_among, picked
from ._position_bound import require_positions
from ._segment_walk import Slots, attend_segments

# Keywords of the attention function.
WINDOWS, SLOTS = "hf_optim_windows", "hf_optim_slots"
AUXILIARY, CAPTURED = "hf_optim_auxiliary", "hf_optim_captured"
AT_ONCE = 128  # queries of a chunk of tokens that reads a cache
LONGEST_MEMORY = 2**30  # tokens


def sizes_of(settings: Mapping[str, Any]) -> tuple[int, int, int, int]:
    """Return the tokens of a segment, of the memory and of a window, and the slots.

    Raises ``ValueError`` if they do not fit.
    """
    ratio = whole(settings, "ratio", 1, 4096)
    size, memory = (whole(settings, name, 1, LONGEST_MEMORY) for name in ("segment", "memory"))
    if size % ratio or memory % ratio:
        raise ValueError(
            f"the attention pattern has segments of {size} tokens and a memory of {memory}: windows of {ratio} must "
            "divide both"
        )
    return size, memory, ratio, whole(settings, "compressed", 1, LONGEST_MEMORY)


def build(settings: Mapping[str, Any], layer: int, heads: int, causal: bool) -> list[Pattern]:
    """Return what a query sees of tokens as they are: its segment up to itself, and the memory before the segment."""
    size, memory, _, _ = sizes_of(settings)
    return [Pattern((Segments(size, memory),), causal)]


class CompressiveAttachment(Attachment):
    """The attention function: tokens as they are, and compressed ones."""

    counts_keys = False

    def read_others(self, settings: Mapping[str, Any]) -> None:
        """Read what ``build`` does not."""
        chosen(settings, "function", FUNCTIONS), chosen(settings, "loss", LOSSES), whole(settings, "table")
        weight = settings.get("loss_weight")
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 <= weight < float("inf"):
            raise ValueError(f"the attention pattern has loss_weight={str(weight)[:40]!r}, not a number from 0 on")

    def attention(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """Compute the attention of a module; the first tokens are windows where the module has ``WINDOWS``."""
        captured = kwargs.pop(CAPTURED, None)
        if captured is not None:
            captured.append((key, value))
            batch, heads, count, _ = query.shape
            return query.new_zeros(batch, count, heads, value.shape[3]), None
        if attention_mask is not None and attention_mask.dtype != SEGMENTS:
            raise ValueError("a compressed memory takes attention_mask as [batch, length], and no masks of pairs")
        windows: Windows = kwargs[WINDOWS]
        count = windows.count
        layer: CompressiveLayer | None = getattr(key, "held_by", None)
        if layer is None:
            kwargs[SLOTS] = key[:, :, :count], value[:, :, :count]
            key, value = key[:, :, count:], value[:, :, count:]
        else:
            kwargs[SLOTS] = layer
        out, _ = super().attention(module, query[:, :, count:], key, value, attention_mask, *args, **kwargs)
        if layer is not None:
            layer.tidy()
        return torch.cat([out.new_zeros(len(out), count, *out.shape[2:]), out], 1), None

    def compute(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, heads: HeadPatterns, scale: float,
        rows: Rows | None, mask: Tensor | None, dropout: float, given: dict[str, Any],
    ) -> Tensor:  # fmt: skip
        size, memory, ratio, most = sizes_of(getattr(module.config, FIELD))
        slots = given[SLOTS]
        pair: Any = slots.slots if isinstance(slots, CompressiveLayer) else slots
        count = query.shape[2]
        if count != key.shape[2]:
            raise ValueError("a compressed memory has a cache of its own: leave cache_implementation out")
        if rows is not None and rows.packed:
            raise ValueError("a compressed memory is of one document: give each document a row of its own")
        last = (count - 1) // size * size
        unseen = last < memory + ratio or pair is None  # no row has tokens for a window
        stops = module.training and torch.is_grad_enabled() and count > size
        if unseen and not stops and AUXILIARY not in given:
            return super().compute(module, query, key, value, heads, scale, rows, mask, dropout, given)
        apart = None
        if rows is not None and rows.left:
            apart = Apart.of(rows)
            query, key, value = (apart.take(part) for part in (query, key, value))
        own = _slots_of(pair, ratio, most, apart, count)
        if AUXILIARY in given:
            tokens = None if rows is None else (rows.segments >= 0).sum(1)
            tokens = tokens if apart is None else apart.lengths()
            made = _slots_of(given[AUXILIARY], ratio, most, apart, count)
            old = key.detach(), value.detach()
            lost = reconstruction(query.detach(), old, (made.key, made.value), (size, memory, ratio), scale, tokens)
            module.compression.loss = lost  # type: ignore[union-attr]
        out = attend_segments(query, key, value, size, memory, scale, dropout, slots=own)
        if apart is not None:
            return apart.put(out, len(rows.segments))  # type: ignore[union-attr]
        return out if rows is None else out.masked_fill((rows.segments < 0)[:, None, :, None], 0)

    def compute_kept(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, kept: Kept, scale: float,
        rows: Rows | None, mask: Tensor | None, dropout: float, given: dict[str, Any],
    ) -> Tensor:  # fmt: skip
        layer: CompressiveLayer = given[SLOTS]
        if layer.slots is None or layer.numbers is None:
            return super().compute_kept(module, query, key, value, kept, scale, rows, mask, dropout, given)
        size, memory, ratio, most = sizes_of(getattr(module.config, FIELD))
        begin, parts = kept.tokens - query.shape[2], []
        for start in range(begin, kept.tokens, AT_ONCE):
            stop = min(start + AT_ONCE, kept.tokens)
            reading = kept.reading(start, stop, rows)
            own = [(x if reading.index is None else take_tokens(x, reading.index)) for x in (key, value)]
            if rows is None:
                place = torch.arange(start, stop, device=query.device)[None]
            else:
                place = rows.positions()[:, start:stop]
            high = ((place // size * size - memory).clamp_min(0) // ratio)[:, :, None]
            number = layer.numbers[:, None, :]
            older = ((number >= 0) & (number < high) & (number >= high - most))[:, None]
            seen = reading.seen
            if seen is None:
                seen = older.new_ones(1, 1, stop - start, own[0].shape[2])
            seen = torch.cat([older, seen.expand(len(older), -1, -1, -1)], 3) if seen.shape[1] == 1 else seen
            both = [torch.cat([slot, part], 2) for slot, part in zip(layer.slots, own, strict=True)]
            asked = query[:, :, start - begin : stop - begin]
            parts.append(masked_attention(asked, both[0], both[1], seen, None, scale, dropout))
        out = parts[0] if len(parts) == 1 else torch.cat(parts, 2)
        if rows is not None:
            out = out.masked_fill((rows.segments[:, begin : kept.tokens] < 0)[:, None, :, None], 0)
        return out


def _slots_of(pair: tuple[Tensor, Tensor], ratio: int, most: int, apart: Apart | None, count: int) -> Slots:
    if apart is not None:
        rows = apart.index[:, 0] // count
        pair = pair[0][rows], pair[1][rows]
    return Slots(*pair, ratio, most)


ATTACHMENT = CompressiveAttachment("hf_optim_compressive_transformer", build)


class Compresses:
    """Mixin of a module of attention that compresses its inputs, and projects them beside the tokens."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Compute the attention of ``hidden_states``, the first argument, with compressed inputs before them."""
        if CAPTURED in kwargs:
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        module: Any = self
        states: Tensor = args[0] if args else kwargs["hidden_states"]
        settings = getattr(module.config, FIELD)
        size, memory, ratio, _ = sizes_of(settings)
        compression: Compression = module.compression
        compression.loss = None  # also that of a forward which was computed again in a backward
        layer = layer_among(module, (*args, *kwargs.values()))
        handed = kwargs.get("attention_mask")
        rows = getattr(handed, "hf_optim_rows", None) if handed is not None else None
        if handed is not None and handed.dtype == SEGMENTS and rows is None:
            rows = Rows.of(handed[:, 0, 0].int())
        rows = None if rows is None or rows.plain else rows
        before = 0 if layer is None else layer.get_seq_length()
        windows = Windows.ahead(rows, before, states.shape[1], len(states), ratio, states.device)
        learns = module.training and torch.is_grad_enabled() and layer is None
        if layer is None and not learns and (states.shape[1] - 1) // size * size < memory + ratio:
            windows = windows.none()
        earlier = states.new_zeros(len(states), ratio - 1, states.shape[2])
        if layer is not None:
            layer.require_made_for(len(states), (*sizes_of(settings), settings["function"]))
            earlier = earlier if layer.inputs is None else layer.inputs.to(states)
        both = torch.cat([earlier, states.detach()], 1)
        parts = picked(both, windows.index)
        made = compression(parts)
        if layer is not None:
            layer.inputs = picked(both, windows.latest)
            layer.expect(windows)
        slots = made if settings["loss"] == "task" else made.detach()
        wider = torch.cat([slots, states], 1)
        more = {**kwargs, WINDOWS: windows}
        ends = windows.index[:, :, -1] - (ratio - 1)
        if kwargs.get("position_embeddings") is not None:
            more["position_embeddings"] = tuple(_with_ends(part, ends) for part in kwargs["position_embeddings"])
        args, more = ((wider, *args[1:]), more) if args else (args, {**more, "hidden_states": wider})
        if learns and windows.count and compression.conv is not None:
            if settings["loss"] == "autoencoding":
                compression.loss = compression.autoencoding(parts, made, _real(windows, rows))
            elif settings["loss"] == "attention":
                more[AUXILIARY] = self._captured(made, ends, args, more)
        out, *rest = super().forward(*args, **more)  # type: ignore[misc]
        return (out[:, windows.count :], *rest)

    def _captured(self, made: Tensor, ends: Tensor, args: tuple[Any, ...], given: dict[str, Any]) -> Any:
        """Return keys and values of compressed inputs, projected by weights that get no gradient from it."""
        module: Any = self
        found: list[Any] = []
        kept = {name: part for name, part in given.items() if name not in (WINDOWS, "hidden_states")}
        kept |= {CAPTURED: found, "attention_mask": None}
        if given.get("position_embeddings") is not None:
            kept["position_embeddings"] = tuple(part[:, : made.shape[1]] for part in given["position_embeddings"])
        # Parameters, not tensors: layers that prune or quantize in training look theirs up as such.
        named = module.named_parameters()
        constants: dict[str, Any] = {name: nn.Parameter(w.detach(), requires_grad=False) for name, w in named}
        if args:
            torch.func.functional_call(module, constants, (made, *args[1:]), kept)
        else:
            torch.func.functional_call(module, constants, (), {**kept, "hidden_states": made})
        return found[0]


def _with_ends(part: Tensor, ends: Tensor) -> Tensor:
    """Return the positions ``[1 or B, N, D]`` with those of the last tokens of windows before them."""
    if not ends.shape[1]:
        return part
    batch = max(len(part), len(ends))
    index = ends.clamp_min(0)[:, :, None].expand(batch, -1, part.shape[-1])
    wide = part.expand(batch, -1, -1)
    return torch.cat([wide.gather(1, index), wide], 1)


def _real(windows: Windows, rows: Rows | None) -> Tensor | None:
    return None if rows is None else windows.number >= 0


class CompressiveTransformerBase(PatternConfig):
    """Base of the configuration classes."""

    attachment = ATTACHMENT


class CompressiveTransformerModel(PatternModel):
    """Mixin of a model class, first among its bases: compression in each attention, and its loss beside the task's."""

    can_detach = False  # its memory is part of what it reads

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        given = any(isinstance(part, Cache) for part in (*args, *kwargs.values()))
        if self.training and kwargs.get("use_cache") is None and not given:  # type: ignore[attr-defined]
            kwargs["use_cache"] = False
        settings = getattr(self.config, FIELD, None)  # type: ignore[attr-defined]
        if settings is not None and self.training and torch.is_grad_enabled():  # type: ignore[attr-defined]
            _require_losses(self, settings)
        if settings is not None and settings["function"] == "conv" and settings["loss"] != "task":
            read = f"{settings['loss_weight']} * model.compression_loss()"
            watch_own_loss(self, kwargs, "the loss of the compression", read)
        if settings is not None and settings["table"]:
            named = {**kwargs, "input_ids": args[0]} if args else kwargs
            require_positions(named, settings["table"])
        out = super().__call__(*args, **kwargs)
        # Some heads compute their loss by themselves, and not by ``loss_function``.
        lost = self.compression_loss() if self.training and kwargs.get("labels") is not None else None  # type: ignore[attr-defined]
        if lost is None:
            return out
        lost = lost * settings["loss_weight"]  # type: ignore[index]
        if isinstance(out, tuple):
            return (out[0] + lost.to(out[0]), *out[1:])
        out["loss"] = out["loss"] + lost.to(out["loss"])
        return out

    def set_up_attention(self) -> None:
        super().set_up_attention()
        settings = getattr(self.config, FIELD, None)  # type: ignore[attr-defined]
        if settings is not None:
            add_compression(self, settings)

    def initialize_weights(self) -> None:
        """Initialize what a checkpoint does not have; convolutions as means."""
        for module in self.modules():  # type: ignore[attr-defined]
            own = isinstance(module, (WindowConv1d, WindowDecoder))
            if own and not getattr(module.weight, "_is_hf_initialized", False):
                module.reset_parameters()
                module._is_hf_initialized = True
        super().initialize_weights()  # type: ignore[misc]

    def compression_loss(self) -> Tensor | None:
        """Return the mean over layers of the losses of the last forward in training, each of them once."""
        read_own_loss(self)
        found = [m.compression for m in self.modules() if hasattr(m, "compression")]  # type: ignore[attr-defined]
        losses = [each.loss for each in found if each.loss is not None]
        for each in found:
            each.loss = None
        return torch.stack(losses).mean() if losses else None

    @property
    def loss_function(self) -> Callable[..., Tensor]:
        """The loss of the head, with that of the compression in training."""
        task: Any = super().loss_function  # type: ignore[misc]

        def loss(*args: Any, **kwargs: Any) -> Tensor:
            found = task(*args, **kwargs)
            lost = self.compression_loss() if self.training else None  # type: ignore[attr-defined]
            if lost is None:
                return found
            lost = lost * getattr(self.config, FIELD)["loss_weight"]  # type: ignore[attr-defined]
            # With a number of items the loss is the batch's share of an optimizer step, and so is that of compression.
            items, labels = kwargs.get("num_items_in_batch"), kwargs.get("labels")
            if items is not None and labels is not None:
                lost = lost * ((labels[..., 1:] != -100).sum() / items)
            return found + lost.to(found)

        return loss

    @loss_function.setter
    def loss_function(self, value: Any) -> None:
        PreTrainedModel.loss_function.fset(self, value)  # type: ignore[attr-defined]


def _require_losses(model: Any, settings: Mapping[str, Any]) -> None:
    """Raise ``ValueError`` if checkpoints of activations hide the losses of the compression from the backward."""
    if settings["function"] != "conv" or settings["loss"] == "task":
        return
    for module in model.modules():
        given = getattr(getattr(module, "_gradient_checkpointing_func", None), "keywords", {})
        if getattr(module, "gradient_checkpointing", False) and given.get("use_reentrant", True):
            raise ValueError(
                f"the loss {settings['loss']} of the compression has no gradient under reentrant checkpoints of "
                'activations: pass gradient_checkpointing_kwargs={"use_reentrant": False}'
            )


def add_compression(model: Any, settings: Mapping[str, Any], **about: Any) -> None:
    """Give each attention of a model a compression where it has none."""
    for module in [each for each in model.modules() if hasattr(each, "is_causal")]:
        if not hasattr(module, "compression"):
            made = Compression(
                model.config.hidden_size, settings["ratio"], settings["function"], settings["loss"], **about
            )
            module.compression = made.train(module.training)
        module.__class__ = mixed(Compresses, type(module))  # type: ignore[arg-type]
