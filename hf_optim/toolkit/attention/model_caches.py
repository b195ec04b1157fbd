"""How the caches of a model come to hold only visible keys.

This file is stored beside checkpoints, so it imports only torch and transformers.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, StaticLayer

from .caches import PatternLayer
from .rows import SEGMENTS

# Not functions with ``lru_cache``, of which torch.compile warns.
_names: dict[type, tuple[str, ...]] = {}
_disabled: list[Callable[..., Any]] = []


def call_with_cache(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call a model with a cache that drops keys, where it has or makes one.

    The forward is not compiled: what is computed depends on the padding and on how many keys a cache holds.
    """
    return call_uncompiled(model, args, prepare_call(model, args, kwargs))


def call_uncompiled(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call a model whose forward ``torch.compile`` leaves as it is."""
    if "torch._dynamo" not in sys.modules:  # nothing is compiled, and its import takes seconds
        return _forward(model, args, kwargs)
    if not _disabled:
        _disabled.append(torch.compiler.disable(_forward))
    return _disabled[0](model, args, kwargs)


def _forward(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return model._call_impl(*args, **kwargs)  # a model that was compiled in place has another ``__call__``


def prepare_call(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the keyword arguments of a forward with a cache that drops keys, where it has or makes one.

    Args:
        model: a model of transformers with a pattern.
        args, kwargs: of its forward.

    Raises ``ValueError`` for a static cache with a mask of the caller, in which the places of the queries are unknown.
    """
    parameters = _parameters(type(model))
    name = next((each for each in ("cache", "past_key_values") if each in parameters), None)
    if name is None:
        return kwargs
    layers = model.config.get_text_config(decoder=True).num_hidden_layers
    kind = getattr(model, "cache_layer", PatternLayer)
    given = [value for value in (*args, *kwargs.values()) if isinstance(value, Cache)]
    for cache in given:
        with_pattern_layers(cache, layers, kind=kind)
        mask = kwargs.get("attention_mask")
        own = isinstance(mask, Tensor) and mask.dim() == 4 and mask.dtype != SEGMENTS
        if own and any(isinstance(layer, StaticLayer) for layer in cache.layers):
            raise ValueError(
                "a static cache does not go with an attention pattern and a mask of four dimensions: leave "
                "cache_implementation out"
            )
    if given or model.training or parameters.index(name) < len(args):
        return kwargs
    asked = kwargs.get("use_cache")
    if not (getattr(model.config, "use_cache", False) if asked is None else asked) or not _is_causal(model):
        return kwargs
    if kwargs.get("position_ids") is not None and kwargs.get("attention_mask") is None:
        return kwargs  # these may be several documents, which transformers looks for only without a cache
    cache = DynamicCache(config=model.config)
    with_pattern_layers(cache, layers, kind=kind)
    return {**kwargs, name: cache}


def _is_causal(model: Any) -> bool:
    """Return True if some attention of a model is causal; others have nothing to keep, whatever their fields say."""
    found = model.__dict__.get("_hf_optim_causal")
    if found is None:
        found = any(getattr(module, "is_causal", False) is True for module in model.modules())
        model.__dict__["_hf_optim_causal"] = found
    return found


def _parameters(cls: Any) -> tuple[str, ...]:
    if cls not in _names:
        _names[cls] = tuple(inspect.signature(cls.forward).parameters)[1:]
    return _names[cls]


def with_pattern_layers(cache: Cache, layers: int, record_past: bool = False, kind: Any = PatternLayer) -> None:
    """Give a cache layers that drop keys, in the place of dynamic ones, whose keys they take over.

    Args:
        cache: others than dynamic ones are left as they are.
        layers: of the model.
        record_past: tokens may be taken back.
        kind: class of the new layers, with the interface of ``PatternLayer``.

    Raises ``ValueError`` for layers that have dropped keys by themselves.
    """
    cache = getattr(cache, "self_attention_cache", cache)
    if cache.layer_class_to_replicate is DynamicLayer:
        cache.layers += [DynamicLayer() for _ in range(layers - len(cache.layers))]
    for number, layer in enumerate(cache.layers):
        if type(layer) in (DynamicLayer, DynamicSlidingWindowLayer):
            cache.layers[number] = layer = _pattern_layer(layer, kind)
        if record_past and getattr(layer, "holds_visible_keys", False):
            layer.activate_past_recording()


def _pattern_layer(layer: Any, kind: Any) -> Any:
    if layer.is_initialized and layer.keys is not None and layer.get_seq_length() != layer.keys.shape[2]:
        raise ValueError("the cache has dropped keys that the attention pattern sees: make a new one for this model")
    made = kind()
    made.adopt(layer)
    return made
