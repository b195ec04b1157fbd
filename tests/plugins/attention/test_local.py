"""Local attention against the dense softmax under the boolean mask, in every way it reaches a model."""

from __future__ import annotations

import json
import textwrap

import pytest
import torch
from tiny_models import DECODER, TINY, tiny_bert, tiny_gpt2, tiny_llama, tiny_t5, tiny_vit
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaForCausalLM,
    MistralForCausalLM,
    PreTrainedModel,
)
from transformers.masking_utils import AttentionMaskInterface

import hf_optim
from hf_optim import ModelError, OptimConfig, RecipeError
from hf_optim.lifecycle.stages import start_run
from hf_optim.toolkit import compat, topology
from hf_optim_plugins.attention.local import Local, attended_share

IDS = torch.randint(3, 60, (2, 24), generator=torch.Generator().manual_seed(0))
STOCK = ("llama", "qwen2", "mixtral")
OWN = ("gpt2", "opt", "bert", "vit")


def localize(model, **fields):
    """Call the hooks as the host does for a model in memory, and return the run."""
    recipe = OptimConfig.parse([Local(**fields)])
    run = start_run(recipe, model.config)
    step = recipe.steps[0]
    asked = step.prepare_load(run, {}) or {}
    if "attn_implementation" in asked:
        model.set_attn_implementation(asked["attn_implementation"])
    run.model = model
    run.model = step.transform_model(run)
    return run


def inputs_of(model):
    if model.main_input_name == "input_ids":
        return {"input_ids": IDS}
    shape = topology.dummy_inputs(model)["pixel_values"].shape
    return {"pixel_values": torch.randn(2, *shape[1:], generator=torch.Generator().manual_seed(0), dtype=model.dtype)}


def logits(model, **extra):
    with torch.no_grad():
        return model(**inputs_of(model), **extra).logits


def under_the_mask(model, window, causal):
    """Return the dense model's logits with every softmax under the boolean mask |i - j| < window (and j <= i)."""

    def build(*, batch_size, q_length, kv_length, **kwargs):
        i, j = torch.arange(q_length)[:, None], torch.arange(kv_length)[None]
        seen = ((i - j).abs() < window) & ((j <= i) if causal else torch.ones(1, dtype=torch.bool))
        return seen.expand(batch_size, 1, q_length, kv_length)

    stock = AttentionMaskInterface._global_mapping["sdpa"]
    AttentionMaskInterface._global_mapping["sdpa"] = build
    try:
        return logits(model)
    finally:
        AttentionMaskInterface._global_mapping["sdpa"] = stock


def exact(build):
    model = build().double()
    model.config._experts_implementation = "eager"  # the fused ones know no float64
    return model


def close(one, other, family, kernel="sdpa"):
    """Return True if equal in float64, except for stock eager softmaxes and routers, which always run in float32."""
    single = family == "mixtral" or (family in STOCK and kernel == "eager")
    return torch.allclose(one, other, rtol=0, atol=1e-5 if single else 1e-12)


@pytest.mark.parametrize("family", STOCK + OWN)
@pytest.mark.parametrize("window", [2, 5])
def test_local_attention_equals_masked_dense_attention(family, window):
    expected = under_the_mask(exact(TINY[family]), window, causal=family not in ("bert", "vit"))
    run = localize(exact(TINY[family]), window=window)
    for kernel in ("sdpa", "eager"):  # models with code of their own keep theirs
        run.model.set_attn_implementation(kernel)
        assert close(logits(run.model), expected, family, kernel)
    assert run.record.reload == ("STOCK_ARCH" if family in STOCK else "REMOTE_CODE")


@pytest.mark.parametrize("family", STOCK + OWN)
def test_a_window_as_long_as_the_input_equals_full_attention(family):
    dense = logits(exact(TINY[family]))
    run = localize(exact(TINY[family]), window=24)
    assert close(logits(run.model), dense, family)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_attention_is_causal_and_bounded_by_the_window(family):
    model = localize(exact(TINY[family]), window=3).model
    before, other = logits(model), IDS.clone()
    other[:, 10] = (other[:, 10] + 1) % 60
    with torch.no_grad():
        changed = (model(other).logits - before).abs().amax(-1)[0] > 0
    # Two layers carry what happens at position 10 on to position 10 + 2 * (3 - 1).
    assert changed.nonzero().flatten().tolist() == [10, 11, 12, 13, 14]


