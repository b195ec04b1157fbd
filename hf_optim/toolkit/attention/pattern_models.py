"""The classes of models that compute attention of their own, which is attached to them and can be detached.

Function and mask are in the registries of transformers while a model computes by them. A model from which they were
detached computes the attention of its stock class, with the weights that it has; its configuration keeps the settings,
so that a checkpoint is one of the technique, and attaching needs nothing else.

This file is stored beside checkpoints, so it imports only torch and transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import nn
from transformers import Cache, PreTrainedConfig

from ..modules.remote_code_guard import RefusedByStock
from .caches import PatternLayer
from .model_caches import call_with_cache, with_pattern_layers


class StockAttention(str):
    """The name of a stock implementation, in the configuration of a model whose own attention is detached."""

    is_detached = True  # code that came with a checkpoint has a class of its own for this


class PatternConfig(RefusedByStock):
    """Mixin of a configuration whose model computes attention of its own, whatever implementation a caller asks for.

    Once that is detached, the stock implementation that is asked for computes. Stock classes refuse the configuration.
    Subclasses set ``attachment``.
    """

    attachment: ClassVar[Any] = None

    @property
    def _attn_implementation(self) -> str | None:
        name = self._attn_implementation_internal
        return name if name is None or is_detached(self) else type(self).attachment.name  # type: ignore[attr-defined]

    @_attn_implementation.setter
    def _attn_implementation(self, value: Any) -> None:
        detached = is_detached(self)
        PreTrainedConfig._attn_implementation.fset(self, value)  # type: ignore[attr-defined]
        if detached:
            self._attn_implementation_internal = StockAttention(self._attn_implementation_internal or "eager")

    def used_attachment(self) -> Any:
        """Return the attachment by which a model of this configuration computes, or None."""
        return None if is_detached(self) else type(self).attachment


def is_detached(config: Any) -> bool:
    """Return True if the attention that a configuration has settings of is detached from its model."""
    return getattr(getattr(config, "_attn_implementation_internal", None), "is_detached", False)


def number_layers(model: nn.Module) -> None:
    """Give attention modules without a number of their layer (ViT) one, in their order."""
    found = [module for module in model.modules() if hasattr(module, "is_causal")]
    if found and all(getattr(module, "layer_idx", None) is None for module in found):
        for index, module in enumerate(found):
            module.layer_idx = index  # type: ignore[assignment]


def require_no_weights(model: Any, kwargs: Mapping[str, Any]) -> None:
    """Raise ``ValueError`` if a forward is asked for attention weights."""
    asked = kwargs.get("output_attentions")
    if getattr(model.config, "output_attentions", False) if asked is None else asked:
        raise ValueError("attention under a pattern does not form weights: leave output_attentions out")


def require_all_tokens(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Raise ``ValueError`` for a cache among the arguments of a forward whose layers hold what a technique reads."""
    for cache in (*args, *kwargs.values()):
        layers = (
            getattr(getattr(cache, "self_attention_cache", cache), "layers", ()) if isinstance(cache, Cache) else ()
        )
        for layer in layers:
            if getattr(layer, "made_for_a_technique", False):
                raise ValueError(
                    f"the cache has a {type(layer).__name__}, which does not hold all keys, and the attention that "
                    "reads it is detached from this model (hf_optim.restore): start with a new cache"
                )


