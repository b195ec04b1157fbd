"""Blockwise attention against its formula, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from pattern_oracle import assert_follows, inputs_of, model_of
from tiny_models import TINY, tiny_bert, tiny_llama

import hf_optim
from hf_optim import ModelError, RecipeError
from hf_optim.toolkit.attention import Chunks, Pattern, ShiftedChunks, visible


def own_block(i, j, layer, head, count):
    return i // 48 == j // 48


def shifted_encoder(i, j, layer, head, count):
    shift, blocks = (0, 1, 3)[head % 3], -(-count // 48)
    return j // 48 == (i // 48 - shift) % blocks


def shifted_decoder(i, j, layer, head, count):
    shift = (0, 1)[head % 2]
    return j // 48 == (i // 48 - shift if i // 48 >= shift else i // 48)


@pytest.mark.parametrize(
    ("family", "shifts", "formula"),
    [
        ("llama", (0,), own_block),
        ("vit", (0,), own_block),
        ("bert", (0, 1, 3), shifted_encoder),
        ("llama", (0, 1), shifted_decoder),
    ],
)
def test_outputs_and_gradients_follow_the_formula(family, shifts, formula, monkeypatch):
    assert_follows({"technique": "blockwise", "block": 48, "shifts": list(shifts)}, formula, family, monkeypatch)


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_a_block_as_long_as_the_input_is_full_attention_to_the_bit(family):
    inputs, _ = inputs_of(family)
    del inputs["attention_mask"]
    dense = model_of(family)
    expected = dense(**inputs).logits
    model = hf_optim.optimize(dense, [{"technique": "blockwise", "block": 150}])
    assert torch.equal(model(**inputs).logits, expected)


def test_nothing_crosses_the_border_of_a_block():
    model = hf_optim.optimize(tiny_llama(), [{"technique": "blockwise", "block": 8}])
    ids = torch.arange(3, 27)[None]
    other = ids.clone()
    other[0, 9] = 50
    with torch.no_grad():
        changed = (model(ids).logits != model(other).logits).any(-1)[0]
    assert changed.nonzero().flatten().tolist() == list(range(9, 16))


@pytest.mark.parametrize("wraps", [True, False])
@pytest.mark.parametrize(("size", "shift"), [(5, 1), (5, 3), (16, 2), (70, 1), (5, 40)])
def test_the_spans_of_shifted_blocks_hold_every_key(size, shift, wraps):
    term, length = ShiftedChunks(size, shift, wraps), 83
    seen = visible(Pattern((term,)), length)
    assert seen.any(1).all()
    for first, last in ((0, 15), (16, 31), (3, 3), (64, 82)):
        covered = torch.zeros(length, dtype=torch.bool)
        for low, high in term.spans(torch.tensor([first]), torch.tensor([last]), length):
            covered[max(0, int(low)) : max(0, int(high))] = True
        assert not (seen[first : last + 1] & ~covered).any()
    key = torch.arange(length)
    for query in range(length):
        later = seen[query:].any(0)
        assert not (later & ~term.stays(key, query, length)).any()


def test_a_shift_of_whole_turns_is_the_identity():
    assert torch.equal(visible(Pattern((ShiftedChunks(10, 3, True),)), 25), visible(Pattern((Chunks(10),)), 25))


def test_what_is_refused():
    with pytest.raises(RecipeError, match=r"block must be >= 1"):
        hf_optim.optimize(tiny_llama(), [{"technique": "blockwise", "block": 0}])
    with pytest.raises(RecipeError, match="shifts must be numbers of blocks from 0"):
        hf_optim.optimize(tiny_llama(), [{"technique": "blockwise", "shifts": [-1]}])
    with pytest.raises(ModelError, match="shifts for 5 heads, but a layer has 4"):
        hf_optim.optimize(tiny_bert(), [{"technique": "blockwise", "shifts": [0, 0, 0, 0, 1]}])
    assert TINY["bert"]().config._attn_implementation == "sdpa"
