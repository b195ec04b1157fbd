"""BigBird: against the softmax under blocks that the test chooses, transformers' class, and the dense model."""

from __future__ import annotations

import copy

import pytest
import torch
from attention_oracle import LONG, MODELS, assert_same, batch, bert, by_blocks, llama, roberta
from transformers import BigBirdConfig, BigBirdModel

import hf_optim
from hf_optim import ModelError, RecipeError
from hf_optim.testing.models import _build
from hf_optim.toolkit.attention import HeadPatterns, visible
from hf_optim.toolkit.attention.attend import attend
from hf_optim_plugins.attention import _big_bird_pattern, big_bird

SETTINGS = {"block": 8, "random": 2, "seed": 3}
STORED = {
    "choice": "stored", "seed": 0, "by_head": False, "global_first": 0, "global_last": 0, "global_positions": [],
    "global_token_ids": [], "global_projections": False,
}  # fmt: skip


def convert(model, **fields):
    return hf_optim.optimize(copy.deepcopy(model), [{"technique": "big_bird", **SETTINGS, **fields}])


def row_mask(length, places, layer, head, found=()):
    """Return bool ``[places, places]`` of one row of ``length`` tokens, from the paper's sets of blocks."""
    blocks = -(-length // 8)
    seen = torch.zeros(places, places, dtype=torch.bool)
    if blocks <= 5 + 2 * 2:
        seen[:length, :length] = True
        return seen
    drawn = big_bird.random_blocks(SETTINGS, blocks, layer, head)
    for a in range(blocks):
        others = {a - 1, a, a + 1, 0, blocks - 1, *drawn[a].nonzero()[:, 0].tolist()}
        for b in range(blocks) if a in (0, blocks - 1) else others & set(range(blocks)):
            seen[8 * a : 8 * a + 8, 8 * b : 8 * b + 8] = True
    for place in found:
        seen[place] = seen[:, place] = True
    seen[length:], seen[:, length:] = False, False
    return seen


def masks(valid, by_head=False, found=None):
    """Return the masks of a layer: each row begins at its first token."""

    def of_layer(layer):
        heads = []
        for head in range(4 if by_head else 1):
            rows = []
            for index, row in enumerate(valid):
                length, start = int(row.sum()), int(row.long().argmax())
                own = () if found is None else (found[index].nonzero()[:, 0] - start).tolist()
                rows.append(row_mask(length, len(row), layer, head, own).roll((start, start), (0, 1)))
            heads.append(torch.stack(rows))
        return torch.stack(heads, 1)

    return of_layer


@pytest.mark.many
@pytest.mark.parametrize("way", ["dense", "blocks"])
@pytest.mark.parametrize(
    ("name", "padding"),
    [
        ("bert", None), ("bert", "left"), ("bert", "right"), ("roberta", "left"), ("distilbert", "right"),
        ("t5_encoder", "right"), ("vit", None),
    ],
)  # fmt: skip
def test_it_is_the_softmax_under_the_mask(name, way, padding, monkeypatch):
    model = MODELS[name]()
    converted = convert(model)
    if way == "blocks":
        by_blocks(monkeypatch, converted)
    inputs, valid = batch(model, padding=padding)
    assert_same(model, converted, masks(valid), inputs, valid)


@pytest.mark.parametrize("padding", [None, "left"])
@pytest.mark.parametrize("way", ["dense", "blocks"])
def test_random_blocks_by_head_and_further_global_tokens(way, padding, monkeypatch):
    model = bert()
    converted = convert(model, by_head=True, global_token_ids=[7])
    if way == "blocks":
        by_blocks(monkeypatch, converted)
    inputs, valid = batch(model, padding=padding)
    found = (inputs["input_ids"] == 7) & valid
    assert found.any()
    assert_same(model, converted, masks(valid, True, found), inputs, valid)


@pytest.mark.many
@pytest.mark.parametrize("block", [4, 16, 48, 64])
def test_blocks_of_other_sizes_than_those_of_the_lists(block, monkeypatch):
    monkeypatch.setattr(_big_bird_pattern, "SEEN_BY_ALL", -8)  # nothing is computed in full, however few blocks
    for length in (131, 128, 150):
        settings = {**STORED, "block": block, "random": 1}
        pattern = _big_bird_pattern.build(settings, 0, 1, False)[0]
        heads = HeadPatterns.of([pattern], 2)
        parts = torch.randn(3, 1, 2, length, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        scores = (parts[0] @ parts[1].mT).masked_fill(~visible(pattern, length), -torch.inf)
        found = attend(*parts, heads, 1.0, way="blocks")
        torch.testing.assert_close(found, scores.softmax(-1) @ parts[2], rtol=0, atol=1e-12)


@pytest.mark.parametrize("length", [88, 131])
@pytest.mark.parametrize("way", ["dense", "blocks"])
def test_tf_eval_is_the_evaluation_of_the_stock_class(way, length, monkeypatch):
    config = BigBirdConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, block_size=8,
        max_position_embeddings=LONG, attention_type="block_sparse", num_random_blocks=2, hidden_act="gelu",
    )  # fmt: skip
    stock = _build(BigBirdModel, config, 0).double().eval()
    model = bert().bert
    assert not model.load_state_dict(_as_bert(stock.state_dict()), strict=False).missing_keys
    converted = convert(model, choice="tf_eval")
    if way == "blocks":
        by_blocks(monkeypatch, converted)
    ids = batch(model, length)[0]["input_ids"]
    with torch.no_grad():
        expected, found = stock(ids), converted(ids)
    assert stock.attention_type == "block_sparse"
    torch.testing.assert_close(found[0], expected[0], rtol=0, atol=1e-10)
    torch.testing.assert_close(found.pooler_output, expected.pooler_output, rtol=0, atol=1e-10)
    plain = hf_optim.optimize(copy.deepcopy(model), [{"technique": "big_bird", "block": 8, "random": 0}])
    with torch.no_grad():
        assert float((plain(ids)[0] - expected[0]).abs().max()) > 1e-3


def _as_bert(state):
    return {name.replace("pooler.", "pooler.dense."): value for name, value in state.items()}


@pytest.mark.many(every=4)
@pytest.mark.parametrize("length", [16, 88, 131])
@pytest.mark.parametrize("random", [0, 2])
def test_tf_eval_with_padding_is_each_row_alone(random, length):
    model = bert()
    converted = convert(model, random=random, choice="tf_eval")
    inputs, valid = batch(model, max(length, 100), padding="left")
    with torch.no_grad():
        both = converted.bert(**inputs)[0]
        own = inputs["input_ids"][1:, valid[1]]
        place = torch.arange(valid.shape[1])[valid[1]][None]
        alone = converted.bert(own, position_ids=place)[0]
    torch.testing.assert_close(both[1, valid[1]], alone[0], rtol=0, atol=1e-10)


def test_random_blocks_are_written_down():
    """What a checkpoint computes does not change with versions: these are the blocks of seed 0, layer 1, head 2."""
    term = _big_bird_pattern.NeighboursAndRandom(8, 2, 9, 0, 1, 2)
    table = _big_bird_pattern.block_table(term, 12)
    drawn = {a: set(table[a].nonzero()[:, 0].tolist()) - {a - 1, a, a + 1, 0, 11} for a in range(1, 11)}
    assert [sorted(drawn[a]) for a in range(1, 11)] == [
        [3, 8], [7, 9], [6, 8], [7, 10], [1, 3], [2, 8], [3, 4], [2, 5], [6, 7], [1, 3],
    ]  # fmt: skip
    for blocks in (12, 40):
        own = big_bird.random_blocks({"seed": 5, "random": 3}, blocks, 7, 1)
        term = _big_bird_pattern.NeighboursAndRandom(8, 3, 0, 5, 7, 1)
        place = torch.arange(blocks)
        ends = (place == 0) | (place == blocks - 1)
        always = ((place[:, None] - place).abs() <= 1) | ends[:, None] | ends
        assert torch.equal(_big_bird_pattern.block_table(term, blocks), always | own)


def test_random_blocks_lie_everywhere_and_differ_by_layer_head_and_seed():
    def drawn(**fields):
        settings = {**STORED, "block": 1, "random": 3, "by_head": True, **fields}
        patterns = _big_bird_pattern.build(settings, fields.get("layer", 0), 4, False)
        tables = [_big_bird_pattern.block_table(pattern.terms[0], 128) for pattern in patterns]
        place = torch.arange(128)
        near = ((place[:, None] - place).abs() <= 1) | (place % 127 == 0) | (place % 127 == 0)[:, None]
        return torch.stack([table & ~near for table in tables])

    first = drawn()
    assert (first[:, 1:-1].sum(-1) == 3).all()
    counts = first.sum((0, 1))[1:-1]
    assert int(counts.min()) > 0  # 12 expected, of 126 blocks each
    assert float(counts[:63].sum()) / float(counts.sum()) == pytest.approx(0.5, abs=0.06)
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first, drawn(seed=1))
    assert not torch.equal(first, drawn(layer=1))


