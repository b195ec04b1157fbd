"""ETC: against the softmax under the four pieces, and the dense model at the limit."""

from __future__ import annotations

import copy

import pytest
import torch
from attention_oracle import LONG, MODELS, assert_same, batch, bert, by_blocks, llama

import hf_optim
from hf_optim import ModelError, RecipeError
from hf_optim.toolkit.attention import GlobalTokens, Pieces
from hf_optim_plugins.attention import _etc_pattern

PIECES = ("g2g", "g2l", "l2g", "l2l")
OFF = [{}, {"g2g": False}, {"g2l": False}, {"l2g": False}, {"l2l": False}, {"hard_g2l": True}]


def convert(model, **fields):
    return hf_optim.optimize(copy.deepcopy(model), [{"technique": "etc", "radius": 5, **fields}])


def mask(valid, found, fields, causal=False):
    """Return bool ``[B, 1, N, N]``: for each pair the piece that it belongs to, by the definition."""
    rows = []
    for real, own in zip(valid.tolist(), found.tolist(), strict=True):
        places = len(real)
        starts = [place for place in range(places) if own[place]]
        seen = torch.zeros(places, places, dtype=torch.bool)
        for i in range(places):
            end = next((start for start in starts if start > i), places)
            for j in range(places):
                if not (real[i] and real[j]) or (causal and j > i):
                    continue
                piece = ("g" if own[i] else "l") + "2" + ("g" if own[j] else "l")
                on = fields.get(piece, True)
                if piece == "l2l":
                    on = on and abs(i - j) <= 5
                if piece == "g2l" and fields.get("hard_g2l"):
                    on = on and i < j < end
                seen[i, j] = on
        rows.append(seen)
    return torch.stack(rows)[:, None]


@pytest.mark.many
@pytest.mark.parametrize("fields", OFF, ids=str)
@pytest.mark.parametrize("way", ["dense", "blocks"])
@pytest.mark.parametrize("by_row", [False, True])
def test_it_is_the_softmax_under_the_pieces(by_row, way, fields, monkeypatch):
    model = bert()
    tokens = {"global_token_ids": [7]} if by_row else {"global_positions": [0, 30, 31, 77], "global_last": 1}
    converted = convert(model, **fields, **tokens)
    if way == "blocks":
        by_blocks(monkeypatch, converted)
    inputs, valid = batch(model, 100, padding="left")
    place = (valid.long().cumsum(1) - 1).masked_fill(~valid, -1)
    found = place == 0
    if by_row:
        found |= (inputs["input_ids"] == 7) & valid
    else:
        for position in (30, 31, 77):
            found |= place == position
        found |= (place == valid.sum(1, keepdim=True) - 1) & valid
    seen = mask(valid, found, fields)
    assert_same(model, converted, lambda layer: seen, inputs, valid)


@pytest.mark.many
@pytest.mark.parametrize("name", ["roberta", "distilbert", "t5_encoder", "vit", "llama"])
def test_other_models(name, monkeypatch):
    model = MODELS[name]()
    converted = convert(model, global_positions=[40], hard_g2l=True)
    by_blocks(monkeypatch, converted)
    inputs, valid = batch(model, 100, padding=None if name == "vit" else "right")
    place = torch.arange(valid.shape[1])
    found = ((place == 0) | (place == 40)) & valid
    seen = mask(valid, found, {"hard_g2l": True}, causal=name == "llama")
    assert_same(model, converted, lambda layer: seen, inputs, valid)


def test_a_wide_radius_is_the_dense_model():
    model = bert()
    inputs, _ = batch(model, padding="right")
    expected = model(**inputs).logits
    for fields in ({}, {"global_token_ids": [7]}, {"global_first": 0}):
        found = convert(model, radius=LONG, **fields)(**inputs).logits
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


def test_a_checkpoint_with_ids_and_a_hard_piece_outlives_the_tool(tmp_path, stock):
    converted = convert(bert().float(), global_token_ids=[7], hard_g2l=True)
    inputs, _ = batch(converted, padding="left")
    with torch.no_grad():
        expected = converted(**inputs).logits
    converted.save_pretrained(tmp_path)
    _, found = stock.logits(tmp_path, "AutoModelForSequenceClassification", inputs, trust_remote_code=True)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("fields", "error", "words"),
    [
        ({"radius": 0}, RecipeError, "radius"),
        ({"l2l": False, "l2g": False}, RecipeError, "others would see nothing"),
        ({"g2g": False, "g2l": False}, RecipeError, "others would see nothing"),
        ({"global_last": -1}, RecipeError, "global_last"),
        ({"global_positions": [LONG + 3]}, ModelError, f"rows of at most {LONG}"),
    ],
)
def test_bad_settings_are_refused_before_work(fields, error, words):
    with pytest.raises(error, match=words):
        convert(bert(), **fields)


def test_ids_in_a_causal_model_are_refused():
    with pytest.raises(ModelError, match="is causal"):
        convert(llama(), global_token_ids=[7])


@pytest.mark.parametrize("damage", [{"radius": 0}, {"g2l": "no"}, {"hard_g2l": 1}, {"global_first": "x"}])
def test_damaged_settings_are_refused(damage):
    converted = convert(bert())
    converted.config.attention_pattern = {**converted.config.attention_pattern, **damage}
    with pytest.raises(ValueError, match="the attention pattern has"):
        converted(**batch(converted)[0])


@pytest.mark.parametrize("tokens", [GlobalTokens(2), GlobalTokens(1, positions=(9, 30)), GlobalTokens()])
@pytest.mark.parametrize("off", ["", "g2l", "l2g", "l2l", "hard_g2l"])
def test_a_cache_gives_up_what_no_later_token_sees(tokens, off):
    on = Pieces(*(name != off for name in _etc_pattern.PIECES), own_span=off == "hard_g2l")
    term, place = _etc_pattern.GlobalLocal(tokens, 4, on), torch.arange(48)
    seen = term.sees(place[:, None], place, 48) & (place[:, None] >= place)
    for count in (1, 5, 12, 31, 47):
        kept = term.stays(place[:count], count, 2**31 - 1)
        assert not bool((seen[count:, :count].any(0) & ~kept).any())
        if count > 31:  # no global token is ahead
            assert int(kept.sum()) == len({*range(count - 4, count), *range(tokens.first), *tokens.positions})
    for length in (1, 9, 48):
        assert int(seen[:length].sum(1).max()) <= term.most_seen(length) <= length
