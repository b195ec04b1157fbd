"""LSH attention in the models of transformers: settings, and the classes of such models.

This file is stored beside checkpoints, so it imports only torch and transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

from hf_optim.toolkit.attention import (
    BUCKET,
    FIELD,
    MOST_BUCKETS,
    PAPER,
    TRAX,
    WIDEST,
    LearnedConfig,
    LearnedModel,
    LshAttachment,
    LshScheme,
    add_streams,
    chosen,
    drop_key_projections,
    names_of_layers,
    whole,
    wholes,
)

LSH_SETTINGS = {
    "scheme", "factors", "rounds", "chunk", "before", "after", "heads", "head_width", "seed", "redraw",
    "key_projection", "reversible",
}  # fmt: skip


def scheme_of(settings: Any) -> LshScheme:
    """Return the settings of a configuration. Raises ``ValueError`` for any others."""
    if not isinstance(settings, Mapping):
        raise ValueError(f"LSH attention needs config.{FIELD}")
    if unknown := sorted(str(name)[:40] for name in set(settings) - LSH_SETTINGS):
        raise ValueError(f"the attention pattern has settings that it does not know: {unknown[:4]}")
    factors = wholes(settings, "factors", 1, MOST_BUCKETS)
    if factors != (1,) and (not factors or any(factor % 2 for factor in factors)):
        raise ValueError(f"the attention pattern has factors={str(list(factors))[:40]}: even numbers, or [1]")
    if prod(factors) > MOST_BUCKETS:
        raise ValueError(f"the attention pattern has {prod(factors)} buckets: at most {MOST_BUCKETS}")
    name_of_projection(settings)
    names_of_layers(settings)
    if not isinstance(settings.get("redraw", False), bool):
        raise ValueError(f"the attention pattern has redraw={str(settings['redraw'])[:40]!r}, not true or false")
    return LshScheme(
        scheme=chosen(settings, "scheme", (BUCKET, PAPER, TRAX)),
        factors=factors,
        rounds=whole(settings, "rounds", 1, 64),
        chunk=whole(settings, "chunk", 2, 2**20),
        before=whole(settings, "before", 0, 64),
        after=whole(settings, "after", 0, 64),
        heads=whole(settings, "heads", 1, 4096),
        width=whole(settings, "head_width", 1, WIDEST),
        seed=whole(settings, "seed"),
        redraw=settings.get("redraw", False),
    )


def name_of_projection(settings: Mapping[str, Any]) -> str:
    """Return the name of the projection of keys in an attention module; empty if it is not a module of its own."""
    name = settings.get("key_projection", "")
    if not isinstance(name, str) or not all(part.isidentifier() for part in name.split(".") if name):
        raise ValueError(f"the attention pattern has key_projection={str(name)[:40]!r}, not the name of a module")
    return name


class ReformerAttachment(LshAttachment):
    """The attention function, with the settings of a configuration."""

    def read(self, settings: Mapping[str, Any]) -> LshScheme:
        """Return the settings. Raises ``ValueError`` for any others."""
        return scheme_of(settings)


LSH = ReformerAttachment("hf_optim_lsh")


class ReformerBase(LearnedConfig):
    """Base of the configuration classes."""

    attachment = LSH


class LshModel(LearnedModel):
    """Base of the model classes: keys are not projected, and layers are reversible where the settings say so."""

    can_detach = False  # its keys are its queries

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        settings = getattr(config, FIELD, None)
        if settings is None:
            return
        if name := name_of_projection(settings):
            drop_key_projections(self, name)  # type: ignore[arg-type]
        self.set_up_streams()

    def set_up_streams(self) -> None:
        """Make the layers reversible if the settings say so: when the model is built, and when it gets this class."""
        if names := names_of_layers(getattr(self.config, FIELD)):  # type: ignore[attr-defined]
            add_streams(self, names)  # type: ignore[arg-type]

    @property
    def supports_gradient_checkpointing(self) -> bool:
        """False for reversible layers, which keep no activations that could be computed again."""
        settings = getattr(self.config, FIELD, None) or {}  # type: ignore[attr-defined]
        return super().supports_gradient_checkpointing and not settings.get("reversible")  # type: ignore[misc]
