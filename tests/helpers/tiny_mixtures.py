"""Every mixture of experts of the installed transformers, at tiny sizes.

Packages are found by reading the modelling files for classes of experts and routers, so a new version's mixtures are
tested without being listed here. ``SETTINGS`` holds what a configuration needs beyond ``SIZES``.
"""

from __future__ import annotations

import copy
import functools
import inspect
import re
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import model_type_to_module_name

MIXTURE = re.compile(r"^class \w*(?:Experts|Router|TopKGating|NaiveMoe|CDMoE|MoE|Moe)\w*\(", re.MULTILINE)
HEADS = ("CAUSAL_LM", "IMAGE_TEXT_TO_TEXT", "SEQ_TO_SEQ_CAUSAL_LM", "MULTIMODAL_LM", "TOKEN_CLASSIFICATION", "BACKBONE")

LARGEST = 10_000_000
"""Most weights of a model that is built in memory."""

# fmt: off
SIZES: dict[str, Any] = {
    # the residual stream and the layers
    "vocab_size": 128, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_layers": 2,
    "d_model": 32, "n_embd": 32, "n_layer": 2, "n_layers": 2, "depth": 2, "embed_dim": 32,
    "max_position_embeddings": 64, "encoder_layers": 2, "decoder_layers": 2, "num_decoder_layers": 2, "d_ff": 64,
    "d_kv": 8, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "intermediate_size_mlp": 64, "ffn_hidden_size": 32,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "unpadded_vocab_size": 128,
    "vocab_size_per_layer_input": 128, "hidden_size_per_layer_input": 8,
    # attention
    "num_attention_heads": 4, "num_key_value_heads": 4, "num_heads": 4, "n_head": 4, "n_heads": 4, "head_dim": 8,
    "kv_channels": 8, "encoder_attention_heads": 4, "decoder_attention_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16,
    "v_head_dim": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "index_head_dim": 8, "index_n_heads": 2,
    "index_topk": 16, "swa_num_attention_heads": 4, "swa_num_key_value_heads": 4, "swa_head_dim": 8,
    "swa_v_head_dim": 8, "sliding_window": 16,
    # experts
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "shared_experts_intermediate_size": 16,
    "shared_intermediate_size": 16, "expert_ffn_hidden_size": 16, "moe_hidden_size": 32, "router_hidden_size": 16,
    "moe_topk": 2, "moe_top_k": 2, "moe_k": 2, "top_k_experts": 2, "n_group": 1, "topk_group": 1, "n_shared_experts": 1,
    "zero_expert_num": 2, "moe_layer_start_index": 0, "num_dense_layers": 0, "mlp_layer_types": ["sparse", "sparse"],
    "encoder_sparse_step": 1, "decoder_sparse_step": 1, "expert_capacity": 8, "num_sparse_encoder_layers": 2,
    "num_sparse_decoder_layers": 2, "enable_moe_block": True, "mlp_only_layers": [], "dense_layers": [],
    # state spaces and linear attention
    "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_expand": 2,
    "mamba_num_heads": 4, "mamba_head_dim": 8, "mamba_d_conv": 4, "mamba_chunk_size": 8, "ssm_state_size": 8,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "linear_head_dim": 8, "linear_num_heads": 4, "n_groups": 1,
    # towers and projectors
    "image_size": 32, "out_hidden_size": 32, "text_hidden_size": 32, "adapter_out_dim": 32, "adapter_in_dim": 32,
    "adapter_input_size": 32, "vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32,
    "projection_hidden_dim": 32, "projector_hidden_size": 32, "position_embedding_size": 16, "output_dim": 32,
    "num_position_embeddings": 16, "downsample_hidden_size": 16,
}
# fmt: on


def _rope(*sections: int, **other: Any) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": 1e4, "mrope_section": list(sections), **other}


