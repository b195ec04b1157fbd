"""The pattern of ``blockwise``. This file is stored beside checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hf_optim.toolkit.attention import Attachment, Chunks, Pattern, PatternConfig, ShiftedChunks, Term, whole, wholes


def build(settings: Mapping[str, Any], layer: int, heads: int, causal: bool) -> list[Pattern]:
    """Return the pattern of each head: a query sees the keys of the block that lies ``shift`` blocks before its own.

    ``block`` is the tokens of a block, ``shifts`` those of the heads, in turn.
    """
    size, shifts = whole(settings, "block", low=1), wholes(settings, "shifts")
    if not shifts:
        raise ValueError("the attention pattern has no shifts: [0] is the own block in every head")
    if len(shifts) > heads:
        raise ValueError(f"the attention pattern has shifts for {len(shifts)} heads, but a layer has {heads}")
    terms: list[Term] = [ShiftedChunks(size, shift, not causal) if shift else Chunks(size) for shift in shifts]
    return [Pattern((terms[head % len(terms)],), causal) for head in range(heads)]


ATTACHMENT = Attachment("hf_optim_blockwise", build)


class BlockwiseBase(PatternConfig):
    """Base of the configuration classes."""

    attachment = ATTACHMENT
