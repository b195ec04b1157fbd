"""What the techniques with one pattern have in common: where they reach, what they refuse, how their models reload."""

from __future__ import annotations

import json
import sys
import textwrap

import pytest
import tiny_mixtures
import torch
from pattern_oracle import difference, hidden_and_gradients, inputs_of, model_of, use_blocks
from peft import LoraConfig, get_peft_model
from tiny_models import TINY, tiny_bert, tiny_gpt2, tiny_llama, tiny_t5
from transformers import (
    AlbertConfig,
    AlbertModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    BertConfig,
    BertLMHeadModel,
    BertModel,
    BloomConfig,
    BloomForCausalLM,
    FalconConfig,
    FalconForCausalLM,
    MptConfig,
    MptForCausalLM,
    PreTrainedModel,
    T5EncoderModel,
    Trainer,
    TrainingArguments,
)

import hf_optim
from hf_optim import ModelError, RecipeError, remote_code, run_of

STEPS = {
    "blockwise": {"block": 8, "shifts": [0, 1]},
    "dilated": {"window": 3, "dilation": [1, 2, 3, 3]},
    "sparse_transformer": {"stride": 6, "vertices": 2, "steps": "heads"},
    "strided": {"stride": 5, "window": 2},
}
NAMES = list(STEPS)
IDS = torch.randint(3, 60, (2, 24), generator=torch.Generator().manual_seed(0))


def step(name):
    return {"technique": name, **STEPS[name]}


def logits(model, ids=IDS, **inputs):
    with torch.no_grad():
        return model(ids, **inputs).logits


@pytest.mark.many(every=4)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("family", ["gpt2", "llama", "opt"])
def test_no_token_sees_a_later_one(name, family, monkeypatch):
    model = hf_optim.optimize(TINY[family](), [step(name)])
    use_blocks(monkeypatch, model)
    before = logits(model)
    for place in (0, 7, 8, 17, 23):
        other = IDS.clone()
        other[:, place] = (other[:, place] + 1) % 60
        after = logits(model, other)
        assert torch.equal(after[:, :place], before[:, :place])
        assert not torch.equal(after[:, place], before[:, place])


@pytest.mark.parametrize("name", NAMES)
def test_generation_with_a_cache_equals_generation_without(name):
    model = hf_optim.optimize(tiny_llama(), [step(name)])
    padded, mask = IDS.clone(), torch.ones_like(IDS)
    mask[0, :5] = 0
    fields = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "attention_mask": mask, "pad_token_id": 0}
    cached = model.generate(padded, **fields)
    assert torch.equal(cached, model.generate(padded, use_cache=False, **fields))
    alone = model.generate(padded[:1, 5:], **{**fields, "attention_mask": mask[:1, 5:]})
    assert torch.equal(cached[:1, 5:], alone)


def test_an_encoder_makes_no_cache(monkeypatch):
    # The configuration of BERT has use_cache, and its forward an argument for a cache: for its form as a decoder.
    model = hf_optim.optimize(BertModel(tiny_bert().config), [{"technique": "blockwise", "block": 8}]).eval()
    code = sys.modules[type(model).__module__]
    made = []
    monkeypatch.setattr(code.PatternLayer, "__init__", lambda self, **_: made.append(self))
    model(torch.arange(3, 20)[None])
    assert model.config.use_cache
    assert not made
    decoder = hf_optim.optimize(tiny_llama(), [{"technique": "blockwise", "block": 8}])
    assert decoder(torch.arange(3, 20)[None]).past_key_values is not None