SETTINGS: dict[str, dict[str, Any]] = {
    "aria": {"vision_config": {"model_type": "idefics3_vision"}, "text_config": {"model_type": "aria_text"}},
    "dbrx": {
        "ffn_config": {"ffn_hidden_size": 32, "hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
        "attn_config": {"kv_n_heads": 4, "rope_theta": 1e4, "clip_qkv": 8},
        "max_seq_len": 64,
    },
    "deepseek_ocr2": {"text_config": {"mlp_layer_types": ["sparse", "sparse"]}},
    "deepseek_v3": {"first_k_dense_replace": 0},
    "deepseek_v4": {"mlp_layer_types": ["hash_moe", "moe"]},
    "diffusion_gemma": {"vision_config": {"model_type": "gemma4_vision"}},
    "doge": {"is_moe": True},
    "dots3_note": {"vision_config": {"mlp_layer_types": ["sparse", "sparse"]}},
    "ernie4_5_vl_moe": {"text_config": {"moe_intermediate_size": [16, 16], "rope_parameters": _rope(1, 1, 2)}},
    "glm4v_moe": {"text_config": {"rope_parameters": _rope(1, 1, 2, partial_rotary_factor=1.0)}},
    "glm5_next": {"text_config": {"qk_rope_head_dim": 0, "head_dim": 0}},
    "hy_v4_vl": {"text_config": {"rope_parameters": _rope(2, 1, 1)}},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mimo_v2_flash": {"num_key_value_heads": 2},
    "minimax_m3_vl": {
        "vision_config": {"model_type": "minimax_m3_vl_vision"},
        "text_config": {"model_type": "minimax_m3_vl_text"},
    },
    "muse_spark": {
        "audio_config": {"patch_sizes": [16, 6], "hidden_sizes": [16, 32], "depths": [1, 1], "out_hidden_size": 32}
    },
    "nemotron_h": {"layers_block_type": ["moe", "moe"]},
    "qwen3_omni_moe": {"enable_audio_output": False},
    "vitpose_backbone": {"image_size": [32, 32], "part_features": 16},
    "zaya": {"num_experts_per_tok": 1},
}


@functools.cache
def packages() -> tuple[str, ...]:
    """Return the packages of the installed transformers whose modelling file has a class of experts or routers."""
    root = Path(transformers.__file__).parent / "models"
    files = root.glob("*/modeling_*.py")
    return tuple(sorted(file.parent.name for file in files if MIXTURE.search(file.read_text(encoding="utf-8"))))


@functools.cache
def classes() -> dict[str, tuple[str, str]]:
    """Return model type -> (package, class with a head) of every configuration of these packages that has such a class.

    A composed model (text, images, sound) is built whole.
    """
    found = {}
    for kind in CONFIG_MAPPING:
        package = model_type_to_module_name(kind)
        if package not in packages():  # its configuration need not be imported
            continue
        composed = "text_config" in getattr(CONFIG_MAPPING[kind], "sub_configs", {})
        for head in HEADS:
            names = getattr(modeling_auto, f"MODEL_FOR_{head}_MAPPING_NAMES", {})
            if kind in names and not (composed and head == "CAUSAL_LM"):
                name = names[kind] if isinstance(names[kind], str) else names[kind][0]
                found[kind] = (package, name)
                break
    return found


def build(kind: str, device: str = "cpu", **changes: Any) -> Any:
    """Build the model of a type of configuration with random weights of one scale, so that every expert is chosen.

    ``changes`` are settings of the configuration. On the meta device it needs no memory.
    """
    base = CONFIG_MAPPING[kind]
    config = base(**sizes(base, {**SETTINGS.get(kind, {}), **changes}))
    cls = getattr(transformers, classes()[kind][1])
    with torch.device("meta"):
        weights = sum(parameter.numel() for parameter in cls(copy.deepcopy(config)).parameters())
    assert weights < LARGEST, f"{kind} is not tiny: {weights:,} weights; its configuration has settings of other names"
    with torch.device(device), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = cls(config).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters() if device != "meta" else ():
            if parameter.dim() > 1 and parameter.is_floating_point():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
        for name, buffer in model.named_buffers() if device != "meta" else ():
            if name.endswith("tid2eid"):  # the experts that a table of tokens chooses
                buffer.copy_(torch.randint(0, 4, buffer.shape, generator=generator))
    return model


def sizes(base: Any, settings: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of a tiny configuration, those of its parts included."""
    known = {name for name, p in inspect.signature(base.__init__).parameters.items() if p.kind is not p.VAR_KEYWORD}
    known = known.union(*(getattr(cls, "__annotations__", {}) for cls in base.__mro__))
    result = {name: value for name, value in SIZES.items() if name in known}
    specs = getattr(base, "sub_configs_defaults", {})
    for name, part in getattr(base, "sub_configs", {}).items():
        given = settings.get(name, {})
        kind = given.get("model_type") or getattr(specs.get(name), "model_type", None)
        if part.__name__ != "AutoConfig":
            result[name] = sizes(part, given)
        elif kind is not None:
            result[name] = {"model_type": kind, **sizes(CONFIG_MAPPING[kind], given)}
    return result | {
        name: value for name, value in settings.items() if name not in result or not isinstance(value, dict)
    }
