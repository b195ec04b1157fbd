"""A quantized key/value cache: transformers' loop and ours give the same tokens; what a cache must be able to do."""

from __future__ import annotations

import copy
import warnings
from contextlib import nullcontext

import pytest
import torch
from generating import CONFIGS, SMALL
from interpreting import on_triton
from simulated_graphs import simulated_graphs
from tiny_models import tiny_gpt2, tiny_llama, tiny_mixtral, tiny_t5
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForCausalLM,
    Cache,
    MistralConfig,
    Qwen3Config,
)
from transformers.cache_utils import DynamicSlidingWindowLayer

import hf_optim
from hf_optim import KeyValueScheme, ModelError, RecipeError, key_value_cache
from hf_optim.generation import attention, codes
from hf_optim.generation.quantized_cache import QuantizedLayer
from hf_optim.generation.static_cache import StaticKeyValues
from hf_optim.toolkit.compat import CACHE, VERSION
from hf_optim.toolkit.quantization import scheme_of, set_scheme

FAMILIES = {
    "llama": tiny_llama, "gpt2": tiny_gpt2, "mixtral": tiny_mixtral,
    **{
        name: (lambda make=CONFIGS[name]: AutoModelForCausalLM.from_config(make()))
        for name in ("qwen3", "gemma2-window-6", "gemma3-window-6")
    },
}  # fmt: skip
FOUR = KeyValueScheme(4, "channel", 32, 8)
SCHEMES = {
    "int4": FOUR,
    "int8-per-token": KeyValueScheme(8, "token", residual=0),
    "float8": KeyValueScheme("float8", "channel", 32, 0),
}


def make(name="llama"):
    torch.manual_seed(1)
    model = FAMILIES[name]().eval()
    model.generation_config.pad_token_id = 0
    model.generation_config.eos_token_id = None
    return model


def prompt(model, rows=3, length=37, pad=4):
    torch.manual_seed(2)
    ids = torch.randint(1, model.config.vocab_size, (rows, length))
    mask = torch.ones_like(ids)
    if rows > 1:
        mask[1, :pad] = 0
    return {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}


def on_loop(model, scheme, inputs, **settings):
    """Tokens of transformers' loop over the cache."""
    return model.generate(**inputs, **settings, **{CACHE: key_value_cache(model, scheme)})


def filled(model, scheme=FOUR, rows=2, length=70):
    cache = key_value_cache(model, scheme)
    inputs = prompt(model, rows, length)
    with torch.no_grad():
        model(**inputs, **{CACHE: cache})
    return cache, inputs


def decoded(cache):
    return [t.clone() for layer in cache.layers for t in layer.decoded()]


# -- the same tokens --------------------------------------------------------------------------------------------------
@pytest.mark.many
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", FAMILIES)
def test_our_loop_gives_the_tokens_of_transformers_loop(name, scheme):
    model, scheme = make(name), SCHEMES[scheme]
    inputs = prompt(model)  # left padding
    expected = on_loop(model, scheme, inputs, max_new_tokens=24)
    set_scheme(model.config, scheme)
    with warnings.catch_warnings():
        warnings.simplefilter("error", hf_optim.GenerationWarning)
        found = hf_optim.generate(model, **inputs, max_new_tokens=24, mode="eager")
    assert torch.equal(found, expected)
    assert torch.equal(hf_optim.generate(model, **inputs, max_new_tokens=24), expected)  # on a CPU, transformers' loop


