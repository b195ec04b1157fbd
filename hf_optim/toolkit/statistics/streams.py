"""The stream of each module: which of a batch's masks its rows follow.

A module belongs to the nearest module around it whose forward takes an input of the model: ``input_ids`` make it a part
of ``"text"``, pixels of ``"vision"``, sound of ``"audio"``. In an encoder-decoder the encoder is the stream
``"encoder"`` and the rest ``"decoder"``. A projector between the towers of a model with several inputs is ``"other"``:
its rows follow no mask.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

VISION_INPUTS = frozenset({"pixel_values", "pixel_values_videos", "grid_thw", "image_grid_thw", "flattened_patches"})
AUDIO_INPUTS = frozenset({"input_features", "input_values", "audio_values"})

_cache: WeakKeyDictionary[nn.Module, tuple[tuple[int, ...], dict[int, str]]] = WeakKeyDictionary()
"""Model -> the identities of its modules, and the stream of each."""


def streams(model: nn.Module) -> dict[int, str]:
    """Return the stream of each module of a model, by ``id``; kept until a module of the model is exchanged."""
    state = tuple(id(module) for module in model.modules())
    if _cache.get(model, ((), {}))[0] != state:
        _cache[model] = (state, _find(model))
    return _cache[model][1]


def encoder_and_decoder(model: nn.Module) -> tuple[nn.Module, nn.Module | None] | None:
    """Return the encoder and the decoder (None if unknown) of an encoder-decoder; None for other models."""
    if not getattr(getattr(model, "config", None), "is_encoder_decoder", False) or not hasattr(model, "get_encoder"):
        return None
    try:
        encoder, decoder = model.get_encoder(), model.get_decoder()  # type: ignore[operator]
    except (AttributeError, NotImplementedError, TypeError, ValueError):
        return None
    if not isinstance(encoder, nn.Module) or encoder is model:
        return None
    return encoder, decoder if isinstance(decoder, nn.Module) and decoder is not model else None


def _find(model: nn.Module) -> dict[int, str]:
    found: dict[int, str] = {}
    _walk(model, "text", found)
    pair = encoder_and_decoder(model)
    if pair is not None:
        inside = {id(module) for module in pair[0].modules()}
        towers = {key for key, stream in found.items() if stream in ("vision", "audio")}
        for key in found:
            found[key] = "encoder" if key in inside else found[key] if key in towers - inside else "decoder"
        found[id(model)] = "decoder"
        return found
    _settle_mixed(model, found)
    return found


def class_of(module: nn.Module) -> Any:
    """Return the class of a module; its forward is the stock one also where an instance has another."""
    return type(module)


def _walk(module: nn.Module, inherited: str, found: dict[int, str]) -> None:
    found[id(module)] = stream = _stream_taken(class_of(module)) or inherited
    for child in module.children():
        if id(child) not in found:
            _walk(child, stream, found)


def _settle_mixed(model: nn.Module, found: dict[int, str]) -> None:
    """Decide what takes several kinds of input: heads follow the text, what feeds a nested text part does not."""
    base: Any = getattr(model, "base_model", model)
    inner = {id(module) for module in base.modules()} if base is not model else set(found)
    nested = any(stream == "text" and key in inner for key, stream in found.items())
    for key, stream in found.items():
        if stream == "mixed":
            found[key] = "other" if nested and key in inner and key not in (id(model), id(base)) else "text"


@functools.cache
def _stream_taken(cls: Any) -> str | None:
    """Return the stream of the inputs that the forward of a class takes; None if they are hidden states."""
    names = parameter_names(cls)
    text, vision, audio = "input_ids" in names, bool(VISION_INPUTS & names), bool(AUDIO_INPUTS & names)
    if text:
        return "mixed" if vision or audio else "text"
    return "audio" if audio else "vision" if vision else None


@functools.cache
def parameter_names(cls: Any) -> frozenset[str]:
    """Return the names of the parameters of the forward of a class."""
    try:
        return frozenset(inspect.signature(cls.forward).parameters)
    except (TypeError, ValueError):
        return frozenset()