def test_a_longer_text_replaces_few_choices():
    term = _big_bird_pattern.NeighboursAndRandom(8, 3, 11)
    short, long = (_big_bird_pattern.block_table(term, count) for count in (40, 44))
    kept = (short & long[:40, :40])[1:39, 1:39].sum() / short[1:39, 1:39].sum()
    assert float(kept) > 0.9


def test_short_rows_are_the_dense_model():
    model = bert()
    converted = convert(model)
    inputs, _ = batch(model, 72, padding="right")
    torch.testing.assert_close(converted(**inputs).logits, model(**inputs).logits, rtol=0, atol=1e-10)
    longer, _ = batch(model, 73)
    with torch.no_grad():
        assert float((converted(**longer).logits - model(**longer).logits).abs().max()) > 1e-6


def test_a_row_that_a_batch_pads_is_the_row_alone():
    """One row alone in a batch that is padded: its last block is that of its tokens."""
    converted = convert(roberta())
    ids = batch(converted, 131)[0]["input_ids"][:1]
    padded = torch.cat([ids, torch.ones(1, 29, dtype=torch.int64)], 1)
    mask = torch.cat([torch.ones_like(ids), torch.zeros(1, 29, dtype=torch.int64)], 1)
    with torch.no_grad():
        found, alone = converted(padded, attention_mask=mask).logits[:, :131], converted(ids).logits
    torch.testing.assert_close(found, alone, rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("fields", "error", "words"),
    [
        ({"block": 0}, RecipeError, "block"),
        ({"random": -1}, RecipeError, "random"),
        ({"seed": -1}, RecipeError, "seed"),
        ({"seed": 2**31}, RecipeError, "seed"),
        ({"choice": "trained"}, RecipeError, "choice"),
        ({"choice": "tf_eval", "global_first": 1}, RecipeError, "no further global tokens"),
        ({"global_positions": [LONG]}, ModelError, f"rows of at most {LONG}"),
    ],
)
def test_bad_settings_are_refused_before_work(fields, error, words):
    with pytest.raises(error, match=words):
        convert(bert(), **fields)


def test_a_causal_model_is_refused():
    with pytest.raises(ModelError, match="is causal"):
        convert(llama())


@pytest.mark.parametrize(
    "damage",
    [
        {"block": 0}, {"random": -2}, {"seed": 1.5}, {"choice": "any"}, {"by_head": 1}, {"random": 2**20},
        {"choice": "tf_eval", "global_first": 2},
    ],
)  # fmt: skip
def test_damaged_settings_are_refused(damage):
    converted = convert(bert())
    converted.config.attention_pattern = {**converted.config.attention_pattern, **damage}
    with pytest.raises(ValueError, match="the attention pattern"):
        converted(**batch(converted)[0])
