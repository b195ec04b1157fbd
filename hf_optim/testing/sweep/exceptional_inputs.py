"""Inputs of models that read what no dummy inputs give: codebooks, patches, images between tokens; by model class."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Generator, Tensor

Batch = dict[str, Tensor]
LENGTH = 8


def _ids(random: Generator, *shape: int, high: int = 90) -> Tensor:
    return torch.randint(3, high, shape, generator=random)


def _pixels(model: Any, random: Generator, rows: int) -> Tensor:
    vision = getattr(model.config, "vision_config", model.config)
    size = getattr(vision, "image_size", 32)
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    return torch.randn(rows, getattr(vision, "num_channels", 3), height, width, generator=random)


def _codebooks_in_rows(model: Any, random: Generator, rows: int) -> Batch:
    return {"input_ids": _ids(random, rows * model.config.num_codebooks, LENGTH)}


def _codebooks_last(model: Any, random: Generator, rows: int) -> Batch:
    return {"input_ids": _ids(random, rows, LENGTH, model.config.num_codebooks + 1)}


def _dia(model: Any, random: Generator, rows: int) -> Batch:
    channels = model.config.decoder_config.num_channels
    return {"input_ids": _ids(random, rows, LENGTH), "decoder_input_ids": _ids(random, rows, LENGTH, channels)}


def _perceiver_text(model: Any, random: Generator, rows: int) -> Batch:
    return {"inputs": _ids(random, rows, model.config.max_position_embeddings)}


def _perceiver_image(size: int) -> Callable[..., Batch]:
    def inputs(model: Any, random: Generator, rows: int) -> Batch:
        return {"inputs": torch.randn(rows, 3, size, size, generator=random)}

    return inputs


def _patches(model: Any, random: Generator, rows: int) -> Batch:
    vision = getattr(model.config, "vision_config", model.config)
    return {
        "pixel_values": torch.randn(rows, 16, 3 * vision.patch_size**2, generator=random),
        "pixel_attention_mask": torch.ones(rows, 16, dtype=torch.int64),
        "spatial_shapes": torch.tensor([[4, 4]] * rows),
    }


def _flattened_patches(model: Any, random: Generator, rows: int) -> Batch:
    vision = model.config.vision_config
    patches = torch.randn(rows, 16, 2 + vision.patch_embed_hidden_size, generator=random)
    patches[:, :, 0] = torch.arange(16) // 4 + 1
    patches[:, :, 1] = torch.arange(16) % 4 + 1
    mask = torch.ones(rows, 16, dtype=torch.int64)
    return {"flattened_patches": patches, "attention_mask": mask, "decoder_input_ids": _ids(random, rows, LENGTH)}


def _image_and_text(model: Any, random: Generator, rows: int) -> Batch:
    return {"pixel_values": _pixels(model, random, rows), "input_ids": _ids(random, rows, LENGTH)}


def _image_between_tokens(tokens: Callable[[Any], int]) -> Callable[..., Batch]:
    """Return inputs in which a text has as many image tokens as an image has features."""

    def inputs(model: Any, random: Generator, rows: int) -> Batch:
        config = model.config
        image = next(
            value
            for value in (getattr(config, name, None) for name in ("image_token_id", "image_token_index"))
            if value is not None
        )
        text = _ids(random, rows, LENGTH)
        ids = torch.cat([torch.full((rows, tokens(config)), image), text], dim=1)
        return {"pixel_values": _pixels(model, random, rows), "input_ids": ids}

    return inputs


def _instruct_blip(model: Any, random: Generator, rows: int) -> Batch:
    batch = _image_between_tokens(lambda config: config.num_query_tokens)(model, random, rows)
    return {**batch, "qformer_input_ids": _ids(random, rows, LENGTH)}


def _instruct_blip_video(model: Any, random: Generator, rows: int) -> Batch:
    frames, tokens = 2, model.config.num_query_tokens
    pixels = torch.stack([_pixels(model, random, rows) for _ in range(frames)], dim=1)
    video = torch.full((rows, frames * tokens), model.config.video_token_index)
    ids = torch.cat([video, _ids(random, rows, LENGTH)], dim=1)
    return {"pixel_values": pixels, "input_ids": ids, "qformer_input_ids": _ids(random, rows, LENGTH)}


def _kosmos2(model: Any, random: Generator, rows: int) -> Batch:
    queries = model.config.latent_query_num
    mask = torch.zeros(rows, queries + LENGTH, dtype=torch.int64)
    mask[:, 1 : 1 + queries] = 1
    ids = _ids(random, rows, queries + LENGTH)
    return {"pixel_values": _pixels(model, random, rows), "input_ids": ids, "image_embeds_position_mask": mask}


def _idefics(model: Any, random: Generator, rows: int) -> Batch:
    return {
        "input_ids": _ids(random, rows, LENGTH),
        "pixel_values": _pixels(model, random, rows)[:, None],
        "image_attention_mask": torch.ones(rows, LENGTH, 1, dtype=torch.int64),
    }


def _udop(model: Any, random: Generator, rows: int) -> Batch:
    return {
        "input_ids": _ids(random, rows, LENGTH),
        "bbox": torch.rand(rows, LENGTH, 4, generator=random),
        "decoder_input_ids": _ids(random, rows, LENGTH),
    }


def _pi0(model: Any, random: Generator, rows: int) -> Batch:
    config = model.config
    tokens = (config.vlm_config.vision_config.image_size // config.vlm_config.vision_config.patch_size) ** 2
    image = torch.full((rows, tokens), config.vlm_config.image_token_id)
    size = config.vlm_config.vision_config.image_size
    return {
        "state": torch.randn(rows, config.max_state_dim, generator=random),
        "noise": torch.randn(rows, config.chunk_size, config.max_action_dim, generator=random),
        "timestep": torch.rand(rows, generator=random),
        "input_ids": torch.cat([image, _ids(random, rows, LENGTH)], dim=1),
        "pixel_values": torch.randn(rows, 1, 3, size, size, generator=random),
        "pixel_attention_mask": torch.ones(rows, 1, dtype=torch.bool),
    }


# Model class -> a function of (model, generator, rows) that returns a batch.
INPUTS: dict[str, Callable[..., Batch]] = {
    "Blip2ForConditionalGeneration": _image_between_tokens(lambda config: config.num_query_tokens),
    "BlipForConditionalGeneration": _image_and_text,
    "DiaForConditionalGeneration": _dia,
    "IdeficsForVisionText2Text": _idefics,
    "InstructBlipForConditionalGeneration": _instruct_blip,
    "InstructBlipVideoForConditionalGeneration": _instruct_blip_video,
    "Kosmos2ForConditionalGeneration": _kosmos2,
    "KyutaiSpeechToTextForConditionalGeneration": _codebooks_last,
    "Llama4ForConditionalGeneration": _image_between_tokens(lambda config: 4),
    "MusicgenForCausalLM": _codebooks_in_rows,
    "MusicgenMelodyForCausalLM": _codebooks_in_rows,
    "PI0ForConditionalGeneration": _pi0,
    "PerceiverForImageClassificationConvProcessing": _perceiver_image(32),
    "PerceiverForImageClassificationFourier": _perceiver_image(224),
    "PerceiverForImageClassificationLearned": _perceiver_image(32),
    "PerceiverForMaskedLM": _perceiver_text,
    "PerceiverForSequenceClassification": _perceiver_text,
    "Pix2StructForConditionalGeneration": _flattened_patches,
    "Siglip2ForImageClassification": _patches,
    "UdopForConditionalGeneration": _udop,
}
