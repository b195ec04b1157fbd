"""A cache layer with groups of heads: what it keeps, and that it follows the rows of a batch."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from simulated_graphs import Capturing
from transformers.cache_utils import DynamicLayer

from hf_optim.toolkit.attention import (
    Band,
    GlobalTokens,
    HeadGroupsLayer,
    HeadPatterns,
    Kept,
    Pattern,
    Rows,
    groups_of,
    kept_attention,
    nearest_keys,
    take_tokens,
)

SPANS = [5, 90, 7, 200]
GROUPS = ((0, 2), (1,), (3,))


def tokens(count, batch=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, 4, count, 3, generator=generator) for _ in range(2)]


def feed(layer, key, value):
    """Give tokens to a layer as an attention function does, and return the keys of each group."""
    held = layer.update(key, value)[0]
    assert held.held_by is layer
    seen = []
    for (part, keys, values), group in zip(layer.take(GROUPS), GROUPS, strict=True):
        seen.append((keys, values))
        part.settle(nearest_keys([SPANS[head] for head in group], True), None)
    return seen


def test_heads_with_about_the_same_span_share_a_group():
    assert groups_of(SPANS) == GROUPS
    assert groups_of([1, 64, 65, 128, 129]) == ((0, 1), (2, 3), (4,))


def test_each_group_keeps_what_its_longest_span_sees():
    layer, (key, value) = HeadGroupsLayer(), tokens(120)
    feed(layer, key, value)
    assert [tuple(part.keys.shape) for part in layer.parts] == [(2, 2, 6, 3), (2, 1, 89, 3), (2, 1, 120, 3)]
    assert torch.equal(layer.parts[0].keys, key[:, [0, 2], 114:])
    assert torch.equal(layer.parts[1].values, value[:, [1], 31:])
    assert layer.held_bytes() == 2 * 2 * (2 * 6 + 89 + 120) * 3 * 4
    assert layer.get_seq_length() == 120
    assert layer.get_mask_sizes(3) == (123, 0)
    more = tokens(1, seed=1)
    seen = feed(layer, *more)
    assert torch.equal(seen[0][0], torch.cat([key[:, [0, 2], 114:], more[0][:, [0, 2]]], 2))
    layer.reset()
    assert (layer.get_seq_length(), layer.nbytes(), layer.groups) == (0, 0, None)


def test_rows_are_reordered_repeated_and_selected():
    layer, (key, value) = HeadGroupsLayer(), tokens(120)
    feed(layer, key, value)
    layer.reorder_cache(torch.tensor([1, 0]))
    layer.batch_repeat_interleave(2)
    layer.batch_select_indices(torch.tensor([True, False, True, True]))
    other = copy.deepcopy(layer)
    for part, group, begin in zip(layer.parts, GROUPS, (114, 31, 0), strict=True):
        assert torch.equal(part.keys, key[[1, 0, 0]][:, list(group), begin:])
    feed(layer, *tokens(1, batch=3))
    assert other.get_seq_length() == 120


def test_it_takes_over_a_layer_that_holds_all():
    whole, layer = DynamicLayer(), HeadGroupsLayer()
    key, value = tokens(50)
    whole.update(key, value)
    layer.adopt(whole)
    layer.reorder_cache(torch.tensor([1, 0]))
    assert layer.get_seq_length() == 50
    more = tokens(1, seed=1)
    seen = feed(layer, *more)
    assert torch.equal(seen[1][0], torch.cat([key[[1, 0]][:, [1]], more[0][:, [1]]], 2))
    assert layer.get_seq_length() == 51


def test_a_crop_that_some_group_cannot_do_changes_none():
    layer = HeadGroupsLayer()
    feed(layer, *tokens(120))
    before = [part.keys.clone() for part in layer.parts]
    with pytest.raises(ValueError, match="cannot go back"):
        layer.crop(-2)
    assert all(torch.equal(part.keys, old) for part, old in zip(layer.parts, before, strict=True))
    recording = HeadGroupsLayer()
    recording.activate_past_recording()
    feed(recording, *tokens(120))
    feed(recording, *tokens(4, seed=1))
    recording.crop(-3)
    assert recording.get_seq_length() == 121
    recording.crop(-121)
    assert (recording.get_seq_length(), recording.groups) == (0, None)


def test_tokens_that_the_attention_did_not_take_are_an_error():
    layer = HeadGroupsLayer()
    layer.update(*tokens(3))
    with pytest.raises(ValueError, match="did not see the last tokens"):
        layer.update(*tokens(1))
    other = HeadGroupsLayer()
    feed(other, *tokens(3))
    other.update(*tokens(1))
    with pytest.raises(ValueError, match="start a new one"):
        list(other.take(((0,), (1, 2, 3))))


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("spans", [(5, 9, 7, 40), (90, 90, 90, 90), (3, 3, 3, 3)], ids=str)
def test_a_step_over_the_last_keys_is_that_over_chosen_ones_and_asks_the_host_nothing(spans, biased):
    heads = nearest_keys(spans, True)
    assert heads.nearest == spans
    query, (key, value) = torch.randn(2, 4, 1, 3, dtype=torch.float64), (part[:, :2].double() for part in tokens(51))

    def bias(distance, chosen):
        reach = torch.tensor(spans).view(-1, *[1] * distance.dim())
        return ((reach - distance) / 4).clamp(0, 1).log()

    kept = Kept.first(heads, 50, key.device)
    index, kept = kept.visible_later(None)
    assert kept.run
    held = [part if index is None else take_tokens(part[:, :, :50], index) for part in (key, value)]
    pairs = zip(held, (key, value), strict=True)
    held = [torch.cat([part[:, :, : kept.places.shape[1]], whole[:, :, 50:]], 2) for part, whole in pairs]
    kept = kept.with_more(1)
    given = query, *held
    expected = kept_attention(*given, replace(kept, run=False), 0.7, bias=bias if biased else None)
    with Capturing():
        found = kept_attention(*given, kept, 0.7, bias=bias if biased else None)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_what_is_seen_besides_the_nearest_keys_has_no_count():
    causal = [Pattern((Band(4, 0),), True), Pattern((Band(9, 9),), True), Pattern((Band(2, 0),))]
    assert HeadPatterns.of(causal, 3).nearest == (5, 10, 3)
    globals_first = Pattern((Band(4, 0), GlobalTokens(1)), True)
    others = Band(4, 4), Band(None, 0), Band(8, 0, 2)
    for pattern in (globals_first, *(Pattern((each,), each.after == 0) for each in others)):
        assert HeadPatterns.of([pattern], 1).nearest is None


def test_rows_with_padding_are_no_run():
    kept = Kept.first(nearest_keys([4], True), 9, torch.device("cpu"))
    rows = Rows.of(torch.tensor([[-1, -1] + [0] * 7, [0] * 9]))
    assert not kept.visible_later(rows)[1].run
    assert kept.visible_later(None)[1].with_more(2).run
