"""Tiny models whose heads compute the terms that a test names."""

from __future__ import annotations

import contextlib

from hf_optim.toolkit.attention import (
    Attachment,
    Band,
    Chunks,
    Columns,
    GlobalTokens,
    Pattern,
    PatternModel,
    Segments,
)

TERMS = {
    "window": [Band(5)],
    "all": [Band(None)],
    "dilated": [Band(12, 0, 3)],
    "strided": [Band(None, 0, 7), Band(6)],
    "chunks": [Chunks(8)],
    "late chunks": [Chunks(6, start=3), GlobalTokens(first=3, see=False)],
    "fixed": [Chunks(8), Columns(8, 2)],
    "segments": [Segments(5, 7)],
    "globals": [Band(4), GlobalTokens(first=2, positions=(9, 21))],
    "seen globals": [Band(4), GlobalTokens(first=2, positions=(9, 21), see=False)],
    "ends": [Band(4), GlobalTokens(first=1, last=1)],
}
HEADS = ["window", "strided", "fixed", "seen globals"]
DROPPING = ["window", "late chunks", "fixed", "seen globals"]


def build(settings, layer, heads, causal):
    names = settings["terms"]
    return [Pattern(tuple(TERMS[name]), causal) for name in (names if len(names) == heads else names[:1])]


ATTACHMENT = Attachment("hf_optim_test_terms", build)


@contextlib.contextmanager
def registered():
    ATTACHMENT.register()
    try:
        yield
    finally:
        ATTACHMENT.unregister()


def patterned(model, *names):
    """Give a model the terms of these names: one for all heads, or one for each of its four."""
    model.__class__ = type(f"Patterned{type(model).__name__}", (PatternModel, type(model)), {})
    model.config.attention_pattern = {"terms": list(names)}
    model.set_attn_implementation(ATTACHMENT.name)
    if model.can_generate():
        model.generation_config.pad_token_id = 0
        model.generation_config.eos_token_id = None
    return model.eval()
