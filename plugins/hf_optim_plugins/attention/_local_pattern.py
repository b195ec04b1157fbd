"""The pattern of ``local``. This file is stored beside checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hf_optim.toolkit.attention import Attachment, Band, Pattern, PatternConfig, whole, wholes


def build(settings: Mapping[str, Any], layer: int, heads: int, causal: bool) -> list[Pattern]:
    """Return one pattern for all heads: keys less than ``window`` away; all keys in the layers ``full_layers``."""
    window, full = whole(settings, "window", low=1), wholes(settings, "full_layers")
    reach = None if layer in full else window - 1
    return [Pattern((Band(reach, reach),), causal)]


ATTACHMENT = Attachment("hf_optim_local", build)
ATTACHMENT.register()


class LocalBase(PatternConfig):
    """Base of the configuration classes."""

    implementation = ATTACHMENT.name