@pytest.mark.many
@on_triton
@pytest.mark.parametrize(
    ("name", "scheme"), [("llama", "int4"), ("gpt2", "float8"), ("gemma3-window-6", "int8-per-token")]
)
def test_steps_on_the_kernels_give_the_same_tokens(name, scheme, device):
    """Prompts that are longer than a group, and steps that fill the next."""
    model, scheme = make(name).to(device), SCHEMES[scheme]
    inputs = {key: value.to(device) for key, value in prompt(model, rows=2, length=58).items()}
    steps = 5 if name == "gpt2" else 8
    expected = on_loop(model, scheme, inputs, max_new_tokens=steps)
    set_scheme(model.config, scheme)
    graphs = simulated_graphs() if device == "cpu" else nullcontext()
    with graphs as seen, warnings.catch_warnings():
        # Whatever torch.compile cannot trace in a layer would be a warning and a slower step.
        warnings.simplefilter("error", hf_optim.GenerationWarning)
        for mode in ("eager", "captured", "auto"):
            assert torch.equal(hf_optim.generate(model, **inputs, max_new_tokens=steps, mode=mode), expected)
    if seen is not None:
        assert (seen.compiled.frame_count, len(seen.captured)) == (1, 2)


def test_four_bits_change_logits_and_a_long_residual_does_not():
    model = make()
    inputs = prompt(model, length=60)
    dense = model.generate(**inputs, max_new_tokens=8, return_dict_in_generate=True, output_logits=True)

    def logits(scheme):
        settings = {"return_dict_in_generate": True, "output_logits": True}
        return on_loop(model, scheme, inputs, max_new_tokens=8, **settings).logits

    exact = logits(KeyValueScheme(4, "channel", 32, 128))
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(exact, dense.logits, strict=True))
    assert torch.equal(exact[0], dense.logits[0])
    coarse, fine = (
        float((logits(KeyValueScheme(bits, "channel", 32, 0))[1] - dense.logits[1]).abs().max()) for bits in (4, 8)
    )
    assert coarse > 4 * fine > 0


def test_the_prefill_sees_full_precision():
    model = make()
    inputs = prompt(model, rows=1, length=70)
    with torch.no_grad():
        expected = model(**inputs).logits
        found = model(**inputs, **{CACHE: key_value_cache(model, FOUR)}).logits
    assert torch.equal(found, expected)


def test_a_captured_step_would_be_handed_the_codes(monkeypatch):
    """Inside of our attention, layers give codes; outside, and where the model keeps its own, keys and values."""
    model = make()
    monkeypatch.setattr(attention, "_available", lambda model: True)
    seen = []
    monkeypatch.setattr(attention, "attend_to_codes", lambda m, q, c, mask, **kw: seen.append(c) or q.transpose(1, 2))
    cache, _ = filled(model, rows=1)
    step = {"input_ids": torch.ones(1, 1, dtype=torch.long), CACHE: cache}
    with torch.no_grad():
        with attention.on_kernel(model):
            model(**step)
        assert len(seen) == model.config.num_hidden_layers
        assert all(isinstance(each, codes.Codes) for each in seen)
        model(**step)
    assert len(seen) == model.config.num_hidden_layers
    with attention.on_kernel(model):
        assert codes.attention_takes_codes()
        assert attention.NAME in AttentionInterface._global_mapping
    for registry in (AttentionInterface, AttentionMaskInterface):
        assert attention.NAME not in registry._global_mapping
    assert not any(word in attention.NAME for word in ("sdpa", "flex", "flash"))
    model.config._attn_implementation = "flex_attention"  # a user's choice is kept
    with attention.on_kernel(model):
        assert not codes.attention_takes_codes()


def test_codes_that_the_kernel_does_not_take_are_decoded():
    model = make("gemma2-window-6").double()
    cache = key_value_cache(model, FOUR)
    random = torch.Generator().manual_seed(0)
    layer = cache.layers[1]
    layer.update(*(torch.randn(1, 2, 70, 8, dtype=torch.float64, generator=random) for _ in range(2)))
    query = torch.randn(1, 4, 1, 8, dtype=torch.float64, generator=random)
    key, value = layer.decoded()
    scores = query @ key.repeat_interleave(2, 1).transpose(2, 3) * 0.3
    for softcap, capped in ((0.0, scores), (2.0, 2 * torch.tanh(scores / 2))):
        expected = (capped.softmax(-1) @ value.repeat_interleave(2, 1)).transpose(1, 2)
        arguments = {"scaling": 0.3, "softcap": softcap or None}
        found = codes.attend_to_codes(model.model.layers[1].self_attn, query, codes.Codes(layer, query.dtype), None,
                                      **arguments)  # fmt: skip
        assert torch.allclose(found, expected, atol=1e-6)


