"""The feed-forward layers of a model that the targets of a step select."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from ...errors import ModelError
from .feed_forward import FeedForward, find_feed_forwards
from .targets import select_layers
from .tracing import trace


def select_feed_forwards(
    model: nn.Module, targets: Iterable[str], skip: Iterable[str], label: str, purpose: str
) -> tuple[list[FeedForward], dict[str, list[str]]]:
    """Return the feed-forward layers that are selected, and what of the selection is none, by reason.

    Args:
        model: the model.
        targets, skip: patterns (see ``match``) for the last linear layer of each.
        label: the step, in messages.
        purpose: what the step does with a layer, behind "no feed-forward layer": "to make sparse".

    Raises ``ModelError`` if none is selected.
    """
    found, skipped = find_feed_forwards(trace(model))
    named = select_layers(model, targets, skip)
    chosen = [layer for layer in found if layer.down in named]
    if not chosen:
        why = "; ".join(f"{names[0]}: {reason}" for reason, names in skipped.items())
        raise ModelError(
            f"{label}: {type(model).__name__} has no feed-forward layer {purpose}: two or three linear layers of one "
            "block with one of transformers' activations between them"
            + (f" ({why})" if why else "; targets and skip select by the name of the last of them" * bool(found))
        )
    return chosen, {reason: [name for name in names if name in named] for reason, names in skipped.items()}
