"""Dummy inputs: the smallest inputs that a transformer accepts, to run it once.

Text, images, videos and sound, alone or as pairs (CLIP, CLAP) and as the inputs of an encoder with a text decoder. A
model that these do not fit is traced on an example of the caller's data, if there is one (``set_example``).
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ...errors import ModelError

TOKENS = 8
"""Length of the dummy text; shorter if the model has fewer positions."""
FRAMES = 64
"""Frames of dummy sound, for models that accept any number."""

PIXEL_INPUTS = ("pixel_values", "pixel_values_videos")
AUDIO_INPUTS = ("input_features", "input_values")
TEXT_INPUTS = ("input_ids",)

_examples: WeakKeyDictionary[nn.Module, dict[str, Any]] = WeakKeyDictionary()
"""Model -> one example of the data it is calibrated on."""


class NoInputsError(ModelError):
    """There are no inputs to run the model once: no dummy inputs fit it, and there is no example of its data."""


def set_example(model: nn.Module, batch: Mapping[str, Any]) -> None:
    """Keep a batch, whose first row is what a model is traced on if dummy inputs do not fit it."""
    _examples[model] = dict(batch)


def shorten_example(model: nn.Module) -> None:
    """Keep a copy of the first row of an example alone, once the calibration has ended."""
    if model in _examples:
        rows = _examples[model].items()
        # Copies: a view would keep the whole batch for as long as the model lives.
        _examples[model] = {key: value[:1].clone() if isinstance(value, Tensor) else value for key, value in rows}


def has_example(model: nn.Module) -> bool:
    """Return True if ``set_example`` kept an example for the model."""
    return model in _examples


def example_of(model: nn.Module, whole: bool = False) -> dict[str, Any] | None:
    """Return the example that ``set_example`` kept, on the device of the model; None if there is none.

    ``whole`` returns the batch instead of its first row: the patches of all its images, or the codebooks of all its
    recordings, may follow one another along the first dimension.
    """
    if model not in _examples:
        return None
    device, dtype = _placement(model)

    def placed(value: Tensor) -> Tensor:
        return (value if whole else value[:1]).to(device, dtype if value.is_floating_point() else None)

    return {key: placed(value) if isinstance(value, Tensor) else value for key, value in _examples[model].items()}


def dummy_inputs(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return minimal inputs for a model, on its device: one sequence of eight tokens, one image or a little sound.

    Text models get ``input_ids [1, T]`` int64, models with a text decoder also ``decoder_input_ids``, of half the
    length if they generate text. Vision models, and models that compare texts with images, get
    ``pixel_values [1, channels, height, width]`` (videos: ``[1, frames, channels, height, width]``), speech models
    ``input_values [1, samples]`` or ``input_features`` in the shape of their feature extractor, all in the floating
    dtype of the model; models that route by task ``task_ids [1]`` int64. Token ids are valid for the vocabulary and
    never the padding token; the last one is the end-of-sequence token if the model has one, since some heads look for
    it. Models that choose between texts get one
    text to choose, ``input_ids [1, 1, T]``. The values are the same at each call.

    Without dummy inputs for the main input of a model, the example of ``set_example`` is returned. Raises
    ``NoInputsError`` if there is none either.
    """
    main = _main_input(model)
    if main in PIXEL_INPUTS:
        inputs = {main: _image(model)}
    elif main in AUDIO_INPUTS:
        inputs = {main: _sound(model, main)}
    elif main in TEXT_INPUTS:
        inputs = {main: _tokens(model, _text_length(model))}
    else:
        example = example_of(model)
        if example is not None:
            return example
        raise NoInputsError(
            f"{type(model).__name__} reads {main!r}, for which there are no dummy inputs: pass calibration batches, "
            "calibration=[{name: tensor, ...}], of which the first serves to trace the model",
            cli=f"{type(model).__name__} reads {main!r}, for which there are no dummy inputs: pass --calibration DATA "
            f"with a column {main!r}, of which the first row serves to trace the model",
        )
    parameters = inspect.signature(model.forward).parameters
    if model.config.is_encoder_decoder and ("decoder_input_ids" in parameters or main in TEXT_INPUTS):
        length = _text_length(model)
        # A head that is not a language model's may read the decoder where the input has its end of sequence.
        same = main in TEXT_INPUTS and not model.can_generate()
        inputs["decoder_input_ids"] = _tokens(model, length if same else max(1, length // 2))
    if _is_multiple_choice(model):
        inputs = {name: value.unsqueeze(1) for name, value in inputs.items()}
    if main in TEXT_INPUTS and "pixel_values" in parameters and pairs_text_and_images(model.config):
        inputs["pixel_values"] = _image(model)
    if main in TEXT_INPUTS and "input_features" in parameters and _pairs_text_and_sound(model.config):
        inputs["input_features"] = _sound(model, "input_features")
    if "task_ids" in parameters:
        inputs["task_ids"] = torch.zeros(1, dtype=torch.int64, device=model.device)
    return inputs


def _main_input(model: PreTrainedModel) -> str:
    """Return the name of the main input; of its encoder, if the model is composed of an encoder and a decoder."""
    encoder = getattr(model, "encoder", None)
    if model.main_input_name == "inputs" and isinstance(encoder, PreTrainedModel):
        return str(encoder.main_input_name)
    return str(model.main_input_name)


def _is_multiple_choice(model: PreTrainedModel) -> bool:
    """Return True if a model takes several texts for each example, ``[B, choices, T]``, as its class states."""
    return any(cls.__name__.endswith("ForMultipleChoice") for cls in type(model).__mro__)


def _text_length(model: PreTrainedModel) -> int:
    config = model.config.get_text_config()
    limits = (_setting(config, name) for name in ("max_position_embeddings", "max_target_positions"))
    return min([TOKENS, *(limit for limit in limits if isinstance(limit, int) and limit > 0)])


def pairs_text_and_images(config: Any) -> bool:
    """Return True if a text and a vision model run in parallel, and images do not replace text tokens."""
    placeholder = any(hasattr(config, name) for name in ("image_token_id", "image_token_index"))
    return hasattr(config, "vision_config") and hasattr(config, "text_config") and not placeholder


def _pairs_text_and_sound(config: Any) -> bool:
    """Return True if a text and a sound model run in parallel, and sound does not replace text tokens."""
    placeholder = any(hasattr(config, name) for name in ("audio_token_id", "audio_token_index"))
    return hasattr(config, "audio_config") and hasattr(config, "text_config") and not placeholder


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
    """Return the number of rows of the input embedding, or the vocabulary size in the config.

    Models without either read characters: any number is valid, and 128 is returned.
    """
    try:
        rows = getattr(model.get_input_embeddings(), "num_embeddings", None)
    except NotImplementedError:
        rows = None
    return int(rows or _setting(model.config.get_text_config(), "vocab_size") or 128)


def _setting(config: Any, name: str) -> Any:
    """Return a setting of a config, or None; some configs raise ``NotImplementedError`` if they have no limit."""
    try:
        return getattr(config, name, None)
    except NotImplementedError:
        return None


def _image(model: PreTrainedModel) -> Tensor:
    """Return a ramp ``[1, channels, height, width]`` of the size in the config; with frames, if that has a number."""
    config: Any = getattr(model.config, "vision_config", None) or getattr(model.config, "encoder", None) or model.config
    size = getattr(config, "image_size", None) or getattr(config, "crop_size", None) or 224
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    channels = int(getattr(config, "num_channels", None) or getattr(config, "in_chans", None) or 3)
    shape: tuple[int, int, int] = (channels, height, width)
    frames = getattr(config, "num_frames", None) or getattr(config, "frames_per_clip", None)
    return _ramp(model, (1, frames, *shape) if isinstance(frames, int) else (1, *shape))


def _sound(model: PreTrainedModel, name: str) -> Tensor:
    """Return a ramp in the shape of ``input_values`` (a waveform) or ``input_features`` (a spectrogram)."""
    own = model.config
    parts = [
        own,
        *(getattr(own, part, None) for part in ("encoder", "encoder_config", "audio_config", "speech_config")),
    ]

    def setting(*names: str) -> Any:
        found = (getattr(part, key, None) for key in names for part in parts if part is not None)
        return next((value for value in found if value is not None), None)

    bins = setting("num_mel_bins")
    if name == "input_values":
        if setting("max_length") and bins and setting("frequency_stride"):  # patches of a spectrogram
            return _ramp(model, (1, setting("max_length"), bins))
        strides = setting("conv_stride")
        hop = math.prod(strides) if strides else 320
        return _ramp(model, (1, 16 * hop + 400))
    if width := setting("input_dim"):
        return _ramp(model, (1, FRAMES, width))
    if setting("spec_size") and bins:
        return _ramp(model, (1, 1, setting("spec_size") * (setting("spec_size") // bins), bins))
    if channels := setting("input_feat_per_channel"):
        return _ramp(model, (1, FRAMES, channels * (setting("input_channels") or 1)))
    if width := setting("feature_projection_input_dim"):
        return _ramp(model, (1, FRAMES, width))
    positions = setting("max_source_positions")
    if bins and positions:
        return _ramp(model, (1, bins, 2 * positions))
    return _ramp(model, (1, FRAMES, bins or 80))


def _ramp(model: PreTrainedModel, shape: tuple[int, ...]) -> Tensor:
    """Return values that rise evenly from -1 to 1."""
    device, dtype = _placement(model)
    return torch.linspace(-1.0, 1.0, math.prod(shape), device=device).reshape(shape).to(dtype)


def _placement(model: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Return the device of the first parameter and the first floating dtype; CPU and float32 without parameters."""
    parameters = list(model.parameters())
    device = parameters[0].device if parameters else torch.device("cpu")
    dtype = next((p.dtype for p in parameters if p.is_floating_point()), torch.float32)
    return device, dtype
