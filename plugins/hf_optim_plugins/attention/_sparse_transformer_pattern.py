"""The patterns of ``sparse_transformer``. This file is stored beside checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hf_optim.toolkit.attention import Attachment, Band, Chunks, Columns, Pattern, PatternConfig, Term, chosen, whole


def build(settings: Mapping[str, Any], layer: int, heads: int, causal: bool) -> list[Pattern]:
    """Return the pattern of each head: the first step, the second, or both, by head, by layer or merged."""
    steps = chosen(settings, "steps", ("heads", "layers", "merged"))
    found = []
    for head in range(heads):
        # The second steps of different heads look at different columns.
        second_of = head // 2 if steps == "heads" else head
        both = _steps(settings, second_of)
        which = {"heads": head, "layers": layer}.get(steps)
        terms = both if which is None else both[which % 2 : which % 2 + 1]
        found.append(Pattern(terms, causal))
    if steps == "heads" and heads < 2:
        raise ValueError("the attention pattern alternates two steps over the heads, but a layer has one head")
    return found


def _steps(settings: Mapping[str, Any], head: int) -> tuple[Term, Term]:
    """Return the two steps of a factorized attention."""
    stride = whole(settings, "stride", low=1)
    if chosen(settings, "pattern", ("strided", "fixed")) == "strided":
        reach = whole(settings, "local", low=1) - 1
        return Band(reach, reach), Band(None, None, stride)
    vertices = whole(settings, "vertices", low=1, high=stride)
    groups = whole(settings, "rotate", low=1, high=stride // vertices)
    return Chunks(stride), Columns(stride, vertices, head % groups * vertices)


def check(settings: Mapping[str, Any], context: int) -> None:
    """Raise ``ValueError`` for a stride that reaches over the context."""
    whole(settings, "stride", low=1, high=context)


ATTACHMENT = Attachment("hf_optim_sparse_transformer", build, check)


class SparseTransformerBase(PatternConfig):
    """Base of the configuration classes."""

    attachment = ATTACHMENT