# -- what a cache must be able to do ----------------------------------------------------------------------------------
def test_each_token_is_quantized_once():
    model = make()
    cache, _ = filled(model, KeyValueScheme(4, "channel", 32, 0), length=64)
    layer = cache.layers[0]
    before = [t.clone() for t in layer.decoded()]
    random = torch.Generator().manual_seed(0)
    for new in (1, 40, 1, 30):
        layer.update(*(100 * torch.randn(2, before[0].shape[1], new, t.shape[3], generator=random) for t in before))
    assert layer.quantized == 128
    for was, now in zip(before, layer.decoded(), strict=True):
        assert torch.equal(now[:, :, :64], was)


def test_beam_search_and_several_sequences():
    model = make()
    inputs = prompt(model)
    for settings in ({"num_beams": 3}, {"num_return_sequences": 2, "do_sample": True}):
        torch.manual_seed(3)
        expected = on_loop(model, FOUR, inputs, max_new_tokens=12, **settings)
        set_scheme(model.config, FOUR)
        torch.manual_seed(3)
        assert torch.equal(hf_optim.generate(model, **inputs, max_new_tokens=12, **settings), expected)
        set_scheme(model.config, None)


def test_rows_are_chosen_and_repeated():
    model = make()
    cache, _ = filled(model, rows=3)
    before = decoded(cache)
    for act, choose in (
        (lambda c: c.reorder_cache(torch.tensor([2, 0, 0])), torch.tensor([2, 0, 0])),
        (lambda c: c.batch_repeat_interleave(2), torch.tensor([0, 0, 1, 1, 2, 2])),
        (lambda c: c.batch_select_indices(torch.tensor([1])), torch.tensor([1])),
    ):
        changed = copy.deepcopy(cache)
        act(changed)
        for now, was in zip(decoded(changed), before, strict=True):
            assert torch.equal(now, was[choose])


@pytest.mark.parametrize("removed", [1, 9, 30, 69])
def test_crop_continues_from_what_was_kept(removed):
    model = make()
    cache, inputs = filled(model, KeyValueScheme(8, "channel", 32, 4), rows=1)
    before = decoded(cache)
    cache.crop(-removed)
    kept = 70 - removed
    assert cache.get_seq_length() == kept
    for now, was in zip(decoded(cache), before, strict=True):
        assert torch.equal(now, was[:, :, :kept])
    with torch.no_grad():
        logits = model(input_ids=inputs["input_ids"][:, kept:], **{CACHE: cache}).logits
        expected = model(**inputs).logits[:, kept:]
    assert torch.allclose(logits, expected, atol=0.03)
    assert cache.get_seq_length() == 70


def test_crop_refuses_more_than_there_is():
    cache, _ = filled(make(), rows=1)
    with pytest.raises(ModelError, match="has 70 tokens: 71 cannot be removed"):
        cache.crop(-71)


def test_assisted_decoding_rolls_back():
    model = make()
    inputs = prompt(model, rows=1, length=40)
    torch.manual_seed(8)
    assistant = tiny_llama().eval()
    exact = KeyValueScheme(8, "channel", 32, 128)
    expected = model.generate(**inputs, max_new_tokens=20)
    found = model.generate(
        **inputs, max_new_tokens=20, assistant_model=assistant, **{CACHE: key_value_cache(model, exact)}
    )
    assert torch.equal(found, expected)


