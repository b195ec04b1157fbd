"""The pattern of ``longformer``: a window, dilated in some heads, and global tokens. Stored beside checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hf_optim.toolkit.attention import Band, GlobalAttachment, Pattern, PatternConfig, whole, wholes, with_static


def of_layer(settings: Mapping[str, Any], name: str, layer: int, default: int) -> int:
    """Return the entry of a layer in a list of the settings that has one for each layer, or one for all."""
    each = wholes(settings, name, low=1) or (default,)
    if len(each) > 1 and layer >= len(each):
        raise ValueError(f"the attention pattern has {len(each)} {name}, and the model a layer {layer}")
    return each[layer if len(each) > 1 else 0]


def near(settings: Mapping[str, Any], layer: int, heads: int, causal: bool) -> list[Pattern]:
    """Return the windows: one for all heads, or one for each if some are dilated. ``window`` counts both sides."""
    window, dilation = of_layer(settings, "windows", layer, 0), of_layer(settings, "dilations", layer, 1)
    if window < 2 or window % 2:
        raise ValueError(f"the attention pattern has a window of {window}, not an even number of at least 2")
    dilated = whole(settings, "dilated_heads")
    if dilated > heads:
        raise ValueError(f"the attention pattern has {dilated} dilated heads of {heads}")
    half = window // 2
    plain = Pattern((Band(half, half),), causal)
    wide = Pattern((Band(half * dilation, half * dilation, dilation),), causal)
    return [wide] if dilated == 0 else [wide] * dilated + [plain] * (heads - dilated)


def build(settings: Mapping[str, Any], layer: int, heads: int, causal: bool) -> list[Pattern]:
    """Return the windows with the global tokens at fixed positions."""
    return with_static(settings, near(settings, layer, heads, causal))


def by_layer(settings: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the lists with an entry for each layer."""
    return "windows", "dilations"


ATTACHMENT = GlobalAttachment("hf_optim_longformer", build, by_layer=by_layer, near=near)


class LongformerBase(PatternConfig):
    """Base of the configuration classes."""

    attachment = ATTACHMENT
