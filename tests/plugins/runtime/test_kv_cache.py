"""``kv_cache``: a setting of the model that changes no weight, its record and card, and what it refuses."""

from __future__ import annotations

import json

import pytest
import torch
from tiny_models import tiny_bert, tiny_llama, tiny_t5, tiny_vit
from transformers import AutoModelForCausalLM, MistralConfig

import hf_optim
from hf_optim import KeyValueScheme, ModelError, OptimConfig, RecipeError, cache_size, run_of
from hf_optim.generation.quantized_cache import QuantizedLayer
from hf_optim.toolkit.compat import CACHE
from hf_optim.toolkit.quantization import scheme_of

STEP = {"technique": "kv_cache", "bits": 4, "group": 32, "residual": 0}


def test_it_sets_the_cache_and_changes_no_weight():
    model = tiny_llama()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    optimized = hf_optim.optimize(model, STEP)
    assert scheme_of(optimized.config) == KeyValueScheme(4, "channel", 32, 0)
    for name, tensor in optimized.state_dict().items():
        assert torch.equal(tensor, before[name])
    assert run_of(optimized).record.reload == "STOCK_DENSE"


def test_record_and_card_have_the_bytes(tmp_path):
    model = hf_optim.optimize(tiny_llama(), STEP)
    model.save_pretrained(tmp_path)
    context = model.config.max_position_embeddings
    plain = cache_size(model.config, 1, context).total
    small = cache_size(model.config, 1, context, scheme_of(model.config)).total
    (step,) = run_of(model).recipe.steps
    reported = run_of(model).reported(step)
    assert reported["bytes_before"] == plain
    assert reported["bytes_after"] == small
    text = (tmp_path / "README.md").read_text()
    assert f"takes {small:,} bytes instead of {plain:,}" in " ".join(text.split())
    assert "are those of that cache, not of this step." in " ".join(text.split())
    assert json.loads((tmp_path / "config.json").read_text())["hf_optim_key_values"]["bits"] == 4


@pytest.mark.parametrize(
    ("residual", "expected"),
    [
        (0, "; only up to 32 tokens that wait for their group to be full are in full precision."),
        (1, "; the latest token, and up to 32 tokens that wait for their group to be full, are in full precision."),
        (48, "; the latest 48 tokens, and up to 32 tokens that wait for their group to be full, are in full"),
    ],
)
def test_card_says_what_stays_in_full_precision(residual, expected, tmp_path):
    hf_optim.optimize(tiny_llama(), STEP | {"residual": residual}).save_pretrained(tmp_path)
    assert expected in " ".join((tmp_path / "README.md").read_text().split())


def test_auto_and_plain_loads_generate_alike(tmp_path):
    hf_optim.optimize(tiny_llama(), STEP).save_pretrained(tmp_path)
    ids = torch.randint(1, 64, (1, 40))
    found = []
    for settings in ({}, {"optim_config": "auto"}):
        model = AutoModelForCausalLM.from_pretrained(tmp_path, **settings)
        out = hf_optim.generate(model, input_ids=ids, max_new_tokens=6, pad_token_id=0, return_dict_in_generate=True)
        assert isinstance(out[CACHE].layers[0], QuantizedLayer)
        found.append(out.sequences)
    assert torch.equal(*found)


@pytest.mark.parametrize(
    "steps",
    [
        [{"technique": "rtn", "bits": 8}, STEP],
        [STEP, {"technique": "rtn", "bits": 4, "group_size": 8}],
        [{"technique": "nm"}, STEP],
    ],
)
def test_it_composes_with_techniques_of_the_weights(steps, tmp_path):
    model = hf_optim.optimize(tiny_llama(), steps, calibration=[{"input_ids": torch.randint(1, 64, (2, 12))}])
    model.save_pretrained(tmp_path)
    assert scheme_of(AutoModelForCausalLM.from_pretrained(tmp_path).config).bits == 4


def test_one_step_of_a_recipe_sets_it():
    with pytest.raises(RecipeError, match=r"keep only one of step 2 \(kv_cache\) and step 1 \(kv_cache\)"):
        OptimConfig.parse([STEP, {"technique": "kv_cache"}]).check()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"bits": 5}, r"kv_cache: bits must be one of 4, 8, 'float8', not 5"),
        ({"bits": "float4"}, r"did you mean 'float8'"),
        ({"group": 48}, r"kv_cache: group must be one of 32, 64, 128, not 48"),
        ({"keys": "head"}, r"kv_cache: keys must be one of 'channel', 'token'"),
        ({"residual": -1}, r"kv_cache: residual must be >= 0"),
        ({"residual": 5000}, r"kv_cache: residual must be <= 4096"),
        ({"bits": "float8", "symmetric": False}, "float8 has no zero points"),
        ({"bit": 4}, r"did you mean 'bits'"),
    ],
)
def test_wrong_fields(fields, message):
    with pytest.raises(RecipeError, match=message):
        OptimConfig.parse([{"technique": "kv_cache", **fields}])


SMALL = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 99,
}  # fmt: skip


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (tiny_vit, r"step 1 \(kv_cache\): ViT\w+ does not generate"),
        (tiny_bert, r"step 1 \(kv_cache\): Bert\w+ does not generate"),
        (tiny_t5, r"step 1 \(kv_cache\): t5 has an encoder"),
        (lambda: AutoModelForCausalLM.from_config(MistralConfig(**SMALL, sliding_window=6)),
         r"step 1 \(kv_cache\): every layer of mistral has a sliding window"),
    ],
)  # fmt: skip
def test_models_without_such_a_cache(make, message):
    with pytest.raises(ModelError, match=message):
        hf_optim.optimize(make(), STEP)
