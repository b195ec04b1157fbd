"""Why a step leaves layers out, in the words that every technique uses, and the refusal when none is left."""

from __future__ import annotations

from collections.abc import Collection, Container, Iterable, Mapping

from torch import nn

from ...errors import ModelError

NOT_REACHED = "no calibration input reached it"
NAMED = 3  # names that a message gives for a reason


def not_reached(names: Iterable[str], seen: Container[str]) -> dict[str, list[str]]:
    """Return ``{NOT_REACHED: names}`` of the modules that ``seen`` has no statistics of; empty if it has all."""
    missing = [name for name in names if name not in seen]
    return {NOT_REACHED: missing} if missing else {}


def summarize(skipped: Mapping[str, Iterable[str]]) -> str:
    """Return ``"reason: name, name; reason: name"`` for a message, with the first names of each reason."""
    lists = {reason: list(names) for reason, names in skipped.items()}
    return "; ".join(f"{reason}: {', '.join(names[:NAMED])}" for reason, names in lists.items() if names)


def require_layers(
    layers: Collection[str], model: nn.Module, label: str, skipped: Mapping[str, Iterable[str]] | None = None
) -> None:
    """Raise ``ModelError`` if ``layers`` is empty, with the reasons why others were left out.

    Args:
        layers: the linear layers that a step works on, by name.
        model: the model.
        label: the step, for the message (``run.label(step)``).
        skipped: reason -> names of the layers left out.
    """
    if not layers:
        why = summarize(skipped or {})
        begin = f"{label}: no linear layer of {type(model).__name__} is left"
        raise ModelError(f"{begin}; check targets and skip{f' ({why})' if why else ''}")