@pytest.mark.parametrize("name", NAMES)
def test_a_checkpoint_runs_in_a_process_without_hf_optim(name, tmp_path, stock_python):
    model = hf_optim.optimize(tiny_gpt2(), [step(name)])
    model.save_pretrained(tmp_path)
    assert run_of(model).record.reload == "REMOTE_CODE"
    code = textwrap.dedent(f"""
        import torch
        from transformers import AutoModelForCausalLM
        model = AutoModelForCausalLM.from_pretrained({str(tmp_path)!r}, trust_remote_code=True).eval()
        ids = torch.randint(3, 60, (2, 24), generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            torch.save(model(ids).logits, {str(tmp_path / "logits.pt")!r})
        print(type(model).__name__)
    """)
    done = stock_python.copy(code)
    assert done.status == 0, done.err
    assert done.out.split() == [type(model).__name__]
    assert torch.equal(torch.load(tmp_path / "logits.pt", weights_only=True), logits(model))


def test_a_checkpoint_runs_with_the_code_of_the_installed_technique(tmp_path):
    model = hf_optim.optimize(tiny_gpt2(), [step("strided")])
    model.save_pretrained(tmp_path)
    remote_code.register("strided_gpt2")
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize(
    ("name", "field", "value", "message"),
    [
        ("blockwise", "block", 0, "block=0, not a whole number from 1"),
        ("blockwise", "shifts", [0, -1], "shifts=-1"),
        ("strided", "stride", 65, "stride=65, not a whole number from 1 to 64"),
        ("dilated", "window", 0, "window=0, not a whole number from 2"),
        ("dilated", "dilation", [1, 2], "dilations for 2 heads, but a layer has 4"),
        ("sparse_transformer", "stride", True, "stride=True"),
        ("sparse_transformer", "vertices", 7, "vertices=7, not a whole number from 1 to 6"),
        ("sparse_transformer", "steps", "both", "steps='both', not one of heads, layers, merged"),
    ],
)
def test_a_changed_configuration_is_refused_when_the_model_is_made(name, field, value, message, tmp_path):
    model = hf_optim.optimize(tiny_gpt2(), [step(name)])
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["attention_pattern"][field] = value
    (tmp_path / "config.json").write_text(json.dumps(config))
    remote_code.register(f"{name}_gpt2")
    with pytest.raises(ValueError, match=message):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_training_through_trainer_moves_every_weight(tmp_path):
    model = hf_optim.optimize(tiny_llama(), [step("sparse_transformer")])
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    rows = [{"input_ids": row, "labels": row} for row in IDS]
    settings = TrainingArguments(tmp_path, max_steps=2, report_to=[], use_cpu=True, save_strategy="no")
    Trainer(model=model, args=settings, train_dataset=rows).train()
    assert all(not torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize(
    "other",
    [
        {"technique": "rtn", "bits": 4, "group_size": 16},
        {"technique": "magnitude", "sparsity": 0.5},
        {"technique": "gptq", "bits": 4, "group_size": 16},
    ],
)
def test_it_composes_with_compression(other, tmp_path):
    model = hf_optim.optimize(tiny_llama(), [step("strided"), other], calibration=[{"input_ids": IDS}])
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True).eval()
    assert type(again).__name__ == "StridedLlamaForCausalLM"
    assert torch.allclose(logits(again), logits(model), atol=1e-6)


def test_it_composes_with_lora():
    model = hf_optim.optimize(tiny_llama(), [step("dilated")])
    before = logits(model)
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj", "v_proj"], r=2, task_type="CAUSAL_LM"))
    assert torch.equal(logits(adapted), before)
    adapted(input_ids=IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None for p in adapted.parameters() if p.requires_grad)


def test_two_owners_of_attention_are_refused():
    for other in ({"technique": "local", "window": 4}, step("blockwise")):
        for steps in ([step("strided"), other], [other, step("strided")]):
            with pytest.raises(RecipeError):
                hf_optim.optimize(tiny_llama(), steps)


SMALL = {"hidden_size": 32, "vocab_size": 64}
OFF = {
    "falcon": lambda: FalconForCausalLM(FalconConfig(**SMALL, num_hidden_layers=1, num_attention_heads=4)),
    "bloom": lambda: BloomForCausalLM(BloomConfig(**SMALL, n_layer=1, n_head=4)),
    "mpt": lambda: MptForCausalLM(MptConfig(d_model=32, vocab_size=64, n_layers=1, n_heads=4)),
}


