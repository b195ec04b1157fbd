"""Small models, prompts and settings of the tests of generation."""

from __future__ import annotations

import warnings
from functools import partial

import torch
from tiny_models import tiny_gpt2, tiny_llama, tiny_mixtral, tiny_opt, tiny_qwen2
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    MistralConfig,
    Qwen3Config,
)

import hf_optim

SMALL = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 99, "max_position_embeddings": 512,
}  # fmt: skip
CONFIGS = {
    "qwen3": lambda: Qwen3Config(**SMALL),
    "mistral-window-6": lambda: MistralConfig(**SMALL, sliding_window=6),
    "gemma2-window-6": lambda: Gemma2Config(**SMALL, sliding_window=6, query_pre_attn_scalar=8),
    "gemma3-window-6": lambda: Gemma3TextConfig(
        **SMALL, sliding_window=6, layer_types=["sliding_attention", "full_attention"]
    ),
}  # fmt: skip
FAMILIES = {
    "llama": partial(tiny_llama, max_position_embeddings=512),
    "gpt2": partial(tiny_gpt2, n_positions=512),
    **{
        name: partial(tiny, max_position_embeddings=512)
        for name, tiny in (("opt", tiny_opt), ("mixtral", tiny_mixtral), ("qwen2", tiny_qwen2))
    },
    **{name: (lambda make=make: AutoModelForCausalLM.from_config(make())) for name, make in CONFIGS.items()},
}  # fmt: skip
SETTINGS = {
    "greedy": {},
    "sampled": {"do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.9},
    "min-p": {"do_sample": True, "min_p": 0.05, "top_k": 0},
    "penalty": {"repetition_penalty": 1.4},
    "ends": {"eos_token_id": [3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41, 43, 47], "min_new_tokens": 4},
    "min-length": {"eos_token_id": list(range(1, 60)), "min_length": 14},
}


def make(name):
    torch.manual_seed(1)
    model = FAMILIES[name]().eval()
    model.generation_config.pad_token_id = 0
    model.generation_config.eos_token_id = None
    return model


def prompt(model, rows=3, length=9, pad=4):
    ids = torch.randint(1, model.config.get_text_config().vocab_size, (rows, length))
    mask = torch.ones_like(ids)
    if rows > 1:
        mask[1, :pad] = 0
    return {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}


def both(model, inputs, **settings):
    torch.manual_seed(5)
    expected = model.generate(**inputs, max_new_tokens=20, **settings)
    torch.manual_seed(5)
    with warnings.catch_warnings():
        warnings.simplefilter("error", hf_optim.GenerationWarning)
        found = hf_optim.generate(model, **inputs, max_new_tokens=20, mode="eager", **settings)
    return expected, found
