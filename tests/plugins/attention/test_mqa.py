"""Shared key/value heads against the model with these heads repeated, in every way they reach a model."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from equal_heads import FAMILIES, HEADS, IDS, close, equalize, inputs_of, logits, projected, share, tiny
from tiny_models import TINY

import hf_optim
from hf_optim import run_of
from hf_optim.testing.sweep.checks import build
from hf_optim.toolkit import compat
from hf_optim.toolkit.topology import dummy_inputs

# GPT-BigCode of transformers 5.17 scripts functions when it is imported, of which torch warns.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script`:DeprecationWarning")

CASES = [(f, kv) for f, (_, levels) in FAMILIES.items() for kv, level in zip((1, 2), levels, strict=True) if level]
FAST = [
    ("llama", 1),
    ("phi3", 2),
    ("qwen3", 1),
    ("gpt2", 1),
    ("gpt2", 2),
    ("opt", 2),
    ("neox", 2),
    ("bert", 1),
    ("t5", 2),
]


@pytest.mark.many
@pytest.mark.parametrize(
    ("family", "kv_heads"), [case if case in FAST else pytest.param(*case, marks=pytest.mark.slow) for case in CASES]
)
def test_it_equals_the_model_with_the_pooled_heads_repeated(family, kv_heads):
    model = tiny(family)
    inputs = inputs_of(model)
    made = share(tiny(family), kv_heads)
    for kernel in ("sdpa", "eager"):
        expected = equalize(tiny(family), family, kv_heads)
        expected.set_attn_implementation(kernel)
        made.set_attn_implementation(kernel)
        assert close(logits(made, **inputs), logits(expected, **inputs), family, kernel)
    assert run_of(made).record.reload == FAMILIES[family][1][kv_heads - 1]
    assert not close(logits(made, **inputs), logits(model, **inputs), family)


@pytest.mark.many
@pytest.mark.parametrize(("family", "kv_heads"), [("opt", 1), ("neox", 2), ("phi3", 2)])
def test_gradients_are_the_sums_over_the_heads_that_were_made_equal(family, kv_heads):
    repeated, shared = equalize(tiny(family), family, kv_heads), share(tiny(family), kv_heads)
    before = {name: parameter.detach().clone() for name, parameter in repeated.named_parameters()}
    inputs = inputs_of(repeated)
    labels = {"labels": IDS}
    for model in (repeated, shared):
        inputs.pop("decoder_input_ids", None)
        model(**inputs, **labels).loss.backward()
        torch.optim.SGD(model.parameters(), lr=1.0).step()
    # One step of gradient descent with the summed gradient moves a shared head as far as all of its copies together.
    for heads, old in zip(projected(repeated, family), _of(before, repeated, family), strict=True):
        size = len(heads) // kv_heads
        for first in range(0, len(heads), size):
            moved = sum(h - o for h, o in zip(heads[first : first + size], old[first : first + size], strict=True))
            for head, was in zip(heads[first : first + size], old[first : first + size], strict=True):
                head.copy_(was + moved)
    with torch.no_grad():
        assert close(logits(shared, **inputs_of(shared)), logits(repeated, **inputs_of(repeated)), family)


def _of(values, model, family):
    """Return the views of ``projected`` on other values of the parameters."""
    now = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(values[name])
        found = [[head.clone() for head in heads] for heads in projected(model, family)]
        for name, parameter in model.named_parameters():
            parameter.copy_(now[name])
    return found


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_the_present_number_of_heads_changes_nothing(family):
    model = TINY[family]()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    made = share(model, FAMILIES[family][0])
    assert type(made) is type(TINY[family]())
    assert made.state_dict().keys() == before.keys()
    assert all(torch.equal(made.state_dict()[name], tensor) for name, tensor in before.items())


@pytest.mark.many
@pytest.mark.parametrize(("family", "kv_heads"), [("llama", 1), ("phi3", 2), ("gpt2", 1), ("gpt2", 2), ("opt", 1)])
def test_the_cache_holds_the_shared_heads_alone(family, kv_heads):
    made = share(tiny(family), kv_heads)
    with torch.no_grad():
        layers = made(IDS, use_cache=True)[compat.CACHE].layers
    held = [tensor for layer in layers for tensor in (layer.keys, layer.values)]
    assert {tuple(tensor.shape[:3]) for tensor in held} == {(2, kv_heads, 11)}
    config = made.config
    per_token = 2 * len(layers) * kv_heads * (config.hidden_size // HEADS) * 8
    assert sum(tensor.numel() * tensor.element_size() for tensor in held) == 2 * 11 * per_token
    step = run_of(made).recipe.steps[0]
    assert run_of(made).reported(step)["cache_bytes_after"] == per_token


@pytest.mark.many
@pytest.mark.parametrize(("family", "cache"), [("gpt2", "dynamic"), ("opt", "static"), ("neox", "dynamic")])
def test_generation_with_a_cache_equals_generation_without(family, cache):
    made = share(tiny(family), 2)
    ids = IDS.clone()
    mask = torch.ones_like(ids)
    mask[0, :4] = 0  # left padding
    fields = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "attention_mask": mask, "pad_token_id": 0}
    with_cache = made.generate(ids, cache_implementation=cache, **fields)
    assert torch.equal(with_cache, made.generate(ids, use_cache=False, **fields))


def test_an_encoder_decoder_generates_as_with_the_heads_repeated():
    fields = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "num_beams": 2}
    made, expected = share(tiny("t5"), 1), equalize(tiny("t5"), "t5", 1)
    assert torch.equal(made.generate(IDS, **fields), expected.generate(IDS, **fields))
    with torch.no_grad():
        cache = made(input_ids=IDS, decoder_input_ids=IDS, use_cache=True)[compat.CACHE]
    assert {part.layers[0].keys.shape[1] for part in (cache.self_attention_cache, cache.cross_attention_cache)} == {1}


@pytest.mark.slow
def test_copies_of_cross_attention_are_dropped_from_its_cache_too():
    model = build("WhisperForConditionalGeneration").double()
    sound = dummy_inputs(model)["input_features"]
    made = share(model, 2)
    entries = made.config.mqa["modules"].values()
    assert {entry["kind"] for entry in entries} == {"repeat", "attention"}  # the class fixes the number of heads
    fields = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    assert torch.equal(made.generate(sound, **fields), made.generate(sound, use_cache=False, **fields))
    with torch.no_grad():
        cache = made(input_features=sound, decoder_input_ids=IDS[:1, :4], use_cache=True)[compat.CACHE]
    assert {part.layers[0].keys.shape[1] for part in (cache.self_attention_cache, cache.cross_attention_cache)} == {2}


@pytest.mark.slow
def test_the_encoder_of_an_encoder_decoder_is_converted_if_asked():
    names = "encoder.block.0.layer.0.SelfAttention.k", "decoder.block.0.layer.1.EncDecAttention.k"
    models = [share(TINY["t5"](), 1, encoder=asked) for asked in (False, True)]
    assert [model.get_submodule(name).out_features for model in models for name in names] == [32, 8, 8, 8]


def test_gpt2_with_equal_heads_is_gpt_bigcode_to_the_bit():
    expected = equalize(TINY["gpt2"](), "gpt2", 1)
    made = share(equalize(TINY["gpt2"](), "gpt2", 1), 1)
    assert isinstance(made, transformers.GPTBigCodeForCausalLM)
    assert torch.equal(logits(made, input_ids=IDS), logits(expected, input_ids=IDS))


def test_gpt2_beyond_gpt_bigcode_gets_its_own_code():
    model = TINY["gpt2"]()
    model.config.scale_attn_by_inverse_layer_idx = True
    model = type(model)(model.config).eval()
    assert type(share(model, 1)).__name__ == "MqaGPT2LMHeadModel"


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_other_ways_of_pooling(family):
    before = [[head.clone() for head in heads] for heads in projected(tiny(family), family)]
    first = share(tiny(family), 1, pooling="first")
    names = ("k_proj", "v_proj") if family == "llama" else ("k_proj.linear", "v_proj.linear")
    kept = [
        p.detach() for n, m in first.named_modules() if n.endswith(names) for p in (m.weight, m.bias) if p is not None
    ]
    assert all(torch.equal(one, heads[0]) for one, heads in zip(kept, before, strict=True))
    drawn = [share(tiny(family), 1, pooling="random", seed=seed) for seed in (0, 0, 1)]
    one, same, other = (logits(model, input_ids=IDS) for model in drawn)
    assert torch.equal(one, same)
    assert not torch.allclose(one, other)
    weight = drawn[0].get_parameter(f"model.{'decoder.' * (family == 'opt')}layers.0.self_attn.{names[0]}.weight")
    assert float(weight.detach().std()) == pytest.approx(0.02, rel=0.2)


def test_our_generate_gives_the_same_tokens():
    made = share(tiny("neox").float(), 2)
    fields = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(IDS)}
    assert torch.equal(hf_optim.generate(made, IDS, mode="eager", **fields), made.generate(IDS, **fields))


@pytest.mark.slow
def test_a_step_that_drops_copies_is_one_graph():
    made = share(tiny("opt"), 1)
    compiled = torch.compile(made, backend="eager", fullgraph=True)
    assert torch.equal(logits(compiled, input_ids=IDS, use_cache=False), logits(made, input_ids=IDS, use_cache=False))


@pytest.mark.many
@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("k_proj", {"rows": 10**9}),
        ("k_proj", {"heads": 3}),
        ("k_proj", {"parts": [[10**9, True]]}),
        ("k_proj", {"kind": "other"}),
        ("k_proj", {"kind": "attention"}),
        ("self_attn", {"groups": 0}),
    ],
)
def test_a_configuration_that_does_not_fit_is_refused(name, change, tmp_path):
    made = share(TINY["opt"](), 2)
    made.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    entries = config["mqa"]["modules"]
    next(entry for key, entry in entries.items() if key.endswith(name)).update(change)
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"config\.mqa does not describe"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True)
