"""The pattern of ``dilated``. This file is stored beside checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hf_optim.toolkit.attention import Attachment, Band, Pattern, PatternConfig, chosen, whole, wholes

FARTHEST = 2**31 - 1  # kernels count positions in 32 bits
BY = ("head", "layer")


def build(settings: Mapping[str, Any], layer: int, heads: int, causal: bool) -> list[Pattern]:
    """Return the pattern of each head: keys at distance 0, d, 2 d ... (window - 1) d from the query.

    ``dilation`` is a list: one d for all, or one for each head or each layer, as ``by`` says.
    """
    window, dilations = whole(settings, "window", low=2), wholes(settings, "dilation", low=1)
    by_head = chosen(settings, "by", BY) == "head"
    if len(dilations) != 1 and (len(dilations) != heads if by_head else layer >= len(dilations)):
        what = f"heads, but a layer has {heads}" if by_head else f"layers, but the model has layer {layer + 1}"
        raise ValueError(f"the attention pattern has dilations for {len(dilations)} {what}")
    if len(dilations) > 1 and not by_head:
        dilations = (dilations[layer],)
    reaches = [(each, min(FARTHEST, (window - 1) * each)) for each in dilations]
    return [Pattern((Band(reach, reach, each),), causal) for each, reach in reaches]


def check(settings: Mapping[str, Any], context: int) -> None:
    """Raise ``ValueError`` for a dilation that reaches over the context."""
    wholes(settings, "dilation", low=1, high=context)


def by_layer(settings: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the lists with an entry for each layer."""
    return ("dilation",) if chosen(settings, "by", BY) == "layer" else ()


ATTACHMENT = Attachment("hf_optim_dilated", build, check, by_layer)


class DilatedBase(PatternConfig):
    """Base of the configuration classes."""

    attachment = ATTACHMENT
