"""Inducing points in the attention, and a pooling head behind the body, of the models of transformers.

This file is stored beside checkpoints, so it imports only torch and transformers.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedConfig

from hf_optim.toolkit.attention import (
    FIELD,
    MOST,
    PMA,
    Call,
    LearnedAttachment,
    LearnedConfig,
    LearnedModel,
    ReadSettings,
    TensorState,
    chosen,
    flag,
    initialize_part,
    whole,
)

from ._induced_attention import STARTS, InducedAttention

SCALE_WIDTHS = ("model", "width")
POOLING_STARTS = ("mean", "xavier")
LARGEST_POINTS = 2**16


@dataclass(frozen=True)
class Inducing:
    """The settings of attention over inducing points: m, ``layer_norm`` and ``start`` as in ``InducedAttention``.

    ``scale`` is ``model``, that of its own attention, or ``width``, one over the root of the width of all heads.
    """

    points: int
    heads: int
    head_width: int
    layer_norm: bool
    scale: str
    start: str


@dataclass(frozen=True)
class Pooling:
    """The settings of a pooling head: k, and the sizes of ``PMA``."""

    seeds: int
    heads: int
    width: int
    layer_norm: bool
    start: str


@dataclass(frozen=True)
class SetSettings:
    """The settings of a model; either part may be missing."""

    inducing: Inducing | None
    pooling: Pooling | None

    @classmethod
    def read(cls, settings: Mapping[str, Any]) -> SetSettings:
        """Return the settings. Raises ``ValueError`` for others."""
        own = ReadSettings(settings)
        inducing = pooling = None
        if "points" in own:
            inducing = Inducing(
                points=whole(own, "points", low=1, high=LARGEST_POINTS),
                heads=whole(own, "heads", low=1, high=MOST),
                head_width=whole(own, "head_width", low=1, high=MOST),
                layer_norm=flag(own, "layer_norm"),
                scale=chosen(own, "scale", SCALE_WIDTHS),
                start=chosen(own, "start", STARTS),
            )
        if "seeds" in own:
            pooling = Pooling(
                seeds=whole(own, "seeds", low=1, high=MOST),
                heads=whole(own, "pooling_heads", low=1, high=MOST),
                width=whole(own, "pooling_width", low=1, high=2**20),
                layer_norm=flag(own, "layer_norm"),
                start=chosen(own, "pooling_start", POOLING_STARTS),
            )
        if inducing is None and pooling is None:
            raise ValueError("the attention pattern has neither inducing points nor seeds")
        own.require_all_read()
        return cls(inducing, pooling)


class SetAttachment(LearnedAttachment):
    """The attention function: inducing points in the place of self-attention."""

    title = "attention over inducing points"

    def read(self, settings: Mapping[str, Any]) -> SetSettings:
        return SetSettings.read(settings)

    def build_part(self, settings: Mapping[str, Any], layer: int) -> nn.Module | None:
        own = self.read(settings).inducing
        if own is None:
            return None
        return InducedAttention(own.heads, own.head_width, own.points, own.layer_norm, own.start)

    def compute_call(self, part: nn.Module | None, call: Call) -> tuple[Tensor, TensorState | None]:
        if call.causal:
            raise ValueError("an inducing point reads all tokens of a row: it cannot be causal")
        own = self.read(getattr(call.module.config, FIELD)).inducing
        if part is None or own is None:
            raise ValueError("this model has no inducing points")
        scale = call.scale if own.scale == "model" else (own.heads * own.head_width) ** -0.5
        return part(call.query, call.key, call.value, call.valid, scale, call.dropout), None


ATTACHMENT = SetAttachment("hf_optim_set_transformer")


class PoolingHead(PMA):
    """``PMA`` over the last hidden states of a model, whose k vectors are one behind the other.

    The rFF of ``PMA`` is the encoder's own: its last layer ends with a feed-forward network. ``start`` is ``mean``,
    with seeds that attend to all tokens alike and projections of values that change nothing, so that the vector begins
    as the mean of the tokens, to a thousandth; or ``xavier``, drawn, as the authors' models are.
    """

    def __init__(self, settings: Pooling, **about: Any) -> None:
        self.start = settings.start
        super().__init__(
            settings.width,
            settings.heads,
            settings.seeds,
            feed_forward=False,
            layer_norm=settings.layer_norm,
            **about,
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the parameters; see ``start``."""
        if self.seeds.is_meta:
            return
        nn.init.xavier_uniform_(self.seeds)
        block = self.block
        for layer in (block.query, block.key, block.value, block.feed_forward):
            if layer._parameters.get("weight") is None:
                continue  # quantized
            nn.init.zeros_(layer.bias)
            if self.start == "xavier" or layer is block.key:
                nn.init.xavier_uniform_(layer.weight)
            elif layer is block.query:
                nn.init.zeros_(layer.weight)
            elif layer is block.value:
                nn.init.eye_(layer.weight)
            else:
                nn.init.normal_(layer.weight, std=1e-5)  # not zero: the gradient of a ReLU at 0 is 0
        for norm in (block.attention_norm, block.output_norm):
            if isinstance(norm, nn.LayerNorm):
                norm.reset_parameters()


