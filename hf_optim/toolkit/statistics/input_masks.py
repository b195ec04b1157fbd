"""Which tokens, frames or patches of a batch are real, from the masks that the batch holds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..topology.valid_rows import StreamMask
from .streams import encoder_and_decoder

AUDIO_MASKS = ("feature_attention_mask", "input_features_mask", "audio_attention_mask", "padding_mask")
PIXEL_MASKS = ("pixel_attention_mask", "pixel_mask")
TEXT_INPUTS = ("input_ids", "inputs_embeds")
# An additive mask adds this, or less, to the scores of what must not be attended to.
MASKED_SCORE = -1e3


def stream_masks(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, StreamMask]:
    """Return the mask of each stream (see ``streams``) on one batch; a stream whose rows all count has none.

    The masks of a batch are ``attention_mask`` (2-D, or 3-D and 4-D with queries and keys, boolean or additive),
    ``decoder_attention_mask``, and masks of pixels and sound. Decoder inputs that end with padding tokens need no
    mask.
    """
    masks: dict[str, StreamMask] = {}
    main = real_tokens(batch.get("attention_mask"), _batch_size(batch))
    is_text = any(key in batch for key in TEXT_INPUTS)
    if main is not None:
        resample = _resampler(model, main)
        for stream in ("encoder", "text" if is_text else "audio"):
            masks[stream] = StreamMask([main], resample)
        if not is_text:
            masks["text"] = StreamMask([main])
            masks["vision"] = StreamMask([main])
    for key in AUDIO_MASKS:
        if (frames := real_tokens(batch.get(key), _batch_size(batch))) is not None:
            masks["audio"] = StreamMask([frames], _resampler(model, frames))
    for key in PIXEL_MASKS:
        if patches := _real_patches(model, batch.get(key)):
            masks["vision"] = StreamMask(patches)
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        decoder = _decoder_mask(model, batch)
        masks["decoder"] = StreamMask([] if decoder is None else [decoder])
        if "vision" in masks and not is_text:
            masks["encoder"] = masks["vision"]
    return masks


def real_tokens(mask: Any, batch_size: int | None = None) -> Tensor | None:
    """Return bool ``[B, T]``, True for real tokens, from an attention mask of any form; None if it has none of these.

    In a mask of queries and keys ``[B, (H,) Q, K]`` a token is real if any query attends to it. Additive masks have
    negative numbers, others are 0 where nothing is attended to.
    """
    if not isinstance(mask, Tensor) or mask.dim() not in (2, 3, 4) or not mask.numel():
        return None
    additive = mask.is_floating_point() and (bool((mask < 0).any()) or (mask.dim() > 2 and not bool(mask.any())))
    attended = mask > MASKED_SCORE if additive else mask != 0
    if mask.dim() > 2:
        queries = mask.shape[-2]
        attended = attended.flatten(1, -2).any(1)[:, -queries:]
        if len(attended) == 1 and batch_size:
            attended = attended.expand(batch_size, -1)
    return attended


def _batch_size(batch: Mapping[str, Any]) -> int | None:
    sizes = (len(batch[key]) for key in TEXT_INPUTS if isinstance(batch.get(key), Tensor))
    return next(sizes, None)


def _decoder_mask(model: nn.Module, batch: Mapping[str, Any]) -> Tensor | None:
    """Return which decoder inputs are real: by their mask, else all but the padding tokens at the end."""
    ids = batch.get("decoder_input_ids")
    size = len(ids) if isinstance(ids, Tensor) else None
    found = real_tokens(batch.get("decoder_attention_mask"), size)
    embeds = batch.get("decoder_inputs_embeds")
    if found is None and isinstance(embeds, Tensor):
        return torch.ones(embeds.shape[:2], dtype=torch.bool)
    if found is not None or not isinstance(ids, Tensor) or ids.dim() != 2:
        return found
    config: Any = model.config
    pad, eos = getattr(config, "pad_token_id", None), getattr(config, "eos_token_id", None)
    real = torch.ones_like(ids, dtype=torch.bool) if pad is None else ids != pad
    real = real.flip(1).cummax(1).values.flip(1)  # padding between real tokens is attended to
    real[:, 0] = True  # the start token, which may be the padding token
    if pad is not None and pad in (eos if isinstance(eos, (list, tuple)) else (eos,)):
        real[:, 1:] |= real[:, :-1].clone()  # the first of the row of padding tokens may be the end of the text
    return real


def _resampler(model: nn.Module, mask: Tensor) -> Callable[[int], Tensor | None]:
    """Return the function that maps a length to the mask after a change of length inside the model."""

    def resample(length: int) -> Tensor | None:
        multiples = _multiples(getattr(model, "config", None))
        if any(length == -(-mask.shape[1] // each) * each for each in multiples) and length > mask.shape[1]:
            return nn.functional.pad(mask, (0, length - mask.shape[1]))  # the model pads its inputs
        pair = encoder_and_decoder(model)
        owners = [model, getattr(model, "base_model", None), *(pair or ()), *_audio_towers(model)]
        for owner in owners:
            for convert in (_by_vector_mask, _by_lengths):
                found = convert(owner, mask, length)
                if found is not None:
                    return found
        return None

    return resample


def _multiples(config: Any) -> set[int]:
    """Return the numbers to a multiple of which a model pads its inputs."""
    found: set[int] = set()
    for key in ("attention_window", "block_size"):
        value = getattr(config, key, None)
        found |= {each for each in (value if isinstance(value, (list, tuple)) else (value,)) if type(each) is int}
    return {each for each in found if each > 1}


def _audio_towers(model: nn.Module) -> list[nn.Module]:
    return [module for name, module in model.named_modules() if name.endswith(("audio_tower", "audio_encoder"))]


def _by_vector_mask(owner: Any, mask: Tensor, length: int) -> Tensor | None:
    convert = getattr(owner, "_get_feature_vector_attention_mask", None)
    if convert is None:
        return None
    try:
        found = convert(length, mask.long())
    except Exception:  # a private function of any model: it may not accept this length
        return None
    return found.bool() if found.shape == (len(mask), length) else None


def _by_lengths(owner: Any, mask: Tensor, length: int) -> Tensor | None:
    convert = getattr(owner, "_get_feat_extract_output_lengths", None)
    if convert is None:
        return None
    try:
        lengths, longest = convert(mask.sum(-1)), convert(torch.tensor([mask.shape[1]]))
    except Exception:  # as above
        return None
    pairs = zip(lengths, longest, strict=True) if isinstance(lengths, tuple) else [(lengths, longest)]
    for each, full in pairs:
        if int(full) == length:
            return torch.arange(length, device=mask.device) < each[:, None]
    return None


def _real_patches(model: nn.Module, mask: Any) -> list[Tensor]:
    """Return masks ``[images, patches]`` of the patches with a real pixel, with and without images of padding alone."""
    if not isinstance(mask, Tensor) or mask.dim() not in (2, 3, 4):
        return []
    if mask.dim() == 2:
        return [mask != 0]
    config: Any = getattr(model, "config", None)
    size = getattr(getattr(config, "vision_config", config), "patch_size", None)
    if type(size) is not int:
        return []
    pixels = (mask != 0).flatten(0, -3).float()
    patches = nn.functional.max_pool2d(pixels[:, None], size).flatten(1) > 0
    return [patches, patches[patches.any(1)]]