@pytest.mark.parametrize("family", OFF)
def test_models_off_the_interface_are_named_and_refused_unchanged(family):
    model = OFF[family]().eval()
    kind = type(model)
    with pytest.raises(ModelError, match=f"{kind.__name__} does not take its attention from transformers'"):
        hf_optim.optimize(model, [step("strided")])
    assert type(model) is kind
    assert not hasattr(model.config, "attention_pattern")


def test_encoder_decoders_are_refused():
    with pytest.raises(ModelError, match="t5 has cross-attention"):
        hf_optim.optimize(tiny_t5(), [step("strided")])


def test_the_encoder_of_t5_keeps_its_position_bias():
    model = T5EncoderModel(tiny_t5().config).double().eval()
    mask = torch.ones_like(IDS)
    mask[1, :6] = 0
    inputs = {"input_ids": IDS, "attention_mask": mask}
    place = torch.arange(24)
    near = (place[:, None] - place[None, :]) % 5 == 0
    near |= (place[:, None] - place[None, :]).abs() < 2
    expected = hidden_and_gradients(masked(T5EncoderModel(model.config), model, near), inputs)
    converted = hf_optim.optimize(model, [step("strided")])
    assert difference(hidden_and_gradients(converted, inputs), expected) < 1e-9


@pytest.mark.parametrize("name", ["strided", "adaptive_span"])
def test_the_encoder_of_t5_loads_with_a_pattern_and_all_of_t5_is_refused_before_it_is_read(name, tmp_path):
    PreTrainedModel.save_pretrained(tiny_t5(), tmp_path)
    one = step("strided") if name == "strided" else {"technique": "adaptive_span", "max_span": 16, "init": 0.5}
    loaded = T5EncoderModel.from_pretrained(tmp_path, optim_config=[one]).eval()
    assert type(loaded).__name__ in ("StridedT5EncoderModel", "AdaptiveSpanT5EncoderModel")
    with torch.no_grad():
        assert loaded(IDS)[0].isfinite().all()
    with pytest.raises(ModelError, match="t5 has cross-attention"):
        AutoModelForSeq2SeqLM.from_pretrained(tmp_path, optim_config=[one])


def masked(copy, model, near):
    """Return a copy of a T5 encoder whose position bias is minus infinity where ``near`` is False."""
    copy.load_state_dict(model.state_dict())
    bias = copy.encoder.block[0].layer[0].SelfAttention
    stock = bias.compute_bias
    bias.compute_bias = lambda *args, **kwargs: stock(*args, **kwargs).masked_fill(~near, -1e9)
    return copy.double().eval()


def test_autocast_keeps_the_dtype_of_pytorchs_attention(monkeypatch):
    model = hf_optim.optimize(tiny_llama(), [step("strided")])
    dense = logits(model)
    use_blocks(monkeypatch, model)
    with torch.autocast("cpu", torch.bfloat16):
        found = logits(model)
    assert (found - dense).abs().max() < 0.05


def test_bfloat16_over_blocks(monkeypatch):
    inputs, _ = inputs_of("llama")
    exact = hf_optim.optimize(model_of("llama"), [step("sparse_transformer")])
    expected, _ = hidden_and_gradients(exact, inputs)
    half = exact.to(torch.bfloat16)
    dense, _ = hidden_and_gradients(half, inputs)
    use_blocks(monkeypatch, half)
    found, grads = hidden_and_gradients(half, inputs)
    assert (found - expected).abs().mean() < 1.2 * (dense - expected).abs().mean()
    assert all(torch.isfinite(grad).all() for grad in grads.values())


def test_a_model_loads_with_a_pattern(tmp_path):
    PreTrainedModel.save_pretrained(tiny_gpt2(), tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, optim_config=[step("dilated")]).eval()
    assert torch.equal(logits(loaded), logits(hf_optim.optimize(tiny_gpt2(), [step("dilated")])))
    with pytest.raises(ModelError, match="stride=99"):
        AutoModelForCausalLM.from_pretrained(tmp_path, optim_config=[{"technique": "strided", "stride": 99}])


