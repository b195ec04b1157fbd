"""The pattern of ``strided``. This file is stored beside checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hf_optim.toolkit.attention import Attachment, Band, Pattern, PatternConfig, Term, whole


def build(settings: Mapping[str, Any], layer: int, heads: int, causal: bool) -> list[Pattern]:
    """Return one pattern for all heads: every ``stride``-th key, and those less than ``window`` away."""
    stride, window = whole(settings, "stride", low=1), whole(settings, "window")
    terms: list[Term] = [Band(None, None, stride)]
    if window > 1:
        terms.append(Band(window - 1, window - 1))
    return [Pattern(tuple(terms), causal)]


def check(settings: Mapping[str, Any], context: int) -> None:
    """Raise ``ValueError`` for a stride that reaches over the context."""
    whole(settings, "stride", low=1, high=context)


ATTACHMENT = Attachment("hf_optim_strided", build, check)


class StridedBase(PatternConfig):
    """Base of the configuration classes."""

    attachment = ATTACHMENT
