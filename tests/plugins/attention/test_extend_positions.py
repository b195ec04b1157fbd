"""Longer positions: tables by copying and interpolation, rotary ones by scaling, in models that stay stock."""

from __future__ import annotations

import math
import textwrap

import pytest
import torch
from tiny_models import DECODER, tiny_bert, tiny_gpt2, tiny_llama, tiny_opt, tiny_t5, tiny_vit
from tiny_tokenizer import tiny_tokenizer
from transformers import (
    AutoTokenizer,
    BloomConfig,
    BloomForCausalLM,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    FalconConfig,
    FalconForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
)

import hf_optim
from hf_optim import ModelError, RecipeError, optimize

SHAPE = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}


def seeded(cls, config):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return cls(config).eval()


def tiny_roberta():
    """Return a RoBERTa of 64 positions: its table has two rows more, and so has ``max_position_embeddings``."""
    config = RobertaConfig(**SHAPE, max_position_embeddings=66, pad_token_id=1, bos_token_id=0, eos_token_id=2)
    return seeded(RobertaForSequenceClassification, config)


def tiny_distilbert():
    config = DistilBertConfig(
        vocab_size=64, dim=32, n_layers=2, n_heads=4, hidden_dim=48, max_position_embeddings=64, num_labels=3
    )
    return seeded(DistilBertForSequenceClassification, config)


# Builder, name of the table, rows before the first position, and max_position_embeddings for 150 positions.
TABLES = {
    "bert": (tiny_bert, "bert.embeddings.position_embeddings", 0, 150),
    "roberta": (tiny_roberta, "roberta.embeddings.position_embeddings", 2, 152),
    "distilbert": (tiny_distilbert, "distilbert.embeddings.position_embeddings", 0, 150),
    "gpt2": (tiny_gpt2, "transformer.wpe", 0, 150),
    "opt": (tiny_opt, "model.decoder.embed_positions", 2, 150),
}


def ids(length, rows=2):
    return torch.randint(3, 60, (rows, length), generator=torch.Generator().manual_seed(length))


def extended(model, *more, **fields):
    return hf_optim.optimize(model, [{"technique": "extend_positions", "length": 150, **fields}, *more])


@pytest.mark.many(every=4)
@pytest.mark.parametrize("family", TABLES)
def test_copying_changes_nothing_up_to_the_old_length_and_repeats_after_it(family):
    build, name, offset, configured = TABLES[family]
    dense, model = build(), extended(build())
    assert type(model) is type(dense)
    assert model.config.max_position_embeddings == configured
    old, new = dense.get_submodule(name).weight, model.get_submodule(name).weight
    assert torch.equal(new[:offset], old[:offset])
    for i in range(150):
        assert torch.equal(new[offset + i], old[offset + i % 64])
    mask = torch.ones(2, 64, dtype=torch.int64)
    mask[1, 50:] = 0
    with torch.no_grad():
        assert torch.equal(model(ids(64)).logits, dense(ids(64)).logits)
        given = {"input_ids": ids(64), "attention_mask": mask}
        assert torch.equal(model(**given).logits, dense(**given).logits)
        assert model(ids(150)).logits.isfinite().all()
        with pytest.raises((IndexError, RuntimeError)):
            dense(ids(150))


@pytest.mark.parametrize("family", TABLES)
def test_interpolation_is_the_formula(family):
    build, name, offset, _ = TABLES[family]
    old, new = (m.get_submodule(name).weight.double() for m in (build(), extended(build(), method="interpolate")))
    assert torch.equal(new[: offset + 1], old[: offset + 1])
    assert torch.equal(new[-1], old[-1])
    for i in range(150):
        at = i * 63 / 149
        low = min(math.floor(at), 62)
        expected = old[offset + low] * (low + 1 - at) + old[offset + low + 1] * (at - low)
        torch.testing.assert_close(new[offset + i], expected, rtol=0, atol=1e-6)


def test_buffers_of_bert_count_on():
    model = extended(tiny_bert())
    assert torch.equal(model.bert.embeddings.position_ids, torch.arange(150)[None])
    assert torch.equal(model.bert.embeddings.token_type_ids, torch.zeros(1, 150, dtype=torch.int64))
    inputs = {"inputs_embeds": model.bert.embeddings.word_embeddings(ids(150))}
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, model(ids(150)).logits)