def test_a_pattern_that_differs_by_layer_needs_an_attention_for_each_layer():
    config = AlbertConfig(
        vocab_size=64, embedding_size=16, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=64,
    )  # fmt: skip
    steps = [
        {"technique": "axial", "columns": 4, "axes": "layers"},
        {"technique": "sparse_transformer", "stride": 6, "vertices": 2, "steps": "layers"},
        {"technique": "big_bird", "block": 4, "random": 1},
        {"technique": "longformer", "window": 4, "dilations": [1, 2]},
        {"technique": "dilated", "window": 3, "dilation": [1, 2], "by": "layer"},
    ]
    for each in steps:
        model = AlbertModel(config).eval()
        with pytest.raises(ModelError, match=f"{each['technique']}\\): AlbertModel shares one attention between"):
            hf_optim.optimize(model, [each])
        assert type(model) is AlbertModel
        assert not hasattr(model.config, "attention_pattern")
    hf_optim.optimize(AlbertModel(config).eval(), [step("sparse_transformer")])


@pytest.mark.parametrize(
    "removal",
    [{"technique": "structured", "layers": 1, "score": "magnitude"}, {"technique": "distilbert", "layers": [1]}],
)
def test_layers_whose_patterns_differ_are_removed_before(removal):
    for build, pattern in (
        (tiny_bert, {"technique": "big_bird", "block": 4, "random": 1}),
        (tiny_gpt2, {"technique": "longformer", "window": 4, "dilations": [1, 2]}),
        (tiny_gpt2, {"technique": "dilated", "window": 3, "dilation": [1, 2], "by": "layer"}),
    ):
        with pytest.raises(ModelError, match=rf"{removal['technique']}\): the attention pattern differs between"):
            hf_optim.optimize(build(), [pattern, removal])
    again = hf_optim.optimize(hf_optim.optimize(tiny_bert(), [removal]), [{"technique": "big_bird", "block": 4}])
    assert again.config.num_hidden_layers == 1
    shorter = hf_optim.optimize(tiny_gpt2(), [step("blockwise"), removal])
    assert shorter.config.num_hidden_layers == 1
    assert logits(shorter).isfinite().all()


DECODER = BertConfig(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, is_decoder=True
)


@pytest.mark.parametrize("fields", [
    {"technique": "big_bird"}, {"technique": "longformer", "global_token_ids": [7]},
    {"technique": "longformer", "global_projections": True}, {"technique": "etc", "global_token_ids": [7]},
])  # fmt: skip
def test_what_needs_the_whole_row_is_refused_for_causal_models_by_the_check(fields):
    one = hf_optim.OptimConfig.parse([fields]).steps[0]
    with pytest.raises(ModelError) as in_check:
        one.check_model(tiny_gpt2() if "global_projections" not in fields else BertLMHeadModel(DECODER), "step 1")
    assert str(in_check.value).startswith("step 1: ")
    assert "is causal" in str(in_check.value)
    one.check_model(tiny_bert(), "step 1")


@pytest.mark.parametrize("fields", [{"technique": "big_bird"}, {"technique": "longformer", "global_token_ids": [7]}])
def test_the_check_and_the_run_refuse_in_the_same_words(fields):
    with pytest.raises(ModelError) as in_run:
        hf_optim.optimize(tiny_gpt2(), [fields])
    with pytest.raises(ModelError) as in_check:
        hf_optim.OptimConfig.parse([fields]).steps[0].check_model(tiny_gpt2(), f"step 1 ({fields['technique']})")
    assert str(in_check.value) == str(in_run.value)


@pytest.mark.parametrize("step", [{"technique": "dilated"}, {"technique": "rfa", "features": 6}], ids=str)
def test_latent_attention_is_refused_since_its_cache_holds_no_keys(step):
    with pytest.raises(ModelError, match="computes its keys from what it has cached"):
        hf_optim.optimize(tiny_mixtures.build("deepseek_v3"), step)
