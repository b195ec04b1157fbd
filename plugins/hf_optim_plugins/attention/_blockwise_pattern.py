"""The pattern of ``blockwise``. This file is stored beside checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hf_optim.toolkit.attention.attachment import Attachment, PatternConfig
from hf_optim.toolkit.attention.pattern import Pattern
from hf_optim.toolkit.attention.settings import whole
from hf_optim.toolkit.attention.terms import Chunks
from hf_optim.toolkit.modules.remote_code_guard import RefusedByStock


def build(settings: Mapping[str, Any], layer: int, heads: int, causal: bool) -> list[Pattern]:
    """Return one pattern for all heads: a query sees the keys of its own block."""
    return [Pattern((Chunks(whole(settings, "block", low=1)),), causal)]


ATTACHMENT = Attachment("hf_optim_blockwise", build)
ATTACHMENT.register()


class BlockwiseBase(PatternConfig, RefusedByStock):
    """Base of the configuration classes."""

    implementation = ATTACHMENT.name