@pytest.mark.parametrize("build", [tiny_gpt2, tiny_opt, tiny_llama])
def test_generation_runs_past_the_old_length(build):
    model = extended(build())
    tokens = model.generate(ids(60), max_new_tokens=30, min_new_tokens=30, do_sample=False)
    assert tokens.shape == (2, 90)
    assert torch.equal(
        tokens, model.generate(ids(60), max_new_tokens=30, min_new_tokens=30, do_sample=False, use_cache=False)
    )


# -- rotary positions -------------------------------------------------------------------------------------------------
def frequencies(method, theta=10000.0, width=8, factor=150 / 64):
    i = torch.arange(0, width, 2, dtype=torch.float64)
    plain = theta ** (-i / width)
    if method == "linear":
        return plain / factor
    if method == "ntk":
        return (theta * factor ** (width / (width - 2))) ** (-i / width)
    if method == "yarn":
        at = [width * math.log(64 / (turns * 2 * math.pi)) / (2 * math.log(theta)) for turns in (32, 1)]
        low, high = max(math.floor(at[0]), 0), min(math.ceil(at[1]), width - 1)
        ramp = ((torch.arange(width // 2, dtype=torch.float64) - low) / max(high - low, 0.001)).clamp(0, 1)
        return plain / factor * ramp + plain * (1 - ramp)
    return plain


def tiny_neox():
    fields = {**SHAPE, "max_position_embeddings": 64, "rotary_pct": 1.0}
    return seeded(GPTNeoXForCausalLM, GPTNeoXConfig(**fields))


@pytest.mark.many(every=4)
@pytest.mark.parametrize("method", ["linear", "ntk", "yarn", "dynamic"])
@pytest.mark.parametrize("build", [tiny_llama, tiny_neox])
def test_rotary_frequencies_are_the_formulas(build, method):
    dense, model = build(), extended(build(), method=method)
    assert type(model) is type(dense)
    rotary = next(m for m in model.modules() if hasattr(m, "inv_freq"))
    torch.testing.assert_close(rotary.inv_freq.double(), frequencies(method), rtol=1e-6, atol=0)
    assert model.config.max_position_embeddings == (64 if method == "dynamic" else 150)
    with torch.no_grad():
        same = torch.equal(model(ids(64)).logits, dense(ids(64)).logits)
        assert same == (method == "dynamic")
        model(ids(150))
    if method == "dynamic":
        base = 10000.0 * (150 / 64 * 150 / 64 - (150 / 64 - 1)) ** (8 / 6)
        torch.testing.assert_close(rotary.inv_freq.double(), frequencies("", base), rtol=1e-5, atol=0)


# -- checkpoints ------------------------------------------------------------------------------------------------------
RELOAD = """
    import torch
    import transformers
    model = transformers.{kind}.from_pretrained({folder!r}).eval()
    with torch.no_grad():
        torch.save(model(torch.tensor({ids})).logits, {folder!r} + "/logits.pt")
"""


@pytest.mark.many
@pytest.mark.parametrize(
    ("build", "method", "more"),
    [
        (tiny_bert, "copy", ()),
        (tiny_roberta, "interpolate", ()),
        (tiny_gpt2, "copy", ()),
        (tiny_opt, "interpolate", ({"technique": "rtn", "bits": 8},)),
        (tiny_llama, "linear", ({"technique": "rtn", "bits": 8},)),
        (tiny_llama, "yarn", ()),
        (tiny_llama, "dynamic", ()),
        (tiny_llama, "ntk", ()),
    ],
)
def test_the_checkpoint_is_of_the_stock_class(build, method, more, tmp_path, stock_python):
    model = extended(build(), *more, method=method)
    model.save_pretrained(tmp_path)
    code = RELOAD.format(kind=type(model).__name__, folder=str(tmp_path), ids=ids(150).tolist())
    done = stock_python.copy(textwrap.dedent(code))
    assert done.status == 0, done.err
    with torch.no_grad():
        assert torch.equal(torch.load(tmp_path / "logits.pt"), model(ids(150)).logits)


@pytest.mark.parametrize("known", [True, False])
def test_the_tokenizer_of_the_checkpoint_takes_longer_texts(known, tmp_path):
    tokenizer = tiny_tokenizer(64) if known else None
    model = hf_optim.optimize(tiny_gpt2(), [{"technique": "extend_positions", "length": 150}], tokenizer=tokenizer)
    model.save_pretrained(tmp_path)
    if known:
        assert AutoTokenizer.from_pretrained(tmp_path).model_max_length == 150
        assert tokenizer.model_max_length == 64
    text = (tmp_path / "README.md").read_text()
    assert "reads 150 tokens in place of 64" in text
    assert ("model_max_length=150" in text) != known


def test_before_sparse_attention_the_context_is_the_new_one():
    model = extended(tiny_bert(), {"technique": "blockwise", "block": 16})
    report = hf_optim.run_of(model).record.steps["1"]
    assert report["context"] == 150
    with torch.no_grad():
        assert model(ids(150)).logits.isfinite().all()
    assert hf_optim.run_of(model).record.reload == "REMOTE_CODE"


# -- refusals ---------------------------------------------------------------------------------------------------------
def tiny_bloom():
    return seeded(BloomForCausalLM, BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=4))


def tiny_falcon():
    config = FalconConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, alibi=True)
    return seeded(FalconForCausalLM, config)


def scaled_llama():
    return tiny_llama(rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0})


