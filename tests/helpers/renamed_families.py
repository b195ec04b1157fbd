"""Tiny models of the families whose tensors transformers renames, or joins, between the checkpoint and the model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as t

TEXT: dict[str, Any] = {
    "vocab_size": 128, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
BODY = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
VISION = {**BODY, "image_size": 16, "patch_size": 8}
SHORT = {**BODY, "vocab_size": 128, "max_position_embeddings": 16}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
LOCAL_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
ROPE = {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}}
TOKENS = {"image_token_id": 5, "video_token_id": 6, "vision_start_token_id": 7, "vision_end_token_id": 8}
TOWER = {"depth": 2, "hidden_size": 32, "out_hidden_size": 32, "intermediate_size": 64, "num_heads": 4, "patch_size": 8}
DEEPSEEK = {
    **TEXT, **EXPERTS, "n_routed_experts": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8,
    "num_key_value_heads": 4, "qk_nope_head_dim": 8, "v_head_dim": 8, "first_k_dense_replace": 1, "n_group": 1,
    "topk_group": 1, "n_shared_experts": 1,
}  # fmt: skip
WHISPER = {
    "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "vocab_size": 128, "pad_token_id": 0,
    "max_target_positions": 32, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1, "num_mel_bins": 16,
    "max_source_positions": 30,
}  # fmt: skip

_draw = torch.Generator().manual_seed(0)
IDS = torch.randint(10, 128, (2, 12), generator=_draw)
WITH_IMAGE = torch.cat([IDS[:, :1], torch.full((2, 4), 5), IDS[:, 5:]], dim=1)
PIXELS = torch.randn(2, 3, 16, 16, generator=_draw)
WIDE = torch.randn(2, 3, 32, 32, generator=_draw)
TEXTS, IMAGES, PAIRS = {"input_ids": IDS}, {"pixel_values": PIXELS}, {"input_ids": IDS, "pixel_values": PIXELS}
SHOWN = {"input_ids": WITH_IMAGE, "pixel_values": PIXELS}
SPEECH = {"input_features": torch.randn(2, 16, 60, generator=_draw), "decoder_input_ids": IDS}


def _llava() -> Any:
    config = t.LlavaConfig(
        vision_config=t.CLIPVisionConfig(**VISION), text_config=t.LlamaConfig(**TEXT), image_token_index=5
    )
    return t.LlavaForConditionalGeneration(config)


def _gemma3() -> Any:
    text = t.Gemma3TextConfig(**TEXT, layer_types=["full_attention"] * 2)
    config = t.Gemma3Config(
        text_config=text, vision_config=t.SiglipVisionConfig(**VISION), mm_tokens_per_image=4, image_token_id=5
    )
    return t.Gemma3ForConditionalGeneration(config)


def _qwen(kind: str, tower: dict[str, Any], **text: Any) -> Callable[[], Any]:
    def build() -> Any:
        config = getattr(t, f"{kind}Config")(text_config={**TEXT, **ROPE, **text}, vision_config=tower, **TOKENS)
        return getattr(t, f"{kind}ForConditionalGeneration")(config)

    return build


QWEN3 = {**TOWER, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]}
SWIN = {"image_size": 32, "patch_size": 4, "embed_dim": 32, "depths": [1, 1], "num_heads": [2, 4], "window_size": 4}
JAMBA = {"use_mamba_kernels": False, "attn_layer_period": 2, "attn_layer_offset": 1, "mamba_dt_rank": 16}

# name -> (how to build it, inputs).
FAMILIES: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "llava": (_llava, SHOWN),
    "gemma3": (_gemma3, {**SHOWN, "token_type_ids": (WITH_IMAGE == 5).long()}),
    "qwen2.5-vl": (_qwen("Qwen2_5_VL", {**TOWER, "fullatt_block_indexes": [1], "window_size": 16}), TEXTS),
    "qwen3-vl": (_qwen("Qwen3VL", QWEN3), TEXTS),
    "vit": (lambda: t.ViTForImageClassification(t.ViTConfig(**VISION)), IMAGES),
    "vit encoder": (lambda: t.ViTModel(t.ViTConfig(**VISION)), IMAGES),
    "swin": (lambda: t.SwinForImageClassification(t.SwinConfig(**SWIN)), {"pixel_values": WIDE}),
    "siglip": (lambda: t.SiglipModel(t.SiglipConfig(text_config=SHORT, vision_config=VISION)), PAIRS),
    "clip": (lambda: t.CLIPModel(t.CLIPConfig(text_config=SHORT, vision_config=VISION, projection_dim=32)), PAIRS),
    "clip text": (lambda: t.CLIPTextModel(t.CLIPTextConfig(**SHORT)), TEXTS),
    "whisper": (lambda: t.WhisperForConditionalGeneration(t.WhisperConfig(**WHISPER)), SPEECH),
    "mamba": (lambda: t.MambaForCausalLM(t.MambaConfig(vocab_size=128, hidden_size=32, num_hidden_layers=2)), TEXTS),
    "jamba": (lambda: t.JambaForCausalLM(t.JambaConfig(**TEXT, **EXPERTS, **JAMBA)), TEXTS),
    "mixtral": (lambda: t.MixtralForCausalLM(t.MixtralConfig(**TEXT, **LOCAL_EXPERTS)), TEXTS),
    "qwen2-moe": (
        lambda: t.Qwen2MoeForCausalLM(t.Qwen2MoeConfig(**TEXT, **EXPERTS, shared_expert_intermediate_size=32)),
        TEXTS,
    ),
    "qwen3-moe": (lambda: t.Qwen3MoeForCausalLM(t.Qwen3MoeConfig(**TEXT, **EXPERTS)), TEXTS),
    "olmoe": (lambda: t.OlmoeForCausalLM(t.OlmoeConfig(**TEXT, num_experts=4, num_experts_per_tok=2)), TEXTS),
    "phimoe": (lambda: t.PhimoeForCausalLM(t.PhimoeConfig(**TEXT, **LOCAL_EXPERTS)), TEXTS),
    "deepseek-v3": (lambda: t.DeepseekV3ForCausalLM(t.DeepseekV3Config(**DEEPSEEK)), TEXTS),
}


def build_family(name: str) -> tuple[Any, dict[str, Any]]:
    """Return a model with random weights, whose norms and biases are random too, and its inputs."""
    make, inputs = FAMILIES[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = make().eval()
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if parameter.dim() == 1:
                    parameter.uniform_(0.5, 1.5) if key.endswith("weight") else parameter.normal_(0.0, 0.1)
    return model, inputs