def test_the_cache_of_a_call_continues_the_next():
    model = make()
    inputs = prompt(model, rows=1, length=40)
    whole = on_loop(model, FOUR, inputs, max_new_tokens=30)
    set_scheme(model.config, FOUR)
    for mode in ("eager", "auto"):
        first = hf_optim.generate(model, **inputs, max_new_tokens=17, mode=mode, return_dict_in_generate=True)
        cache = first[CACHE]
        assert isinstance(cache.layers[0], QuantizedLayer)
        assert cache.get_seq_length() == 40 + 16
        second = hf_optim.generate(model, input_ids=first.sequences, max_new_tokens=13, mode=mode, **{CACHE: cache})
        assert torch.equal(second, whole)


def test_a_session_is_not_shared_between_schemes():
    model = make()
    inputs = prompt(model)
    for scheme in (None, FOUR, SCHEMES["float8"], None):
        set_scheme(model.config, scheme)
        expected = model.generate(**inputs, max_new_tokens=9) if scheme is None else on_loop(
            model, scheme, inputs, max_new_tokens=9)  # fmt: skip
        assert torch.equal(hf_optim.generate(model, **inputs, max_new_tokens=9, mode="eager"), expected)


def test_it_is_reset_and_used_again():
    model = make()
    cache, inputs = filled(model)
    expected = decoded(cache)
    cache.reset()
    assert cache.get_seq_length() == 0
    with torch.no_grad():
        model(**inputs, **{CACHE: cache})
    for now, was in zip(decoded(cache), expected, strict=True):
        assert torch.equal(now, was)


def test_a_layer_grows_without_losing_a_token():
    model = make()
    layer = key_value_cache(model, SCHEMES["int8-per-token"]).layers[0]
    random = torch.Generator().manual_seed(0)
    key, value = (torch.randn(1, 2, 1500, 4, generator=random) for _ in range(2))
    for first in range(0, 1500, 300):
        layer.update(key[:, :, first : first + 300], value[:, :, first : first + 300])
    for now, given in zip(layer.decoded(), (key, value), strict=True):
        assert (now - given).abs().max() < 0.03


# -- settings, and what is refused ------------------------------------------------------------------------------------
def test_the_setting_survives_a_checkpoint_which_stock_transformers_reads(tmp_path):
    model = make()
    set_scheme(model.config, FOUR)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert scheme_of(loaded.config) == FOUR
    inputs = prompt(model)
    plain = loaded.generate(**inputs, max_new_tokens=5, return_dict_in_generate=True)
    assert not any(isinstance(layer, QuantizedLayer) for layer in plain[CACHE].layers)
    found = hf_optim.generate(loaded, **inputs, max_new_tokens=5, mode="eager")
    assert torch.equal(found, on_loop(model, FOUR, inputs, max_new_tokens=5))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (7, "is 7, not a mapping with bits, keys"),
        ({"bits": 5}, r"bits must be one of 4, 8, 'float8', not 5"),
        ({"bits": True}, "bits must be one of"),
        ({"group": 48}, "group must be one of 32, 64, 128, not 48"),
        ({"residual": -1}, "residual must be a number of tokens up to 4096, not -1"),
        ({"residual": 10**9}, "residual must be"),
        ({"kind": "x\x1b[2J"}, "has 'kind'; it has bits"),
        ({"bits": "float8", "symmetric": False}, "float8 has no zero points"),
    ],
)
def test_a_wrong_setting_of_a_checkpoint_is_named(setting, message):
    model = make()
    model.config.hf_optim_key_values = setting
    with pytest.raises(ModelError, match=message):
        hf_optim.generate(model, **prompt(model), max_new_tokens=2)


def test_wrong_schemes():
    for fields in ({"bits": 5}, {"keys": "head"}, {"group": 16}, {"residual": 1.5}, {"symmetric": 2}):
        with pytest.raises(RecipeError, match=next(iter(fields))):
            KeyValueScheme(**fields)


