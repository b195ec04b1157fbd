"""Tiny random models, one per architecture family, for the tests.

Each builder is seeded, does not change the global random state, and returns a model in evaluation mode. Hidden width
32, two blocks, vocabulary 64 (96 for T5): a forward takes milliseconds on a CPU. Norm weights and biases are random
instead of ones and zeros, so that a test that folds them cannot pass by accident.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

DECODER: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}


def _build(cls: type[PreTrainedModel], config: Any, seed: int) -> Any:
    """Build ``cls(config)`` with random weights, float32, on the CPU, in evaluation mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = cls(config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.dim() == 1 and name.endswith("weight"):
                    parameter.uniform_(0.5, 1.5)
                elif parameter.dim() == 1:
                    parameter.normal_(0.0, 0.1)
                else:
                    parameter.normal_(0.0, 0.15)
    return model.eval()


def tiny_llama(seed: int = 0, **changes: Any) -> LlamaForCausalLM:
    """Build Llama with grouped-query attention (4 heads, 2 key/value heads), untied output head."""
    return _build(LlamaForCausalLM, LlamaConfig(**{**DECODER, **changes}), seed)


def tiny_qwen2(seed: int = 0, **changes: Any) -> Qwen2ForCausalLM:
    """Build Qwen2: like Llama, with biases on q, k, v and the output head tied to the embeddings."""
    return _build(Qwen2ForCausalLM, Qwen2Config(**{**DECODER, "tie_word_embeddings": True, **changes}), seed)


def tiny_gpt2(seed: int = 0, **changes: Any) -> GPT2LMHeadModel:
    """Build GPT-2: ``Conv1D`` layers (weight ``[in, out]``), one fused q, k, v projection, tied output head."""
    config = {
        "vocab_size": 64,
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 64,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    return _build(GPT2LMHeadModel, GPT2Config(**{**config, **changes}), seed)


def tiny_opt(seed: int = 0, **changes: Any) -> OPTForCausalLM:
    """Build OPT, pre-norm, ReLU MLP without a gate, biases everywhere, tied output head."""
    config = {
        "vocab_size": 64,
        "hidden_size": 32,
        "ffn_dim": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "word_embed_proj_dim": 32,
        "max_position_embeddings": 64,
        "do_layer_norm_before": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    return _build(OPTForCausalLM, OPTConfig(**{**config, **changes}), seed)


def tiny_bert(seed: int = 0, **changes: Any) -> BertForSequenceClassification:
    """Build BERT, post-norm, GELU MLP, with a pooler and a three-label classifier."""
    config = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "num_labels": 3,
    }
    return _build(BertForSequenceClassification, BertConfig(**{**config, **changes}), seed)


def tiny_vit(seed: int = 0, **changes: Any) -> ViTForImageClassification:
    """Build ViT, 16 x 16 pixels in four patches, three labels."""
    config = {
        "image_size": 16,
        "patch_size": 8,
        "num_channels": 3,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_labels": 3,
    }
    return _build(ViTForImageClassification, ViTConfig(**{**config, **changes}), seed)


def tiny_t5(seed: int = 0, **changes: Any) -> T5ForConditionalGeneration:
    """Build T5: encoder and decoder of two blocks each, cross attention, ReLU MLP without biases."""
    config = {
        "vocab_size": 96,
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 48,
        "num_layers": 2,
        "num_decoder_layers": 2,
        "num_heads": 4,
        "decoder_start_token_id": 0,
        "pad_token_id": 0,
        "eos_token_id": 1,
    }
    return _build(T5ForConditionalGeneration, T5Config(**{**config, **changes}), seed)


def tiny_mixtral(seed: int = 0, **changes: Any) -> MixtralForCausalLM:
    """Build Mixtral: four experts, two of them per token, stored as 3-D parameters."""
    config = {**DECODER, "num_local_experts": 4, "num_experts_per_tok": 2}
    return _build(MixtralForCausalLM, MixtralConfig(**{**config, **changes}), seed)


TINY: dict[str, Callable[..., PreTrainedModel]] = {
    "llama": tiny_llama,
    "qwen2": tiny_qwen2,
    "gpt2": tiny_gpt2,
    "opt": tiny_opt,
    "bert": tiny_bert,
    "vit": tiny_vit,
    "t5": tiny_t5,
    "mixtral": tiny_mixtral,
}