class PreparedModel:
    """Mixin of a model class, first among its bases: settings are checked, and modules of attention prepared.

    Attributes:
        can_detach: the modules of the stock class are all there, so that its attention can be computed instead.
    """

    can_detach = True

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        attachment = _used_by(config)
        if attachment is not None:
            attachment.require_settings(config)
            attachment.use(self)  # before transformers looks its name up
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        self.set_up_attention()
        self._use_attachment()

    def __setstate__(self, state: Any) -> None:
        super().__setstate__(state)  # type: ignore[misc]
        self._use_attachment()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if is_detached(self.config):  # type: ignore[attr-defined]
            require_all_tokens(args, kwargs)
            return super().__call__(*args, **kwargs)  # type: ignore[misc]
        require_no_weights(self, kwargs)
        return self.call_prepared(args, kwargs)

    def call_prepared(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call the model, of which attention weights are not asked."""
        return super().__call__(*args, **kwargs)  # type: ignore[misc]

    def set_up_attention(self) -> None:
        """Prepare modules of attention: when the model is built, and when a model gets this class."""
        number_layers(self)  # type: ignore[arg-type]

    def why_not_captured(self) -> str:
        """Return why the forward reads values of a batch on the host, so that it has no graph; or ``""``."""
        return ""

    @property
    def has_stock_attention(self) -> bool:
        """True if the model computes the attention of its stock class."""
        return is_detached(self.config)  # type: ignore[attr-defined]

    def attach_attention(self) -> None:
        """Compute the attention of the technique: for a model that got this class, or from which it was detached."""
        for config in self._configs():
            config._attn_implementation_internal = type(config).attachment.name
        self._use_attachment()

    def detach_attention(self) -> bool:
        """Compute the attention of the stock class; return False, and change nothing, if its modules are not there.

        Function and mask leave the registries with the last model that used them.
        """
        attachment = _used_by(self.config)  # type: ignore[attr-defined]
        if not self.can_detach or attachment is None:
            return is_detached(self.config)  # type: ignore[attr-defined]
        for config in self._configs():
            config._attn_implementation_internal = StockAttention("sdpa" if self._supports_sdpa else "eager")  # type: ignore[attr-defined]
        for user in self._users():
            attachment.release(user)
        return True

    def set_attn_implementation(self, *args: Any, **kwargs: Any) -> None:
        """Choose the implementation of a model whose own attention is detached; others keep theirs."""
        stock = self.has_stock_attention
        super().set_attn_implementation(*args, **kwargs)  # type: ignore[misc]
        if stock:  # transformers sets the name past the property
            for config in self._configs():
                config._attn_implementation_internal = StockAttention(config._attn_implementation_internal)

    def _configs(self) -> list[Any]:
        held = [getattr(module, "config", None) for module in self.modules()]  # type: ignore[attr-defined]
        kind = type(self.config)  # type: ignore[attr-defined]
        return list({id(config): config for config in held if type(config) is kind}.values())

    def _use_attachment(self) -> None:
        attachment = _used_by(self.config)  # type: ignore[attr-defined]
        if attachment is not None:
            for user in self._users():
                attachment.use(user)

    def _users(self) -> list[nn.Module]:
        both: Any = (self, self.base_model)  # type: ignore[attr-defined]
        return list(both)  # the body may outlive the model with a head


def _used_by(config: Any) -> Any:
    found = getattr(config, "used_attachment", None)
    return None if found is None else found()


class PatternModel(PreparedModel):
    """Mixin of a model class, first among its bases: its caches hold only the keys that later tokens see.

    Attributes:
        cache_layer: class of the layers of its caches.
    """

    cache_layer: Any = PatternLayer

    def call_prepared(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return call_with_cache(self, args, kwargs)

    def _prepare_cache_for_generation(self, *args: Any, **kwargs: Any) -> Any:
        # Before the first forward: assisted decoding asks the layers at once to record what it may take back.
        found = super()._prepare_cache_for_generation(*args, **kwargs)  # type: ignore[misc]
        if is_detached(self.config):  # type: ignore[attr-defined]
            return found
        given = (*args, *kwargs.values())
        recording = any(getattr(part, "is_assistant", False) for part in given)
        for part in given:
            for cache in part.values() if isinstance(part, dict) else ():
                if isinstance(cache, Cache):
                    layers = self.config.num_hidden_layers  # type: ignore[attr-defined]
                    with_pattern_layers(cache, layers, recording, self.cache_layer)
        return found
