"""The two steps of the Sparse Transformer against their formulas, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from pattern_oracle import assert_follows, inputs_of, model_of
from tiny_models import tiny_llama

import hf_optim
from hf_optim import ModelError, RecipeError

L, C = 12, 2


def strided_merged(i, j, layer, head, count):
    return abs(i - j) <= L or (i - j) % L == 0


def strided_by_layer(i, j, layer, head, count):
    return abs(i - j) <= L - 1 if layer == 0 else (i - j) % L == 0


def fixed_merged(i, j, layer, head, count):
    return i // L == j // L or j % L in (L - 2, L - 1)


def fixed_rotated_by_head(i, j, layer, head, count):
    if head % 2 == 0:
        return i // L == j // L
    return j % L in ((10, 11), (8, 9))[head // 2 % 2]


@pytest.mark.many(every=4)
@pytest.mark.parametrize(
    ("family", "fields", "formula"),
    [
        ("bert", {"pattern": "strided"}, strided_merged),
        ("opt", {"pattern": "strided", "steps": "layers", "local": 12}, strided_by_layer),
        ("llama", {"vertices": 2}, fixed_merged),
        ("vit", {"vertices": 2}, fixed_merged),
        ("gpt2", {"vertices": 2, "rotate": 2, "steps": "heads"}, fixed_rotated_by_head),
    ],
)
def test_outputs_and_gradients_follow_the_formula(family, fields, formula, monkeypatch):
    step = {"technique": "sparse_transformer", "stride": L, **fields}
    assert_follows(step, formula, family, monkeypatch)


@pytest.mark.parametrize("fields", [{"pattern": "strided", "stride": 1}, {"stride": 150}])
def test_the_limits_are_full_attention_to_the_bit(fields):
    inputs, _ = inputs_of("llama")
    del inputs["attention_mask"]
    dense = model_of("llama")
    expected = dense(**inputs).logits
    model = hf_optim.optimize(dense, [{"technique": "sparse_transformer", **fields}])
    assert torch.equal(model(**inputs).logits, expected)


def reached(model, query=23):
    """Return the positions on which the output at a position depends."""
    ids = torch.arange(3, 27)[None]
    found = []
    with torch.no_grad():
        before = model(ids).logits[0, query]
        for key in range(query + 1):
            other = ids.clone()
            other[0, key] = 50
            if not torch.equal(model(other).logits[0, query], before):
                found.append(key)
    return found


@pytest.mark.parametrize(
    ("layers", "steps", "expected"),
    [
        (1, "layers", [20, 21, 22, 23]),
        (1, "merged", [3, 7, 11, 15, 19, 20, 21, 22, 23]),
        (2, "merged", list(range(24))),
        (2, "heads", list(range(24))),
    ],
)
def test_two_steps_reach_every_token(layers, steps, expected):
    step = {"technique": "sparse_transformer", "stride": 4, "vertices": 1, "steps": steps}
    assert reached(hf_optim.optimize(tiny_llama(num_hidden_layers=layers), [step])) == expected


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"stride": 0}, RecipeError, "stride must be from 1 to"),
        ({"stride": 65}, ModelError, "stride=65, not a whole number from 1 to 64"),
        ({"vertices": 0}, RecipeError, "vertices must be >= 1"),
        ({"stride": 8, "vertices": 9}, RecipeError, "1 x 9 columns do not fit into a block of 8"),
        ({"stride": 8, "vertices": 3, "rotate": 3}, RecipeError, "3 x 3 columns do not fit"),
        ({"stride": "sqrt", "vertices": 9}, ModelError, "vertices=9, not a whole number from 1 to 8"),
        ({"pattern": "strided", "rotate": 2}, RecipeError, "belong to the fixed pattern"),
        ({"local": 4}, RecipeError, "local belongs to the strided pattern"),
        ({"pattern": "stride"}, RecipeError, "did you mean 'strided'"),
    ],
)
def test_what_is_refused(fields, error, message):
    with pytest.raises(error, match=message):
        hf_optim.optimize(tiny_llama(), [{"technique": "sparse_transformer", "stride": 8, **fields}])


def test_one_head_cannot_alternate():
    model = tiny_llama(num_attention_heads=1, num_key_value_heads=1)
    with pytest.raises(ModelError, match="a layer has one head"):
        hf_optim.optimize(model, [{"technique": "sparse_transformer", "stride": 8, "steps": "heads"}])