def test_an_encoder_sees_both_sides():
    model = localize(exact(lambda: tiny_bert(num_hidden_layers=1)), window=3).model.base_model
    other = IDS.clone()
    other[:, 10] = (other[:, 10] + 1) % 60
    with torch.no_grad():
        changed = (model(other)[0] - model(IDS)[0]).abs().amax(-1)[0] > 0
    assert changed.nonzero().flatten().tolist() == [8, 9, 10, 11, 12]


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "opt"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generation_with_a_cache_equals_generation_without(family, cache):
    model = localize(TINY[family](), window=4).model
    fields = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones_like(IDS)}
    with_cache = model.generate(IDS, cache_implementation=cache, **fields)
    assert torch.equal(with_cache, model.generate(IDS, use_cache=False, **fields))


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_the_cache_is_bounded_by_the_window(family):
    model = localize(TINY[family](), window=4).model
    layer = model(IDS, use_cache=True)[compat.CACHE].layers[0]
    assert layer.keys.shape[-2] == 3


def test_padding_is_still_masked():
    model = localize(tiny_gpt2(), window=6).model
    left = torch.cat([torch.zeros(1, 4, dtype=torch.int64), IDS[:1, :8]], dim=1)
    mask = (torch.arange(12) >= 4).long()[None]
    with torch.no_grad():
        padded = model(left, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp_min(0)).logits[:, 4:]
        assert torch.allclose(padded, model(IDS[:1, :8]).logits, atol=1e-5)


def test_llama_becomes_mistral_with_the_same_weights():
    dense = tiny_llama()
    model = localize(dense, window=7).model
    assert type(model) is MistralForCausalLM
    assert model.config.sliding_window == 7
    assert model.model.layers[1].mlp.up_proj.weight is dense.model.layers[1].mlp.up_proj.weight


def test_layer_types_and_switches_of_a_stock_class():
    config = localize(TINY["qwen2"](), window=7).model.config
    assert (config.use_sliding_window, config.sliding_window) == (True, 7)
    assert config.layer_types == ["sliding_attention"] * 2


def test_a_llama_with_biases_gets_its_own_class():
    expected = under_the_mask(exact(lambda: tiny_llama(attention_bias=True)), 5, causal=True)
    run = localize(exact(lambda: tiny_llama(attention_bias=True)), window=5)
    assert run.record.reload == "REMOTE_CODE"
    assert isinstance(run.model, LlamaForCausalLM)
    assert torch.allclose(logits(run.model), expected, rtol=0, atol=1e-12)


def test_a_stock_class_that_is_not_exact_and_has_soft_caps_is_refused():
    # Gemma 2 alternates layers with and without a window, and softcaps its scores.
    fields = {**DECODER, "head_dim": 8, "sliding_window": 4, "attn_implementation": "eager"}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Gemma2ForCausalLM(Gemma2Config(**fields)).eval()
    with pytest.raises(ModelError, match=r"Gemma2ForCausalLM cannot compute a pattern: .* soft cap"):
        localize(model, window=24)
    assert type(model) is Gemma2ForCausalLM


def test_an_implementation_of_stock_classes_is_refused_for_others():
    with pytest.raises(ModelError, match=r"GPT2LMHeadModel with a window .* leave out implementation=eager"):
        localize(tiny_gpt2(), window=4, implementation="eager")


def test_report():
    report = localize(tiny_gpt2(), window=4).record.steps["0"]
    assert report["window"] == 4
    assert report["layers"] == 2
    assert report["context"] == 64
    assert report["share_of_attention"] == attended_share(64, 4, causal=True)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [2, 5, 9, 20])
def test_the_share_counts_pairs(window, causal):
    i, j = torch.arange(9)[:, None], torch.arange(9)[None]
    allowed = (j <= i) if causal else torch.ones(9, 9, dtype=torch.bool)
    inside = allowed & ((i - j).abs() < window)
    assert attended_share(9, window, causal) == pytest.approx(float(inside.sum() / allowed.sum()), rel=1e-6)


def test_encoder_decoders_are_refused_and_unchanged():
    model = tiny_t5()
    with pytest.raises(ModelError, match=r"step 1 \(local\): t5 has cross-attention"):
        localize(model, window=4)
    assert model.config._attn_implementation == "sdpa"


def test_fields_are_checked():
    with pytest.raises(RecipeError, match="window"):
        Local(window=1)
    with pytest.raises(RecipeError, match="implementation must be"):
        Local(window=4, implementation="flex_atention")


def test_through_optimize_and_from_pretrained(tmp_path):
    tiny_gpt2().save_pretrained(tmp_path)
    recipe = [{"technique": "local", "window": 4}]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, optim_config=recipe).eval()
    chosen = AutoModelForCausalLM.from_pretrained(tmp_path, optim_config=recipe, attn_implementation="eager").eval()
    made = hf_optim.optimize(tiny_gpt2(), recipe)
    assert type(loaded) is type(made) is type(chosen)
    assert chosen.config._attn_implementation == made.config._attn_implementation  # whatever a caller asks for
    assert torch.equal(logits(loaded), logits(made))
    assert torch.allclose(logits(chosen), logits(made), atol=1e-5)
    assert hf_optim.run_of(made).record.reload == "REMOTE_CODE"


