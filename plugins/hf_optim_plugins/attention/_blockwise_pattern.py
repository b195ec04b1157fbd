"""The pattern of ``blockwise``. This file is stored beside checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hf_optim.toolkit.attention import Attachment, Chunks, Pattern, PatternConfig, whole


def build(settings: Mapping[str, Any], layer: int, heads: int, causal: bool) -> list[Pattern]:
    """Return one pattern for all heads: a query sees the keys of its own block."""
    return [Pattern((Chunks(whole(settings, "block", low=1)),), causal)]


ATTACHMENT = Attachment("hf_optim_blockwise", build)
ATTACHMENT.register()


class BlockwiseBase(PatternConfig):
    """Base of the configuration classes."""

    implementation = ATTACHMENT.name
