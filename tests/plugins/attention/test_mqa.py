"""Shared key/value heads against the model with these heads repeated, in every way they reach a model."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from tiny_models import TINY
from transformers import PreTrainedModel

import hf_optim
from hf_optim import ModelError, RecipeError, run_of
from hf_optim.testing.sweep.checks import build
from hf_optim.toolkit import compat
from hf_optim.toolkit.topology import dummy_inputs

# GPT-BigCode of transformers 5.17 scripts functions when it is imported, of which torch warns.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script`:DeprecationWarning")

SEED = torch.Generator().manual_seed(0)
IDS = torch.randint(3, 60, (2, 11), generator=SEED)
HEADS = 4
# Architecture -> how many key/value heads its tiny model has, and how the result reloads with 1 and with 2.
FAMILIES = {
    "llama": (2, ("STOCK_ARCH", None)),
    "qwen2": (2, ("STOCK_ARCH", None)),
    "mixtral": (2, ("STOCK_ARCH", None)),
    "phi3": (4, ("STOCK_ARCH", "STOCK_ARCH")),
    "qwen3": (4, ("STOCK_ARCH", "STOCK_ARCH")),
    "gpt2": (4, ("STOCK_ARCH", "REMOTE_CODE")),
    "opt": (4, ("REMOTE_CODE", "REMOTE_CODE")),
    "neox": (4, ("REMOTE_CODE", "REMOTE_CODE")),
    "bert": (4, ("REMOTE_CODE", "REMOTE_CODE")),
    "vit": (4, ("REMOTE_CODE", "REMOTE_CODE")),
    "t5": (4, ("REMOTE_CODE", "REMOTE_CODE")),
}
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
SWEPT = {"phi3": "Phi3ForCausalLM", "qwen3": "Qwen3ForCausalLM", "neox": "GPTNeoXForCausalLM"}


def tiny(family: str) -> PreTrainedModel:
    """Return a model in float64 whose parameters, biases too, are random."""
    model = (TINY[family]() if family in TINY else build(SWEPT[family])).double().eval()
    model.config._experts_implementation = "eager"  # the fused ones know no float64
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return model


def projected(model: PreTrainedModel, family: str) -> list[list[torch.Tensor]]:
    """Return views of all keys' and values' weights and biases: for each, one view ``[rows, ...]`` per head.

    Written down by architecture, from its documentation: nothing of the technique is used.
    """
    kv = FAMILIES[family][0]
    names = {"bert": ("key", "value"), "t5": ("k", "v")}.get(family, ("k_proj", "v_proj"))
    found = []
    for name, module in model.named_modules():
        leaf = name.rpartition(".")[2]
        if family in ("gpt2", "phi3", "neox"):
            if leaf not in ("c_attn", "qkv_proj", "query_key_value"):
                continue
            width = model.config.hidden_size // HEADS
            for tensor in (module.weight.T if family == "gpt2" else module.weight, module.bias):
                if tensor is None:
                    continue
                if family == "neox":  # q, k, v of each head in turn
                    by_head = tensor.detach().view(HEADS, 3, width, *tensor.shape[1:])
                    found += [list(by_head[:, part]) for part in (1, 2)]
                else:  # all q, all k, all v
                    parts = tensor.detach().view(3, HEADS, width, *tensor.shape[1:])
                    found += [list(parts[part]) for part in (1, 2)]
        elif leaf in names and not name.startswith("encoder."):
            for tensor in (module.weight, module.bias):
                if tensor is not None:
                    found.append(list(tensor.detach().view(kv, -1, *tensor.shape[1:])))
    assert found
    return found


@torch.no_grad()
def equalize(model: PreTrainedModel, family: str, kv_heads: int) -> PreTrainedModel:
    """Write the mean of each group of heads into all heads of the group."""
    for heads in projected(model, family):
        size = len(heads) // kv_heads
        for first in range(0, len(heads), size):
            mean = torch.stack([h.clone() for h in heads[first : first + size]]).mean(0)
            for head in heads[first : first + size]:
                head.copy_(mean)
    return model


def share(model: PreTrainedModel, kv_heads: int, **fields) -> PreTrainedModel:
    return hf_optim.optimize(model, [{"technique": "mqa", "kv_heads": kv_heads, **fields}])


def inputs_of(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    inputs = dummy_inputs(model)
    if "pixel_values" in inputs:
        return {"pixel_values": torch.randn(2, *inputs["pixel_values"].shape[1:], generator=SEED, dtype=model.dtype)}
    return dict.fromkeys(inputs, IDS)


@torch.no_grad()
def logits(model: PreTrainedModel, **inputs) -> torch.Tensor:
    return model(**inputs).logits


def close(one, other, family, kernel="sdpa"):
    """Return True if equal in float64, except for stock eager softmaxes and norms that always run in float32."""
    single = family in ("mixtral", "qwen3") or kernel == "eager" or family in ("llama", "qwen2", "phi3", "t5")
    return torch.allclose(one, other, rtol=0, atol=1e-5 if single else 1e-12)


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


# -- with other steps -------------------------------------------------------------------------------------------------
def reloaded(folder, cls=transformers.AutoModelForCausalLM):
    """Return the checkpoint, which must have every tensor and no other."""
    model, info = cls.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    return model.eval()


@pytest.mark.parametrize(("family", "kv_heads"), [("llama", 1), ("gpt2", 1), ("opt", 2), ("neox", 1)])
def test_pooled_heads_are_quantized_saved_and_reloaded(family, kv_heads, tmp_path):
    model = TINY[family]() if family in TINY else build(SWEPT[family])
    recipe = [{"technique": "mqa", "kv_heads": kv_heads}, {"technique": "rtn"}]
    made = hf_optim.optimize(model, recipe)
    made.save_pretrained(tmp_path)
    other = reloaded(tmp_path)
    assert torch.equal(logits(other, input_ids=IDS), logits(made, input_ids=IDS))
    with torch.no_grad():
        assert other(IDS, use_cache=True)[compat.CACHE].layers[0].keys.shape[1] == kv_heads
    quantized = {name.rpartition(".weight")[0] for name in other.state_dict() if name.endswith("weight_scale")}
    assert any("v_proj" in name or "c_attn" in name or "query_key_value" in name for name in quantized)


@pytest.mark.many
@pytest.mark.parametrize(("family", "kv_heads"), [("llama", 1), ("gpt2", 1), ("opt", 2), ("neox", 2)])
@pytest.mark.parametrize("pooling", ["mean", "first", "random"])
def test_what_was_pruned_stays_zero(family, kv_heads, pooling):
    model = TINY[family]() if family in TINY else build(SWEPT[family])
    recipe = [
        {"technique": "magnitude", "sparsity": 0.6},
        {"technique": "mqa", "kv_heads": kv_heads, "pooling": pooling},
    ]
    made = hf_optim.optimize(model, recipe)
    run = run_of(made)
    parameters = dict(made.named_parameters())
    assert run.masks
    for name, mask in run.masks.items():
        assert mask.shape == parameters[name].shape
        assert torch.equal(mask, parameters[name] != 0), name
    value = next(name for name in run.masks if "v_proj" in name or "c_attn" in name or "query_key_value" in name)
    share_kept = float(run.masks[value].float().mean())
    assert share_kept > 0.45 if pooling == "mean" else share_kept < 0.5


def test_a_mean_keeps_no_pattern():
    recipe = [{"technique": "nm"}, {"technique": "mqa", "pooling": "mean"}]
    with pytest.raises(RecipeError, match="would destroy sparse-nm"):
        hf_optim.optimize(TINY["llama"](), recipe, calibration=[{"input_ids": IDS}])
    recipe[1]["pooling"] = "first"
    made = hf_optim.optimize(TINY["llama"](), recipe, calibration=[{"input_ids": IDS}])
    weight = made.model.layers[0].self_attn.v_proj.weight
    assert weight.shape == (8, 32)
    assert int((weight.view(8, 8, 4) != 0).sum(-1).max()) == 2


def test_a_window_and_shared_heads_compose():
    made = hf_optim.optimize(TINY["llama"](), [{"technique": "mqa"}, {"technique": "local", "window": 4}])
    assert (made.config.model_type, made.config.sliding_window, made.config.num_key_value_heads) == ("mistral", 4, 1)
    swapped = hf_optim.optimize(TINY["llama"](), [{"technique": "local", "window": 4}, {"technique": "mqa"}])
    assert torch.equal(logits(made, input_ids=IDS), logits(swapped, input_ids=IDS))


# -- refused before work ----------------------------------------------------------------------------------------------
REFUSED = {
    "falcon": ({"new_decoder_architecture": True, "num_kv_heads": 4}, "repeats shared heads before it caches them"),
    "bloom": ({}, "computes its attention itself"),
    "mpt": ({}, "computes its attention itself"),
    "olmo2": ({}, "told apart"),
    "deepseek_v3": ({}, "told apart"),
    "gpt_neo": ({}, "does not take its attention from transformers' AttentionInterface"),
    "clip": ({}, "configuration of its own"),
}
CLASSES = {"bloom": "BloomForCausalLM", "mpt": "MptForCausalLM", "olmo2": "Olmo2ForCausalLM", "clip": "CLIPModel"}
CLASSES |= {"deepseek_v3": "DeepseekV3ForCausalLM", "gpt_neo": "GPTNeoForCausalLM", "falcon": "FalconForCausalLM"}


@pytest.mark.parametrize("name", REFUSED)
def test_other_architectures_are_refused_before_work(name):
    fields, message = REFUSED[name]
    model = build(CLASSES[name])
    if fields:
        for field, value in fields.items():
            setattr(model.config, field, value)
        model = type(model)(model.config).eval()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(ModelError, match=message):
        share(model, 2)
    assert all(torch.equal(model.state_dict()[key], tensor) for key, tensor in before.items())


@pytest.mark.parametrize(
    ("family", "kv_heads", "message"), [("llama", 3, "divisor: 1, 2"), ("opt", 8, "divisor: 1, 2, 4")]
)
def test_a_number_that_does_not_divide_is_refused(family, kv_heads, message):
    with pytest.raises(ModelError, match=message):
        share(TINY[family](), kv_heads)


def test_no_head_is_refused():
    with pytest.raises(RecipeError, match="kv_heads"):
        share(TINY["llama"](), 0)


def test_quantized_models_are_refused():
    quantized = hf_optim.optimize(TINY["llama"](), [{"technique": "rtn"}])
    with pytest.raises(RecipeError, match="quantized"):
        share(quantized, 1)