def test_a_stock_arch_checkpoint_needs_no_other_code(tmp_path, stock_python):
    model = localize(tiny_llama(), window=4).model
    PreTrainedModel.save_pretrained(model, tmp_path)
    code = textwrap.dedent(f"""
        import torch
        from transformers import AutoModelForCausalLM
        model = AutoModelForCausalLM.from_pretrained({str(tmp_path)!r}).eval()
        ids = torch.randint(3, 60, (2, 24), generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            torch.save(model(ids).logits, {str(tmp_path / "logits.pt")!r})
        print(type(model).__name__, model.config.sliding_window)
    """)
    done = stock_python.copy(code)
    assert done.status == 0, done.err
    assert done.out.split() == ["MistralForCausalLM", "4"]
    assert torch.equal(torch.load(tmp_path / "logits.pt", weights_only=True), logits(model))


def test_vit_keeps_its_class_hierarchy():
    dense = tiny_vit()
    kind = type(dense)
    assert isinstance(localize(dense, window=2).model, kind)


# -- windows by layer -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_layers_keep_full_attention_by_index(family):
    run = localize(exact(TINY[family]), window=3, full_layers=(1,))
    assert run.record.reload == "STOCK_ARCH"
    assert run.model.config.layer_types == ["sliding_attention", "full_attention"]
    # Two windows would carry what happens at position 4 on to position 8; the second layer sees the whole past.
    before, other = logits(run.model), IDS.clone()
    other[:, 4] = (other[:, 4] + 1) % 60
    with torch.no_grad():
        changed = (run.model(other).logits - before).abs().amax(-1)[0] > 0
    assert changed[4:].all()
    assert not changed[:4].any()
    every = localize(exact(TINY[family]), window=3, full_layers=(0, 1))
    assert torch.equal(logits(every.model), logits(exact(TINY[family])))


def test_generation_with_windows_by_layer_equals_generation_without_a_cache():
    model = localize(tiny_llama(), window=4, full_layers=(0,)).model
    fields = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones_like(IDS)}
    assert torch.equal(model.generate(IDS, **fields), model.generate(IDS, use_cache=False, **fields))


@pytest.mark.parametrize("family", ["gpt2", "bert"])
def test_windows_by_layer_where_no_class_has_them(family):
    model = localize(exact(TINY[family]), window=3, full_layers=(1,)).model.base_model
    other = IDS.clone()
    other[:, 10] = (other[:, 10] + 1) % 60
    with torch.no_grad():
        first, second = ((model(ids, output_hidden_states=True).hidden_states) for ids in (IDS, other))
    reached = [(a - b).abs().amax(-1)[0] > 0 for a, b in zip(first, second, strict=True)]
    assert reached[1].nonzero().flatten().tolist() == ([10, 11, 12] if family == "gpt2" else [8, 9, 10, 11, 12])
    assert reached[2][12:].all()
    assert bool(reached[2][0]) == (family == "bert")
    every = localize(exact(TINY[family]), window=3, full_layers=(0, 1)).model
    assert torch.allclose(logits(every), logits(exact(TINY[family])), rtol=0, atol=1e-12)


def test_a_configuration_with_full_layers_that_are_not_there_does_not_load(tmp_path):
    localize(tiny_gpt2(), window=3, full_layers=(1,)).model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    config["attention_pattern"]["full_layers"] = [2]
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match="full_layers up to 2, and the model 2 layers"):
        AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True)


def test_full_layers_are_layers_of_the_model():
    for model, layers, words in [
        (tiny_llama(), (2,), r"full_layers are different layers of the 2 of the model, counted from 0, not \[2\]"),
        (tiny_llama(), (-1,), "full_layers are different layers"),
        (tiny_llama(), (1, 1), "full_layers are different layers"),
    ]:
        with pytest.raises(ModelError, match=words):
            hf_optim.optimize(model, [{"technique": "local", "window": 4, "full_layers": layers}])


@pytest.mark.parametrize("builder", [tiny_gpt2, tiny_bert, tiny_llama])
def test_a_model_with_a_pattern_is_told_that_it_has_one(builder):
    model = hf_optim.optimize(builder(), [{"technique": "blockwise", "block": 8}])
    with pytest.raises(ModelError, match=r"^here: the attention of this blockwise_\w+ model has a pattern already"):
        Local(window=4).check_model(model, "here")
    with pytest.raises(ModelError, match=r"\(local\): the attention of this blockwise_\w+ model has a pattern already"):
        localize(model, window=4)