def test_models_without_such_a_cache():
    with pytest.raises(ModelError, match="pass scheme="):
        key_value_cache(make())
    with pytest.raises(ModelError, match="has an encoder"):
        key_value_cache(tiny_t5(), FOUR)
    window = AutoModelForCausalLM.from_config(MistralConfig(**SMALL, sliding_window=6))
    with pytest.raises(ModelError, match="every layer of mistral has a sliding window"):
        key_value_cache(window, FOUR)
    wide = AutoModelForCausalLM.from_config(Qwen3Config(**{**SMALL, "head_dim": 320}))
    with pytest.raises(ModelError, match="more channels"):
        key_value_cache(wide, FOUR)


def test_layers_with_a_window_keep_full_precision():
    cache = key_value_cache(make("gemma3-window-6"), FOUR)
    assert [type(layer) for layer in cache.layers] == [DynamicSlidingWindowLayer, QuantizedLayer]


def test_a_user_s_cache_is_kept():
    model = make()
    set_scheme(model.config, FOUR)
    inputs = prompt(model, rows=1)
    other = key_value_cache(model, SCHEMES["float8"])
    out = hf_optim.generate(model, **inputs, max_new_tokens=4, return_dict_in_generate=True, **{CACHE: other})
    assert out[CACHE].layers[0].scheme == SCHEMES["float8"]


def test_a_static_cache_that_is_too_small():
    cache, _ = filled(make(), rows=2)
    for rows, length in ((2, 64), (1, 128)):
        with pytest.raises(ModelError, match=rf"a cache of 2 x 70 tokens does not fit in one for {rows} x {length}"):
            StaticKeyValues(cache, rows, length).fill(cache)


def test_offloading_is_refused():
    cache, _ = filled(make())
    with pytest.raises(ModelError, match="cannot be offloaded"):
        cache.layers[0].offload()


def test_static_layers_have_the_tokens_of_the_prefill_and_give_them_back():
    cache, _ = filled(make(), rows=2)
    static = StaticKeyValues(cache, 3, 256)
    assert static.fill(cache) == 70
    random = torch.Generator().manual_seed(0)
    both = []
    for layer, mine in zip(cache.layers, static.cache.layers, strict=True):
        heads, size = mine.keys.shape[1], mine.keys.shape[3]
        given = [torch.randn(3, heads, 1, size, generator=random) for _ in range(2)]
        other = copy.deepcopy(layer)
        other.update(*(t[:2] for t in given))
        mine.update(*given)
        both.append(other)
        for a, b in zip(mine.decoded(), other.decoded(), strict=True):
            assert torch.equal(a[:2, :, :71], b)
            assert not a[:, :, 71:].any()
            assert torch.equal(a[2, :, :70], a[0, :, :70])  # the first row pads the bucket
    static.append_to(cache, 70, 71)
    for layer, other in zip(cache.layers, both, strict=True):
        for a, b in zip(layer.decoded(), other.decoded(), strict=True):
            assert torch.equal(a, b)


def test_steps_that_are_tried_are_taken_back():
    """A capture runs the step some times, and sets the number of tokens back."""
    cache, _ = filled(make(), KeyValueScheme(8, "channel", 32, 0), rows=1, length=95)
    static = StaticKeyValues(cache, 1, 256)
    static.fill(cache)
    layer = static.cache.layers[0]
    before = [t.clone() for t in layer.decoded()]
    for _ in range(3):
        layer.update(torch.ones(1, before[0].shape[1], 1, before[0].shape[3]), torch.ones_like(before[1][:, :, :1]))
    assert int(layer.get_seq_length()) == 98
    static.set_tokens(95)
    for now, was in zip(layer.decoded(), before, strict=True):
        assert torch.equal(now, was)


def test_it_is_a_cache_of_this_version():
    cache = key_value_cache(make(), FOUR)
    assert isinstance(cache, Cache)
    assert cache.is_compileable is False
    assert cache.is_sliding == [False, False]
    assert VERSION >= (5, 17)
