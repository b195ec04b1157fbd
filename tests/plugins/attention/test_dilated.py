"""Dilated attention against its formula, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from pattern_oracle import assert_follows, inputs_of, model_of
from tiny_models import tiny_llama

import hf_optim
from hf_optim import ModelError, RecipeError


def by_three(i, j, layer, head, count):
    return any(abs(i - j) == m * 3 for m in range(9))


def by_head(i, j, layer, head, count):
    return any(abs(i - j) == m * (1, 2, 5, 5)[head] for m in range(9))


def by_layer(i, j, layer, head, count):
    return any(abs(i - j) == m * (1, 4)[layer] for m in range(9))


@pytest.mark.parametrize(
    ("family", "fields", "formula"),
    [
        ("opt", {"dilation": [3]}, by_three),
        ("vit", {"dilation": [3]}, by_three),
        ("llama", {"dilation": [1, 2, 5, 5]}, by_head),
        ("bert", {"dilation": [1, 4], "by": "layer"}, by_layer),
    ],
)
def test_outputs_and_gradients_follow_the_formula(family, fields, formula, monkeypatch):
    assert_follows({"technique": "dilated", "window": 9, **fields}, formula, family, monkeypatch)


def test_without_gaps_it_is_a_window_and_a_long_one_full_attention_to_the_bit():
    inputs, _ = inputs_of("llama")
    del inputs["attention_mask"]
    dense = model_of("llama")
    expected = dense(**inputs).logits
    model = hf_optim.optimize(dense, [{"technique": "dilated", "window": 150, "dilation": [1]}])
    assert torch.equal(model(**inputs).logits, expected)


def test_what_is_refused():
    with pytest.raises(RecipeError, match="window must be >= 2"):
        hf_optim.optimize(tiny_llama(), [{"technique": "dilated", "window": 0}])
    with pytest.raises(RecipeError, match="dilation must be distances from 1"):
        hf_optim.optimize(tiny_llama(), [{"technique": "dilated", "dilation": [0]}])
    with pytest.raises(ModelError, match="dilation=65, not a whole number from 1 to 64"):
        hf_optim.optimize(tiny_llama(), [{"technique": "dilated", "dilation": [65]}])
    with pytest.raises(ModelError, match="dilations for 3 heads, but a layer has 4"):
        hf_optim.optimize(tiny_llama(), [{"technique": "dilated", "dilation": [1, 2, 3]}])
    with pytest.raises(ModelError, match="dilation has 3 entries, but the model has 2 layers"):
        hf_optim.optimize(tiny_llama(), [{"technique": "dilated", "dilation": [1, 2, 3], "by": "layer"}])
