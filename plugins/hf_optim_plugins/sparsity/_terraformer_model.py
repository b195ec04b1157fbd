"""Terraformer in the models of transformers: its layers, and the classes of such models.

This file is stored beside checkpoints, so it imports only torch and transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedConfig

from hf_optim.toolkit.attention import (
    BUCKET,
    FIELD,
    MOST_BUCKETS,
    WIDEST,
    LshAttachment,
    LshScheme,
    ReversibleLayer,
    add_parts,
    arguments_of,
    branch_of,
    call_uncompiled,
    drop_key_projections,
    layers_with,
    require_no_weights,
    returns_tuple,
    whole,
    wholes,
    without_cache,
)
from hf_optim.toolkit.modules import Branch, RefusedByStock, mixed

from ._held_parts import ROWS, ReadsRows, TokenRows, hold, read_rows, require_rows
from ._sparse_ffn_modules import sparse_ffn_settings
from ._sparse_qkv_model import draw_missing
from ._sparse_qkv_modules import QkvSettings, SparseProjections, sparsify_projections
from ._terraformer_modules import FeedForwardBranch, RecalledSparseFFN, RecurrentBranch

TERRAFORMER_SETTINGS = ("blocks", "reversible", "projections", "feed_forward", "lsh", "recurrence")
LSH_NUMBERS = ("factors", "rounds", "chunk", "heads", "head_width", "seed")
RECURRENCE = "recurrence"  # the name of its state in a cache


def read_terraformer(settings: Any) -> Mapping[str, Any]:
    """Return the settings of a configuration, which has all of them. Raises ``ValueError`` for any others."""
    if not isinstance(settings, Mapping) or set(settings) != set(TERRAFORMER_SETTINGS):
        raise ValueError(f"terraformer needs the settings {', '.join(TERRAFORMER_SETTINGS)}")
    names = settings["blocks"]
    if (
        not isinstance(names, list)
        or len(names) != 4
        or not all(isinstance(n, str) and n.isidentifier() for n in names)
    ):
        raise ValueError(f"terraformer: blocks has the names of four modules, not {str(names)[:40]!r}")
    if not isinstance(settings["reversible"], bool):
        raise ValueError("terraformer: reversible is true or false")
    for name in ("projections", "feed_forward", "lsh", "recurrence"):
        if not isinstance(settings[name], Mapping):
            raise ValueError(f"terraformer: {name} has the settings of this part, or none ({{}})")
    if settings["projections"]:
        QkvSettings.read(settings["projections"])
    if settings["feed_forward"]:
        sparse_ffn_settings(dict(settings["feed_forward"]))
    if settings["recurrence"]:
        if set(settings["recurrence"]) != {"units", "layers"}:
            raise ValueError("terraformer: a recurrence has units and layers")
        whole(settings["recurrence"], "units", 1, 65536), whole(settings["recurrence"], "layers", 1, 64)
    return settings


class TerraformerAttachment(LshAttachment):
    """LSH attention, with the settings of a configuration."""

    def read(self, settings: Mapping[str, Any]) -> LshScheme:
        """Return the settings of LSH attention. Raises ``ValueError`` for any others."""
        own = read_terraformer(settings)["lsh"]
        if set(own) != set(LSH_NUMBERS):
            raise ValueError(f"terraformer: LSH attention has the settings {', '.join(LSH_NUMBERS)}")
        factors = wholes(own, "factors", 1, MOST_BUCKETS)
        if factors != (1,) and (not factors or any(factor % 2 for factor in factors)):
            raise ValueError(f"terraformer: factors of the number of buckets are even, not {list(factors)[:8]}")
        return LshScheme(
            scheme=BUCKET,
            factors=factors,
            rounds=whole(own, "rounds", 1, 64),
            chunk=whole(own, "chunk", 2, 2**20),
            heads=whole(own, "heads", 1, 4096),
            width=whole(own, "head_width", 1, WIDEST),
            seed=whole(own, "seed"),
        )


TERRAFORMER_LSH = TerraformerAttachment("hf_optim_terraformer")
TERRAFORMER_LSH.register()


class TerraformerLayer(ReversibleLayer):
    """Mixin of a layer of transformers: attention and the feed-forward branch, reversible or not."""

    in_streams = False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.in_streams:
            return super().forward(*args, **kwargs)
        stock = super(ReversibleLayer, self).forward
        hidden, given = arguments_of(stock, args, kwargs)
        attend, feed, _, _ = self.branches(given)
        hidden = hidden + attend(hidden)
        hidden = hidden + feed(hidden)
        return (hidden,) if returns_tuple(stock) else hidden

    def branches(self, given: Mapping[str, Any]) -> tuple[Branch, Branch, list[Tensor], list[Tensor]]:
        rows = require_rows(given, "a layer of terraformer")
        norm, attention, second_norm, mlp = (getattr(self, name) for name in self.reversible_names)
        number = attention.layer_idx
        if not isinstance(attention, SparseProjections):
            given = {name: value for name, value in given.items() if name != ROWS}
        again = given
        if self.in_streams and torch.is_grad_enabled():
            again = without_cache(given, number)
        first, second = [given], [given]  # computed again, the tokens are in the cache already

        def attend(x: Tensor) -> Tensor:
            return branch_of(attention, norm(x), first.pop() if first else again)

        def feed(x: Tensor) -> Tensor:
            return _fed(mlp, second_norm(x), rows, second.pop() if second else again, number)

        return (
            attend,
            feed,
            [*norm.parameters(), *attention.parameters()],
            [*second_norm.parameters(), *mlp.parameters()],
        )


def _fed(mlp: Any, hidden: Tensor, rows: TokenRows, given: Mapping[str, Any], number: Any) -> Tensor:
    """Return the feed-forward branch; its state goes to the cache among the arguments of the layer."""
    if not isinstance(mlp, FeedForwardBranch):
        out: Tensor = mlp(hidden)
        return out
    layer = None
    if mlp.recurrent is not None and any(isinstance(value, Cache) for value in given.values()):
        layer = hold(given.values(), number)
    held = None if layer is None else layer.take(RECURRENCE, rows.seen, len(hidden))
    out, after = mlp(hidden, rows, held)
    if layer is not None and after is not None:
        layer.put(RECURRENCE, rows.seen + hidden.shape[1], after)
    return out


def build_terraformer(model: Any, given: Any) -> None:
    """Make a decoder of transformers a Terraformer, in place. Raises ``ValueError`` for settings of another one."""
    settings = read_terraformer(given)
    layers: list[Any] = layers_with(model, settings["blocks"])
    if not layers:
        raise ValueError(f"{type(model).__name__} has no layers with {', '.join(settings['blocks'])}")
    _, attention_name, _, mlp_name = settings["blocks"]
    for number, layer in enumerate(layers):
        weight = next(parameter for parameter in layer.parameters() if parameter.is_floating_point())
        about: dict[str, Any] = {"device": weight.device, "dtype": weight.dtype}
        attention, mlp = getattr(layer, attention_name), getattr(layer, mlp_name)
        if settings["projections"]:
            sparsify_projections(attention, QkvSettings.read(settings["projections"]))
        if settings["feed_forward"]:
            mlp = RecalledSparseFFN(dict(settings["feed_forward"]), about)
        recurrent = None
        if own := settings["recurrence"]:
            recurrent = RecurrentBranch(_width_of(model), own["units"], own["layers"]).to(**about)
        if settings["feed_forward"] or recurrent is not None:
            setattr(layer, mlp_name, FeedForwardBranch(mlp, recurrent).train(layer.training))
        layer.__class__ = mixed(TerraformerLayer, type(layer))  # type: ignore[arg-type]
        layer.reversible_names, layer.reversible_number = tuple(settings["blocks"]), number
        layer.in_streams = settings["reversible"]
    if settings["lsh"]:
        if not settings["projections"] and hasattr(getattr(layers[0], attention_name), "k_proj"):
            drop_key_projections(model, "k_proj")
        weight = next(parameter for parameter in model.parameters() if parameter.is_floating_point())
        add_parts(model, TERRAFORMER_LSH, settings, device=weight.device)
    read_rows(model)


def _width_of(model: Any) -> int:
    width: int = model.config.get_text_config().hidden_size
    return width


class TerraformerConfig(RefusedByStock):
    """Base of the configuration classes: with LSH attention, that is computed whatever a caller asks for."""

    @property
    def _attn_implementation(self) -> str | None:
        if self._attn_implementation_internal is None:
            return None
        own = getattr(self, FIELD, None) or {}
        return TERRAFORMER_LSH.name if own.get("lsh") else self._attn_implementation_internal

    @_attn_implementation.setter
    def _attn_implementation(self, value: Any) -> None:
        PreTrainedConfig._attn_implementation.fset(self, value)  # type: ignore[attr-defined]


class TerraformerModel(ReadsRows):
    """Base of the model classes: layers are those of Terraformer when a model is built."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        if (settings := getattr(config, FIELD, None)) is not None:
            read_terraformer(settings)
        super().__init__(config, *args, **kwargs)
        if settings is not None:
            build_terraformer(self, settings)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not (getattr(self.config, FIELD, None) or {}).get("lsh"):  # type: ignore[attr-defined]
            return super().__call__(*args, **kwargs)
        require_no_weights(self, kwargs)
        return call_uncompiled(self, args, self.with_rows(args, kwargs))

    def initialize_weights(self) -> None:
        """Initialize what a checkpoint does not have."""
        draw_missing(self)
        super().initialize_weights()  # type: ignore[misc]

    @property
    def supports_gradient_checkpointing(self) -> bool:
        """False for reversible layers, which keep no activations that could be computed again."""
        own = getattr(self.config, FIELD, None) or {}  # type: ignore[attr-defined]
        return super().supports_gradient_checkpointing and not own.get("reversible")  # type: ignore[misc]
