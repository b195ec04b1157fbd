"""Attention over keys and values that are projected along their length, in the models of transformers.

This file is stored beside checkpoints, so it imports only torch and transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from hf_optim.toolkit.attention import (
    FIELD,
    MOST,
    PART,
    Call,
    LearnedAttachment,
    LearnedConfig,
    LearnedModel,
    ReadSettings,
    TensorState,
    attentions,
    chosen,
    whole,
)

from ._length_projection import SHARING, SHORT, STARTS, LengthProjection, projected_attention

LONGEST = 2**20  # tokens: E has as many columns
SHARED = "shared_projection"  # attribute of a part: the part with the weights


@dataclass(frozen=True)
class LinformerSettings:
    """The settings of a model: k, n, ``sharing``, ``start`` and ``short`` as in ``LengthProjection``."""

    k: int
    length: int
    sharing: str
    start: str
    short: str
    key_heads: int

    @classmethod
    def read(cls, settings: Mapping[str, Any]) -> LinformerSettings:
        """Return the settings. Raises ``ValueError`` for others."""
        own = ReadSettings(settings)
        length = whole(own, "length", low=1, high=LONGEST)
        found = cls(
            k=whole(own, "k", low=1, high=length),
            length=length,
            sharing=chosen(own, "sharing", SHARING),
            start=chosen(own, "start", STARTS),
            short=chosen(own, "short", SHORT),
            key_heads=whole(own, "key_heads", low=1, high=MOST),
        )
        own.require_all_read()
        return found


class SharedProjection(nn.Module):
    """The part of an attention that projects with the weights of another one. It has no weights of its own."""


class LinformerAttachment(LearnedAttachment):
    """The attention function."""

    title = "linformer"

    def read(self, settings: Mapping[str, Any]) -> LinformerSettings:
        return LinformerSettings.read(settings)

    def build_part(self, settings: Mapping[str, Any], layer: int) -> nn.Module:
        own = self.read(settings)
        if own.sharing == "layerwise" and layer:
            return SharedProjection()
        return LengthProjection(own.key_heads, own.k, own.length, own.sharing, own.start)

    def compute_call(self, part: nn.Module | None, call: Call) -> tuple[Tensor, TensorState | None]:
        if call.causal:
            raise ValueError("linformer mixes all tokens of a row in each key: it cannot be causal")
        # Not an ``isinstance``: a model that is converted has parts of the plugin's classes, and its checkpoint's code.
        projection = vars(part).get(SHARED, part)
        short = self.read(getattr(call.module.config, FIELD)).short
        out = projected_attention(
            call.query, call.key, call.value, projection, call.valid, call.scale, short, call.dropout  # type: ignore[arg-type]
        )  # fmt: skip
        return out, None


def share_projections(model: nn.Module) -> None:
    """Let the attention of all layers project with the weights of the first, where settings say so."""
    parts = [getattr(module, PART, None) for module in attentions(model)]
    for part in parts:
        if isinstance(part, SharedProjection):
            vars(part)[SHARED] = parts[0]  # not a submodule: the weights are stored once


ATTACHMENT = LinformerAttachment("hf_optim_linformer")


class LinformerBase(LearnedConfig):
    """Base of the configuration classes."""

    attachment = ATTACHMENT


class LinformerModel(LearnedModel):
    """Base of the model classes."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        share_projections(self)  # type: ignore[arg-type]