def pooled(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Return the forward of a model whose ``pooler_output`` is that of its pooling head, if it has one."""
    stock = inspect.signature(forward)

    @functools.wraps(forward)  # trainers read the names of columns here
    def pooling(self: Any, *args: Any, **kwargs: Any) -> Any:
        head: PoolingHead | None = self._modules.get("set_pooling")
        if head is None:
            return forward(self, *args, **kwargs)
        as_tuple = kwargs.pop("return_dict", None) is False
        out = forward(self, *args, **kwargs, return_dict=True)
        given = stock.bind_partial(self, *args, **kwargs).arguments
        mask = given.get("attention_mask", given.get("kwargs", {}).get("attention_mask"))
        states = out.last_hidden_state
        vectors = head(states, tokens_in(mask, states)).flatten(1)
        if as_tuple:
            others = [value for name, value in out.items() if name not in ("last_hidden_state", "pooler_output")]
            return (states, vectors, *others)
        out["pooler_output"] = vectors
        return out

    return pooling


def tokens_in(mask: Any, states: Tensor) -> Tensor | None:
    """Return an attention mask as bool ``[B, N]``; None if there is none. Raises ``ValueError`` for another kind."""
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.shape != states.shape[:2]:
        shape = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(
            f"the pooling head reads an attention_mask of the shape {tuple(states.shape[:2])} of the batch, 1 for "
            f"tokens and 0 for padding, not {shape}"
        )
    return mask.to(device=states.device) != 0


class SetConfig(LearnedConfig):
    """Base of the configuration classes. A model that only pools has the attention that it is asked for."""

    attachment = ATTACHMENT

    @property
    def _attn_implementation(self) -> str | None:
        settings = getattr(self, FIELD, None)
        if isinstance(settings, Mapping) and "points" not in settings:
            return PreTrainedConfig._attn_implementation.fget(self)  # type: ignore[attr-defined]
        return LearnedConfig._attn_implementation.fget(self)  # type: ignore[attr-defined]

    @_attn_implementation.setter
    def _attn_implementation(self, value: Any) -> None:
        PreTrainedConfig._attn_implementation.fset(self, value)  # type: ignore[attr-defined]

    def used_attachment(self) -> Any:
        settings = getattr(self, FIELD, None)
        return super().used_attachment() if isinstance(settings, Mapping) and "points" in settings else None


class SetModel(LearnedModel):
    """Base of the model classes."""

    can_detach = False  # it has other weights

    is_pooled = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        # A subclass of one whose forward pools, such as that of an offloaded model, inherits or calls it.
        if hasattr(cls, "forward") and not any(vars(base).get("is_pooled") for base in cls.__mro__[1:]):
            cls.forward = pooled(cls.forward)
            cls.is_pooled = True

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        settings = getattr(config, FIELD, None)
        own = None if settings is None else SetSettings.read(settings)
        if own is None or own.inducing is not None:
            super().__init__(config, *args, **kwargs)
        else:
            super(LearnedModel, self).__init__(config, *args, **kwargs)  # attention as it was
        if own is not None and own.pooling is not None:
            add_pooling(self, own.pooling)

    def call_prepared(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if "points" in (getattr(self.config, FIELD, None) or {}):  # type: ignore[attr-defined]
            return super().call_prepared(args, kwargs)
        return super(LearnedModel, self).call_prepared(args, kwargs)

    def initialize_weights(self) -> None:
        """Initialize what a checkpoint does not have."""
        head = self._modules.get("set_pooling")  # type: ignore[attr-defined]
        if head is not None:
            initialize_part(head)
        super().initialize_weights()


def add_pooling(model: Any, settings: Pooling, **about: Any) -> PoolingHead:
    """Add the pooling head to a model, in place, and return it. Raises ``ValueError`` for a model with another head."""
    if getattr(model, "base_model", model) is not model:
        raise ValueError(
            f"the pooling head makes vectors of the model without a head, and {type(model).__name__} has one of its "
            "own: load the checkpoint with AutoModel"
        )
    model.set_pooling = PoolingHead(settings, **about).train(model.training)
    return model.set_pooling
