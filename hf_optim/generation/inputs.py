"""Inputs that no loop can generate from: refused before the model runs."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, StaticLayer, StaticSlidingWindowLayer

from ..errors import ModelError
from ..toolkit.compat import CACHE
from .reasons import offloaded


def require_device(model: Any, inputs: dict[str, Any]) -> None:
    """Raise ``ModelError`` if a tensor is on another device than the model. Models on several devices move inputs."""
    if offloaded(model):
        return
    for name, value in inputs.items():
        if isinstance(value, Tensor) and value.device != model.device:
            raise ModelError(f"{name} is on {value.device}, the model on {model.device}: move one of them")


def require_tokens(input_ids: Any, embedded: bool) -> None:
    """Raise ``ModelError`` unless ``input_ids`` are tokens ``[rows, tokens]``; with embeddings there may be none."""
    if not isinstance(input_ids, Tensor):
        raise ModelError(f"input_ids are a tensor, not a {type(input_ids).__name__}: pass return_tensors='pt'")
    if input_ids.ndim < 2 or input_ids.dtype.is_floating_point:
        raise ModelError(f"input_ids are whole numbers [rows, tokens], not {input_ids.dtype} {list(input_ids.shape)}")
    if not input_ids.numel() and not embedded:
        raise ModelError("the prompt has no tokens")


def require_room(input_ids: Tensor, criteria: Any, kwargs: dict[str, Any]) -> None:
    """Raise ``ModelError`` for a cache of other rows than the prompt, or with a length that is too short.

    On a GPU, writing behind the end of a cache would end the CUDA context.
    """
    cache = kwargs.get(CACHE)
    own = getattr(cache, "self_attention_cache", cache)
    for layer in getattr(own, "layers", ()):
        plain = type(layer) in (DynamicLayer, DynamicSlidingWindowLayer, StaticLayer)  # keys of others are codes
        if plain and layer.is_initialized and layer.keys.shape[0] not in (0, input_ids.shape[0]):
            raise ModelError(f"the cache holds {layer.keys.shape[0]} sequences, the prompt {input_ids.shape[0]}")
        fixed = isinstance(layer, StaticLayer) and not isinstance(layer, StaticSlidingWindowLayer)
        # The last token is not written. Embeddings in place of tokens are written, too.
        embedded = kwargs.get("inputs_embeds")
        extra = embedded.shape[1] - input_ids.shape[1] if isinstance(embedded, Tensor) else 0
        needed = int(criteria.max_length) + max(0, extra) - 1
        if fixed and layer.max_cache_len < needed:
            raise ModelError(
                f"the cache holds {layer.max_cache_len} tokens, prompt and new tokens need {needed}: pass a larger "
                "one, or none"
            )


def most_positions(config: Any) -> int | None:
    """Return how many positions the embeddings of a model have; None if its configuration does not say.

    Buffers are not made longer than that where a sequence fits: some models compute positions from the length of the
    mask, and on a GPU looking up a position that does not exist would end the CUDA context.
    """
    text = config.get_text_config(decoder=True)
    names = ("max_position_embeddings", "max_target_positions", "n_positions", "n_ctx", "max_seq_len")
    found = [value for name in names if isinstance(value := getattr(text, name, None), int) and value > 0]
    return min(found, default=None)
