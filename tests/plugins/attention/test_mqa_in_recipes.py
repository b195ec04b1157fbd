"""Shared key/value heads with other steps of a recipe, and models that are refused before any work."""

from __future__ import annotations

import textwrap

import pytest
import torch
import transformers
from equal_heads import IDS, SWEPT, logits, share
from tiny_models import TINY

import hf_optim
from hf_optim import ModelError, RecipeError, run_of
from hf_optim.testing.sweep.checks import build
from hf_optim.toolkit import compat

# GPT-BigCode of transformers 5.17 scripts functions when it is imported, of which torch warns.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script`:DeprecationWarning")


# -- with other steps -------------------------------------------------------------------------------------------------
def reloaded(folder, cls=transformers.AutoModelForCausalLM):
    """Return the checkpoint, which must have every tensor and no other."""
    model, info = cls.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    return model.eval()


@pytest.mark.many
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


def test_repeated_rows_need_no_hf_optim(tmp_path, stock_python):
    made = hf_optim.optimize(build(SWEPT["neox"]), [{"technique": "mqa", "kv_heads": 2}, {"technique": "rtn"}])
    made.save_pretrained(tmp_path / "out")
    fields = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    code = textwrap.dedent(f"""
        import torch
        from transformers import AutoModelForCausalLM
        folder, ids = {str(tmp_path / "out")!r}, torch.tensor({IDS.tolist()})
        try:
            AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)
        except ValueError:
            print("refused")
        model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
        with torch.no_grad():
            out = model(ids, use_cache=True)
        cache = out.get("cache", None) or out.past_key_values
        found = {{"logits": out.logits, "tokens": model.generate(ids, **{fields})}}
        torch.save(found, {str(tmp_path / "found.pt")!r})
        print(type(model).__name__, cache.layers[0].keys.shape[1])
    """)
    done = stock_python.copy(code)
    assert done.status == 0, done.err
    assert done.out.split() == ["refused", "MqaGPTNeoXForCausalLM", "2"]
    found = torch.load(tmp_path / "found.pt", weights_only=True)
    assert torch.equal(found["logits"], logits(made, input_ids=IDS))
    assert torch.equal(found["tokens"], made.generate(IDS, **fields))


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


def test_heads_are_shared_before_a_pattern_not_behind_it():
    pattern = {"technique": "transformer_xl", "segment": 3, "memory": 4}
    with pytest.raises(RecipeError, match=r"move mqa before step 1 \(transformer_xl\)"):
        hf_optim.optimize(TINY["llama"](), [pattern, {"technique": "mqa"}])
    model = hf_optim.optimize(TINY["llama"](), [{"technique": "mqa"}, pattern])
    assert model.config.num_key_value_heads == 1


def test_quantized_models_are_refused():
    quantized = hf_optim.optimize(TINY["llama"](), [{"technique": "rtn"}])
    with pytest.raises(RecipeError, match="quantized"):
        share(quantized, 1)


@pytest.mark.parametrize("other", [{"technique": "longformer"}, {"technique": "compressed"}, {"technique": "local"}])
def test_a_second_step_with_code_of_its_own_says_so(other):
    words = rf"\({other['technique']}\): a model of type mqa_bert has code of its own already"
    with pytest.raises(ModelError, match=words):
        hf_optim.optimize(TINY["bert"](), [{"technique": "mqa"}, other])
