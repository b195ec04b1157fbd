"""Bytes of key/value caches: the survey's example, and the tensors of real caches."""

from __future__ import annotations

import pytest
import torch
from generating import SMALL
from patterned import TERMS, patterned, registered
from tiny_models import TINY, tiny_gpt2, tiny_llama, tiny_mixtral, tiny_opt, tiny_t5
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    Gemma3TextConfig,
    GPTBigCodeConfig,
    LlamaConfig,
    MambaConfig,
    MinistralConfig,
    MistralConfig,
)

from hf_optim import KeyValueScheme, ModelError, cache_size, key_value_cache
from hf_optim.toolkit.compat import CACHE
from hf_optim.toolkit.quantization import cache_layers

MODELS = {
    "llama": tiny_llama, "gpt2": tiny_gpt2, "opt": tiny_opt, "mixtral": tiny_mixtral,
    "window": lambda: AutoModelForCausalLM.from_config(MistralConfig(**SMALL, sliding_window=9)),
    "some windows": lambda: AutoModelForCausalLM.from_config(
        Gemma3TextConfig(**SMALL, sliding_window=9, layer_types=["sliding_attention", "full_attention"])
    ),
    "windows and full attention in turn": lambda: AutoModelForCausalLM.from_config(
        MinistralConfig(**SMALL, sliding_window=9, layer_types=["sliding_attention", "full_attention"])
    ),
    "one key head": lambda: AutoModelForCausalLM.from_config(
        GPTBigCodeConfig(n_embd=32, n_layer=2, n_head=4, vocab_size=99, n_positions=64, multi_query=True)
    ),
}  # fmt: skip


def test_the_example_of_the_survey():
    """Batch 512, context 2048: 3 TB, three times a model of 540 B parameters, which has 1 TB in 16 bits."""
    config = LlamaConfig(
        num_hidden_layers=118, num_attention_heads=48, num_key_value_heads=48, head_dim=128, hidden_size=18432
    )
    found = cache_size(config, 512, 2048).total
    assert found == 512 * 2048 * 118 * 48 * 128 * 2 * 2
    assert round(found / 1e12, 2) == 3.04
    assert round(found / (2 * 540e9), 1) == 2.8
    eight, four = (cache_size(config, 512, 2048, KeyValueScheme(bits, residual=0)).total for bits in (8, 4))
    assert 1.75 < found / eight < 2
    assert 2.9 < found / four < 4


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("name", MODELS)
def test_bytes_are_those_of_the_cache_that_transformers_fills(name):
    model = MODELS[name]().eval()
    with torch.no_grad():
        cache = model(torch.randint(1, model.config.vocab_size, (2, 40)), use_cache=True)[CACHE]
    held = sum(t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values))
    assert cache_size(model.config, 2, 40, dtype_bytes=4).total == held


@pytest.mark.parametrize("terms", [*TERMS, "window+all+chunks+strided"])
def test_bytes_under_an_attention_pattern_are_those_that_are_held(terms):
    with registered():
        model = patterned(tiny_llama(max_position_embeddings=512), *terms.split("+"))
        with torch.no_grad():
            cache = model(torch.randint(1, model.config.vocab_size, (2, 207)), use_cache=True)[CACHE]
        held = sum(layer.nbytes() for layer in cache.layers)
        found = cache_size(model.config, 2, 207, dtype_bytes=4).total
    # Those that held more: at the end of a chunk or segment, and before the last global token.
    if terms in ("late chunks", "segments", "globals"):
        assert held < found < 2 * held
    else:
        assert found == held


def test_a_pattern_whose_code_is_not_loaded_is_refused():
    config = LlamaConfig(**{"attention_pattern": {"terms": ["window"]}})
    with pytest.raises(ModelError, match="is not registered: load the model first"):
        cache_size(config, 1, 100)


@pytest.mark.parametrize("bits", [4, 8, "float8"])
@pytest.mark.parametrize("keys", ["channel", "token"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "some windows"])
def test_bytes_are_those_of_a_quantized_cache(name, keys, bits):
    model = MODELS[name]().eval()
    scheme = KeyValueScheme(bits, keys, 64, 0)
    cache = key_value_cache(model, scheme)
    length = 512  # whole tiles: a cache has room for more
    for layer, shape in zip(cache.layers, cache_layers(model.config), strict=True):
        key, value = (torch.randn(3, shape.heads, length, size) for size in (shape.key_dim, shape.value_dim))
        layer.update(key, value)
    codes = scales = plain = 0
    for layer in cache.layers:
        if not hasattr(layer, "store"):
            plain += sum(t.numel() * 4 for t in (layer.keys, layer.values))
            continue
        assert layer.quantized == length
        codes += sum(t.numel() * 2 for t in (layer.store.key_words, layer.store.value_words))
        scales += sum(t.numel() * 4 for t in layer.store[1:6] if t.dtype == torch.float32)
        plain += sum(t.numel() * 4 for t in layer.store[6:])
    found = cache_size(model.config, 3, length, scheme, dtype_bytes=4)
    assert (found.codes, found.scales, found.plain) == (codes, scales, plain)


def test_only_whole_groups_behind_the_residual_have_codes():
    scheme = KeyValueScheme(8, "channel", 64, 100)
    assert [scheme.quantized_tokens(n) for n in (0, 100, 163, 164, 227, 228)] == [0, 0, 0, 64, 64, 128]


def test_what_is_not_counted():
    for config, message in (
        (tiny_t5().config, "has an encoder"),
        (DeepseekV3Config(), "latent attention"),
        (MambaConfig(), "does not say how many attention heads|keeps a"),
        (TINY["vit"]().config, "keeps no|makes no cache|does not"),
    ):
        if config.model_type != "vit":
            with pytest.raises(ModelError, match=message):
                cache_layers(config)
    for batch, length in ((0, 5), (1, -3), (1, 2**50), (True, 5), (1.5, 2)):
        with pytest.raises(ModelError, match="must be a positive number"):
            cache_size(tiny_llama().config, batch, length)
