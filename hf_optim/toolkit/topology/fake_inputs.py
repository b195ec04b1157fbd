"""Dummy inputs: the smallest inputs that a transformer accepts, to run it once."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

TOKENS = 8
"""Length of the dummy text; shorter if the model has fewer positions."""

PIXEL_INPUTS = ("pixel_values",)
TEXT_INPUTS = ("input_ids",)


def dummy_inputs(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return minimal inputs for a model, on its device: one sequence of eight tokens or one image.

    Text models get ``input_ids [1, T]`` int64, encoder-decoders also ``decoder_input_ids [1, T / 2]``. Vision models,
    and models that compare texts with images, get ``pixel_values [1, channels, height, width]`` in the floating dtype
    of the model. Token ids are valid for the vocabulary and never the padding token; the last one is the
    end-of-sequence token if the model has one, since some heads look for it. The values are the same at each call.

    Raises ``ValueError`` for a main input that is neither text nor pixels: pass your own inputs for such a model.
    """
    if model.main_input_name in PIXEL_INPUTS:
        return {model.main_input_name: _image(model)}
    if model.main_input_name not in TEXT_INPUTS:
        raise ValueError(
            f"{type(model).__name__} reads {model.main_input_name!r}: dummy inputs exist for "
            f"{', '.join(TEXT_INPUTS + PIXEL_INPUTS)} only; pass the inputs yourself"
        )
    config = model.config.get_text_config()
    length = min(TOKENS, _setting(config, "max_position_embeddings") or TOKENS)
    inputs = {model.main_input_name: _tokens(model, length)}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = _tokens(model, max(1, length // 2))
    if "pixel_values" in inspect.signature(model.forward).parameters and _pairs_text_and_images(model.config):
        inputs["pixel_values"] = _image(model)
    return inputs


def _pairs_text_and_images(config: Any) -> bool:
    """Return True if a text and a vision model run in parallel, and images do not replace text tokens."""
    placeholder = any(hasattr(config, name) for name in ("image_token_id", "image_token_index"))
    return hasattr(config, "vision_config") and hasattr(config, "text_config") and not placeholder


def _tokens(model: PreTrainedModel, length: int) -> Tensor:
    """Return valid token ids ``[1, length]``, without padding; the last is the end-of-sequence token if it exists."""
    config = model.config.get_text_config()
    vocabulary = _vocabulary(model)
    ids = [(7 * position + 3) % vocabulary for position in range(length)]
    padding, end = _setting(config, "pad_token_id"), _setting(config, "eos_token_id")
    ids = [token if token != padding else (token + 1) % vocabulary for token in ids]
    if isinstance(end, int) and 0 <= end < vocabulary:
        ids[-1] = end
    return torch.tensor([ids], dtype=torch.int64, device=_placement(model)[0])


def _vocabulary(model: PreTrainedModel) -> int:
    """Return the number of rows of the input embedding, or the vocabulary size in the config."""
    try:
        rows = getattr(model.get_input_embeddings(), "num_embeddings", None)
    except NotImplementedError:
        rows = None
    return int(rows or model.config.get_text_config().vocab_size)


def _setting(config: Any, name: str) -> Any:
    """Return a setting of a config, or None; some configs raise ``NotImplementedError`` if they have no limit."""
    try:
        return getattr(config, name, None)
    except NotImplementedError:
        return None


def _image(model: PreTrainedModel) -> Tensor:
    """Return a grey ramp ``[1, channels, height, width]`` of the size in the config."""
    config: Any = getattr(model.config, "vision_config", model.config)
    size = getattr(config, "image_size", 224)
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    shape = (1, getattr(config, "num_channels", 3), height, width)
    device, dtype = _placement(model)
    ramp = torch.linspace(-1.0, 1.0, shape[1] * height * width, device=device, dtype=torch.float32)
    return ramp.reshape(shape).to(dtype)


def _placement(model: PreTrainedModel) -> tuple[torch.device, torch.dtype]:
    """Return the device of the first parameter and the first floating dtype; CPU and float32 without parameters."""
    parameters = list(model.parameters())
    device = parameters[0].device if parameters else torch.device("cpu")
    dtype = next((p.dtype for p in parameters if p.is_floating_point()), torch.float32)
    return device, dtype