def layered():
    fields = {**DECODER, "head_dim": 8, "layer_types": ["sliding_attention", "full_attention"]}
    return seeded(Gemma3ForCausalLM, Gemma3TextConfig(**fields))


@pytest.mark.parametrize(
    ("build", "fields", "message"),
    [
        (tiny_bert, {"length": 64}, r"step 1 \(extend_positions\): the model has 64 positions already"),
        (tiny_roberta, {"length": 64}, "the model has 64 positions already"),
        (tiny_llama, {"length": 50}, "the model has 64 positions already"),
        (tiny_bert, {"method": "yarn"}, "bert has no rotary positions: choose copy or interpolate"),
        (tiny_llama, {"method": "copy"}, "llama has rotary positions, which are not a table"),
        (scaled_llama, {}, "scaled already"),
        (layered, {}, "differ between layers"),
        (tiny_bloom, {}, "distances alone"),
        (tiny_falcon, {}, "distances alone"),
        (tiny_t5, {}, "not those of one sequence of tokens"),
        (tiny_vit, {}, "not those of one sequence of tokens"),
    ],
)
def test_models_without_positions_to_extend_are_refused_and_unchanged(build, fields, message):
    model = build()
    before = model.config.to_json_string()
    with pytest.raises(ModelError, match=message):
        extended(model, **fields)
    assert model.config.to_json_string() == before


def test_a_table_that_does_not_fit_the_configuration_is_refused():
    model = tiny_bert()
    model.config.max_position_embeddings = 60
    with pytest.raises(ModelError, match="has 64 rows, 0 of them before the first position, which does not fit"):
        extended(model)


@pytest.mark.parametrize("fields", [{"length": 1}, {"length": 10**9}, {"method": "cubic"}])
def test_fields_are_checked(fields):
    with pytest.raises(RecipeError, match=next(iter(fields))):
        extended(tiny_bert(), **fields)


def test_one_step_of_a_recipe_extends_positions():
    with pytest.raises(RecipeError, match="positions"):
        extended(tiny_bert(), {"technique": "extend_positions", "length": 300})


def test_a_causal_mask_of_truth_values_is_longer_too():
    """GPTBigCode, which ``mqa`` makes of GPT-2, has such a buffer."""
    made = optimize(tiny_gpt2(), [{"technique": "mqa"}])
    ids = torch.arange(3, 23)[None]
    with torch.no_grad():
        expected = made(ids).logits
        longer = optimize(made, [{"technique": "extend_positions", "length": 96}])
        assert torch.equal(longer(ids).logits, expected)
        assert longer(torch.arange(90)[None] % 60).logits.shape[1] == 90
