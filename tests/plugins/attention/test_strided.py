"""Strided attention against its formula, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from pattern_oracle import assert_follows, inputs_of, model_of
from tiny_models import tiny_gpt2, tiny_llama, tiny_t5

import hf_optim
from hf_optim import ModelError, RecipeError
from hf_optim_plugins.attention._attach import stride_of


def every_seventh(i, j, layer, head, count):
    return (i - j) % 7 == 0


def with_neighbours(i, j, layer, head, count):
    return (i - j) % 16 == 0 or abs(i - j) < 5


@pytest.mark.parametrize(
    ("family", "fields", "formula"),
    [
        ("gpt2", {"stride": 7}, every_seventh),
        ("vit", {"stride": 7}, every_seventh),
        ("bert", {"stride": "sqrt", "window": 5}, with_neighbours),
        ("llama", {"stride": 16, "window": 5}, with_neighbours),
    ],
)
def test_outputs_and_gradients_follow_the_formula(family, fields, formula, monkeypatch):
    assert_follows({"technique": "strided", **fields}, formula, family, monkeypatch)


def test_stride_1_is_full_attention_to_the_bit():
    inputs, _ = inputs_of("llama")
    del inputs["attention_mask"]
    dense = model_of("llama")
    expected = dense(**inputs).logits
    model = hf_optim.optimize(dense, [{"technique": "strided", "stride": 1}])
    assert torch.equal(model(**inputs).logits, expected)


def test_residues_stay_apart_in_any_number_of_layers():
    model = hf_optim.optimize(tiny_llama(num_hidden_layers=3), [{"technique": "strided", "stride": 4}])
    ids = torch.arange(3, 27)[None]
    other = ids.clone()
    other[0, 9] = 50
    with torch.no_grad():
        changed = (model(ids).logits != model(other).logits).any(-1)[0]
    assert changed.nonzero().flatten().tolist() == [9, 13, 17, 21]


def test_the_root_is_that_of_the_context():
    assert stride_of("sqrt", tiny_gpt2(n_positions=90).config, "") == 9
    assert stride_of("sqrt", model_of("vit").config, "") == 7
    with pytest.raises(ModelError, match="t5 has no fixed context"):
        stride_of("sqrt", tiny_t5().config, "step 1")


def test_what_is_refused():
    with pytest.raises(RecipeError, match="stride must be from 1 to"):
        hf_optim.optimize(tiny_llama(), [{"technique": "strided", "stride": 0}])
    with pytest.raises(ModelError, match="stride=65, not a whole number from 1 to 64"):
        hf_optim.optimize(tiny_llama(), [{"technique": "strided", "stride": 65}])
    with pytest.raises(RecipeError, match="stride must be"):
        hf_optim.optimize(tiny_llama(), [{"technique": "strided", "stride": "root"}])
    with pytest.raises(RecipeError, match="window must be >= 0"):
        hf_optim.optimize(tiny_llama(), [{"technique": "strided", "window": -1}])
