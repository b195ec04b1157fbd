"""How the caches of transformers come to hold only visible keys.

``generate``, a forward with ``use_cache`` and a caller make caches in many ways. What all of them share is that the
attention modules get the cache as an argument, so that a hook there gives it a ``PatternLayer``, under whatever name.

This file is stored beside checkpoints, so it imports only torch and transformers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, StaticLayer

from .caches import PatternLayer

FIELD = "attention_pattern"  # of the configuration: the settings of the technique, a dict


def hold_visible_keys(model: nn.Module) -> None:
    """Make the attention modules of a causal model give each layer of a cache a ``PatternLayer``."""
    hooked = set(_hooked(model))
    for module in model.modules():
        if (
            getattr(module, "is_causal", False)
            and getattr(module, "layer_idx", None) is not None
            and module not in hooked
        ):
            module.register_forward_pre_hook(open_cache, with_kwargs=True)


def _hooked(model: nn.Module) -> list[Any]:
    """Return the modules with the hook; a checkpoint that brings this file has one of its own, of the same name."""
    name = open_cache.__name__
    return [
        module
        for module in model.modules()
        if any(getattr(hook, "__name__", "") == name for hook in module._forward_pre_hooks.values())
    ]


def open_cache(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Find the cache among the arguments of an attention module, and open the layer of the module in it.

    The argument has another name by version and by model, and so is found by its class.
    """
    if getattr(module.config, FIELD, None) is None:
        return  # the pattern was taken off again
    given = (*kwargs.values(), *args)
    for value in given:
        if not isinstance(value, Cache):
            continue
        layer = _pattern_layer(value, module.layer_idx)
        if getattr(layer, "holds_visible_keys", False):
            layer.open()
        elif isinstance(layer, StaticLayer) and not any(_is_segments(part) for part in given):
            raise ValueError(
                "a static cache does not go with an attention pattern and a mask of the caller or a window of the "
                "model: leave cache_implementation out"
            )


def with_pattern_layers(model: nn.Module, cache: Cache, record_past: bool = False) -> None:
    """Give each layer of a cache a ``PatternLayer``, before the first forward.

    Args:
        model: as ``hold_visible_keys`` left it.
        cache: a dynamic one; others are left as they are.
        record_past: tokens may be taken back.
    """
    for module in _hooked(model):
        layer = _pattern_layer(cache, module.layer_idx)
        if getattr(layer, "holds_visible_keys", False) and record_past:
            layer.activate_past_recording()


def _pattern_layer(cache: Cache, number: int) -> Any:
    """Return the layer of a cache, in the place of a dynamic one a ``PatternLayer`` with its keys."""
    cache = getattr(cache, "self_attention_cache", cache)
    layers = cache.layers
    if cache.layer_class_to_replicate is DynamicLayer:
        while len(layers) <= number:
            layers.append(DynamicLayer())
    layer: Any = layers[number] if number < len(layers) else None
    if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
        return layer
    if layer.is_initialized and layer.keys is not None and layer.get_seq_length() != layer.keys.shape[2]:
        raise ValueError("the cache has dropped keys that the attention pattern sees: make a new one for this model")
    made = layers[number] = PatternLayer()
    made.adopt(layer)
    return made


def _is_segments(part: Any) -> bool:
    return isinstance(part, Tensor) and part.dtype == torch.int32 and part.dim() == 4
