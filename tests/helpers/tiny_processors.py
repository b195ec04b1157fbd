"""Tiny multimodal models with their processors, made on the spot: CLIP, LLaVA and Qwen2-VL."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import transformers as t
from PIL import Image
from renamed_families import ROPE, SHORT, TEXT, VISION
from tiny_tokenizer import tiny_tokenizer

CHAT = (
    "{% for m in messages %}[{{ m['role'] }}]{% for p in m['content'] %}"
    "{% if p['type'] == 'image' %}IMAGE{% else %}{{ p['text'] }}{% endif %}{% endfor %}{% endfor %}"
)
WORDS = 300


class ImagesOnlyQwen2VLProcessor(t.Qwen2VLProcessor):
    """The processor of Qwen2-VL without videos, whose processor needs torchvision."""

    def __init__(self, image_processor=None, tokenizer=None, chat_template=None, **kwargs):
        self.image_token, self.video_token = "<|image_pad|>", "<|video_pad|>"
        self.image_token_id, self.video_token_id = tokenizer.convert_tokens_to_ids([self.image_token, self.video_token])
        t.ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)


def picture(seed: int = 0, size: tuple[int, int] = (20, 16)) -> Image.Image:
    """Return an RGB image of noise; ``size`` is width and height."""
    values = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(values)


def _of_pillow(name: str) -> Any:
    """Return the image processor that needs no torchvision; versions of transformers name it differently."""
    return getattr(t, f"{name}Pil", None) or getattr(t, name)


def _tokenizer(*special: str) -> Any:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(list(special), special_tokens=True)
    return tokenizer


def _clip_images() -> Any:
    return _of_pillow("CLIPImageProcessor")(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})


def _clip() -> tuple[Any, Any]:
    config = t.CLIPConfig(text_config={**SHORT, "vocab_size": WORDS}, vision_config=VISION, projection_dim=32)
    return t.CLIPModel(config), t.CLIPProcessor(image_processor=_clip_images(), tokenizer=_tokenizer())


def _llava(template: str | None = CHAT.replace("IMAGE", "<image>")) -> tuple[Any, Any]:
    tokenizer = _tokenizer("<image>")
    processor = t.LlavaProcessor(
        image_processor=_clip_images(), tokenizer=tokenizer, patch_size=8, vision_feature_select_strategy="default",
        image_token="<image>", num_additional_image_tokens=1, chat_template=template,
    )  # fmt: skip
    config = t.LlavaConfig(
        vision_config=t.CLIPVisionConfig(**VISION),
        text_config=t.LlamaConfig(**{**TEXT, "vocab_size": WORDS}),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )
    return t.LlavaForConditionalGeneration(config), processor


def _qwen2_vl() -> tuple[Any, Any]:
    names = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
    tokenizer = _tokenizer(*names)
    images = _of_pillow("Qwen2VLImageProcessor")(patch_size=8, merge_size=2, min_pixels=16 * 16, max_pixels=32 * 32)
    template = CHAT.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>")
    ids = tokenizer.convert_tokens_to_ids(list(names))
    keys = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    tower = {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "patch_size": 8, "mlp_ratio": 2}
    config = t.Qwen2VLConfig(
        text_config={**TEXT, **ROPE, "vocab_size": WORDS}, vision_config=tower, **dict(zip(keys, ids, strict=True))
    )
    processor = ImagesOnlyQwen2VLProcessor(images, tokenizer, chat_template=template)
    return t.Qwen2VLForConditionalGeneration(config), processor


PROCESSED: dict[str, Callable[[], tuple[Any, Any]]] = {"clip": _clip, "llava": _llava, "qwen2-vl": _qwen2_vl}


def build_processed(name: str, **options: Any) -> tuple[Any, Any]:
    """Return a model with random weights, and its processor."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, processor = PROCESSED[name](**options)
        return model.eval(), processor
