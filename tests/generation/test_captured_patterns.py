"""Steps under attention patterns over fixed buffers: the tokens of transformers' loop, and no question to the host."""

from __future__ import annotations

import copy
import importlib
import warnings
from types import SimpleNamespace

import pytest
import torch
from patterned import DROPPING, HEADS, TERMS, patterned, registered
from simulated_graphs import simulated_graphs
from tiny_models import TINY, tiny_gpt2, tiny_llama

import hf_optim
from hf_optim.generation.door import GenerationWarning
from hf_optim.generation.static_cache import StaticKeyValues
from hf_optim.toolkit.attention import HeadPatterns, Pattern, PatternLayer, Slots, most_seen, tokens_kept
from hf_optim.toolkit.compat import CACHE

IDS = torch.randint(3, 50, (3, 13), generator=torch.Generator().manual_seed(0))
MASK = torch.ones_like(IDS)
MASK[1, :5], MASK[2, :11] = 0, 0
CASES = {**{name: (name,) for name in TERMS if name != "ends"}, "by head": tuple(HEADS), "dropping": tuple(DROPPING)}
RINGS = "hf_optim.toolkit.attention.ring_cache"
TECHNIQUES = {
    "local": {"window": 6, "full_layers": [1]},  # of GPT-2: a Llama becomes a Mistral
    "blockwise": {"block": 8, "shifts": [0, 1]},
    "strided": {"stride": 9, "window": 3},
    "dilated": {"window": 3, "dilation": [1, 2, 3, 3]},
    "etc": {"radius": 5, "global_first": 2, "global_positions": [20]},
    "longformer": {"window": 6, "global_first": 1, "global_positions": [4, 18]},
    "sparse_transformer": {"stride": 6, "vertices": 2, "steps": "heads"},
    "axial": {"columns": 7},
}


@pytest.fixture(autouse=True)
def _registered():
    with registered():
        yield


def make(*names, family="llama"):
    torch.manual_seed(1)
    return patterned(TINY[family]().double(), *names)


def settings(tokens, **more):
    return {"attention_mask": MASK, "max_new_tokens": tokens, "do_sample": False, "pad_token_id": 0, **more}


def generated(model, given, mode="eager", **more):
    with warnings.catch_warnings():
        warnings.simplefilter("error", GenerationWarning)
        return hf_optim.generate(model, IDS, mode=mode, return_dict_in_generate=True, **given, **more)


@pytest.mark.many(every=4)
@pytest.mark.parametrize("name", CASES)
def test_tokens_logits_and_caches_are_those_of_transformers_loop(name):
    model = make(*CASES[name])
    given = settings(30, output_logits=True)
    found, stock = generated(model, given), model.generate(IDS, return_dict_in_generate=True, **given)
    assert torch.equal(found.sequences, stock.sequences)
    for ours, theirs in zip(found.logits, stock.logits, strict=True):
        torch.testing.assert_close(ours, theirs.float(), rtol=0, atol=1e-6)
    assert {type(layer) for layer in found[CACHE].layers} == {PatternLayer}
    mask = torch.cat([MASK, torch.ones(3, 30, dtype=torch.long)], 1)
    more = {**settings(7), "attention_mask": mask, "return_dict_in_generate": True}
    whole = model.generate(found.sequences, use_cache=False, **more).sequences
    for cache in (found[CACHE], copy.deepcopy(found[CACHE])):  # in transformers' loop, then over fixed buffers again
        mode = "stock" if cache is found[CACHE] else "eager"
        again = hf_optim.generate(model, found.sequences, mode=mode, **{CACHE: cache}, **more).sequences
        assert torch.equal(again, whole), mode


def test_a_cache_that_is_returned_ends_at_the_last_token_that_was_read():
    """Steps that were computed in vain behind the end have dropped nothing that the next token sees."""
    model = make("window", "late chunks", "fixed", "globals")
    plain = model.generate(IDS[:1], max_new_tokens=30, do_sample=False)[0, 13:]
    ends = {int(token): place for place, token in reversed(list(enumerate(plain.tolist())))}
    for end, place in sorted(ends.items(), key=lambda each: each[1])[:6]:
        given = {"max_new_tokens": 30, "do_sample": False, "eos_token_id": end, "pad_token_id": 0}
        found = hf_optim.generate(model, IDS[:1], mode="eager", return_dict_in_generate=True, **given)
        assert found.sequences.shape[1] == 13 + place + 1
        assert found[CACHE].get_seq_length() == 13 + place
        row = torch.cat([found.sequences, IDS[:1, :4]], 1)
        logits = model(row[:, 13 + place :], **{CACHE: found[CACHE]}).logits
        torch.testing.assert_close(logits, model(row, use_cache=False).logits[:, 13 + place :], rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", TECHNIQUES)
def test_a_step_of_every_technique_for_decoders_is_captured(name):
    torch.manual_seed(1)
    base = tiny_gpt2() if name == "local" else tiny_llama()
    model = hf_optim.optimize(base.double(), [{"technique": name, **TECHNIQUES[name]}])
    with simulated_graphs() as graphs:
        found = generated(model, settings(40), mode="captured")
        assert len(graphs.captured) == 1
        assert graphs.replays == 39
        assert torch.equal(found.sequences, model.generate(IDS, **settings(40)))
        generated(model, settings(33), mode="captured")
        assert len(graphs.captured) == 1


def test_a_pattern_is_captured_without_being_compiled_and_without_a_warning():
    model = make(*DROPPING)
    with simulated_graphs() as graphs:
        found = generated(model, settings(20), mode="auto")
    assert len(graphs.captured) == 1
    assert graphs.compiled.frame_count == 0
    assert torch.equal(found.sequences, model.generate(IDS, **settings(20)))


def test_sizes_of_buffers_follow_the_pattern_and_not_the_length():
    model = make("window")
    cache = model(IDS, use_cache=True)[CACHE]
    short, long = (StaticKeyValues(cache, 3, length)._layers[0].keys.shape[2] for length in (256, 4096))
    assert short == long == 5 + 8 + 1


@pytest.mark.parametrize("name", CASES)
def test_slots_hold_what_is_seen_at_every_step(name):
    length, begin, back = 70, (3, 11), 4
    heads = HeadPatterns.of([Pattern(tuple(TERMS[each]), True) for each in CASES[name]], 4)
    slots = Slots(heads, 2, length, back, torch.device("cpu"))
    place = torch.arange(length)
    visible = torch.stack([pattern.sees(place[:, None], place, length) for pattern in heads.patterns])
    visible &= place[:, None] >= place
    held = torch.full((2, max(begin)), -1)
    for row, count in enumerate(begin):
        kept = torch.stack([pattern.stays(place[:count], count, length) for pattern in heads.patterns]).any(0)
        held[row, : int(kept.sum())] = place[:count][kept]
    slots.load(held[:, : min(max(begin), slots.count)], torch.tensor(begin))
    states = []
    for step in range(length - max(begin)):
        states.append([part.clone() for part in slots.state()])
        if step % 9 == 8:  # the last steps are taken back, and computed again
            for part, before in zip(slots.state(), states[-1 - back], strict=True):
                part.copy_(before)
            for _ in range(back):
                slots.step()
        slots.step()
        seen = slots._seen if slots._index is None else slots._seen.new_zeros(2, slots._seen.shape[1], 1, slots.count)
        if slots._index is not None:
            index = slots._index[:, None, None, :].expand_as(slots._seen)
            seen = seen.int().scatter_add(3, index, slots._seen.int()) == 1
            assert int(slots._seen.any(1).sum(2).max()) <= slots.width <= most_seen(heads, length)
        for row, first in enumerate(begin):
            for number, pattern in enumerate(
                visible[:, first + step] if len(visible) > 1 else visible[:1, first + step]
            ):
                head = heads.heads.index(number) if seen.shape[1] > 1 else 0
                found = slots.positions[row][seen[row, head, 0]].sort().values
                assert found.tolist() == pattern.nonzero()[:, 0].tolist(), (step, row, number)


@pytest.mark.parametrize("name", CASES)
def test_the_most_keys_that_a_query_sees_are_bounded_and_tokens_kept_counted(name):
    heads = HeadPatterns.of([Pattern(tuple(TERMS[each]), True) for each in CASES[name]], 4)
    for length in (1, 2, 9, 40, 63):
        place = torch.arange(length)
        seen = torch.stack([pattern.sees(place[:, None], place, length) for pattern in heads.patterns]).any(0)
        assert int(seen.sum(1).max()) <= most_seen(heads, length) <= length
        stays = [
            torch.stack([each.stays(place[:count], count, 2**31 - 1) for each in heads.patterns]).any(0).sum()
            for count in range(1, length + 1)
        ]
        assert tokens_kept(heads, length) == int(max(stays))


@pytest.mark.interpreted
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("name", ["window", "strided", "by head"])
def test_steps_run_on_the_decode_kernel(name, family):
    torch.manual_seed(1)
    model = patterned(TINY[family](), *CASES[name])
    given = settings(12, output_logits=True)
    found, stock = generated(model, given), model.generate(IDS, return_dict_in_generate=True, **given)
    assert torch.equal(found.sequences, stock.sequences)
    for ours, theirs in zip(found.logits, stock.logits, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


def spanned(heads, fixed, shares=((0.0, 1.0, 0.2, 0.16), (0.05, 0.1, 0.01, 0.02))):
    torch.manual_seed(1)
    model = tiny_llama(num_key_value_heads=heads, max_position_embeddings=512)
    model = hf_optim.optimize(model, [{"technique": "adaptive_span", "ramp": 4, "max_span": 128}]).eval()
    set_spans(model, shares)
    if fixed:
        model.fix_spans()
    return model


def set_spans(model, shares):
    with torch.no_grad():
        for layer, own in zip(model.model.layers, shares, strict=True):
            layer.self_attn.span.z.copy_(torch.tensor(own))


@pytest.fixture
def rings(monkeypatch):
    """Let captured steps use rings, by the specification of their kernel, in any dtype."""
    ring_cache = importlib.import_module(RINGS)
    op = importlib.import_module(ring_cache.KERNEL)
    known = {**vars(op), "can_run_triton": lambda like: True, "unsupported": lambda *given: None}
    monkeypatch.setattr(ring_cache, "USED", True)
    monkeypatch.setattr(ring_cache, "_kernel", lambda: SimpleNamespace(**known))


@pytest.mark.parametrize("heads", [2, 4])
@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("way", ["slots", "rings"])
def test_steps_under_adaptive_spans_are_captured(way, fixed, heads, request):
    """Each group of heads has slots of its own, and the ramp of a span counts there, too."""
    if way == "rings":
        request.getfixturevalue("rings")
    model = spanned(heads, fixed).double()
    cache = model(IDS, use_cache=True)[CACHE]
    kinds = {type(layer).__name__ for layer in StaticKeyValues(cache, 3, 64)._layers}
    assert kinds == {"RingLayer" if way == "rings" else "FixedGroupsLayer"}
    given = settings(30, output_logits=True)
    with simulated_graphs() as graphs:
        found = generated(model, given, mode="captured")
        assert len(graphs.captured) == 1
    stock = model.generate(IDS, return_dict_in_generate=True, **given)
    assert torch.equal(found.sequences, stock.sequences)
    found = generated(model, given)  # with the norms of transformers, whose rounding a captured step has not
    assert torch.equal(found.sequences, stock.sequences)
    for ours, theirs in zip(found.logits, stock.logits, strict=True):
        torch.testing.assert_close(ours, theirs.float(), rtol=0, atol=1e-6)
    mask = torch.cat([MASK, torch.ones(3, 30, dtype=torch.long)], 1)
    more = {**settings(7), "attention_mask": mask, "return_dict_in_generate": True}
    whole = model.generate(found.sequences, use_cache=False, **more).sequences
    for mode in ("eager", "stock"):
        held = {CACHE: copy.deepcopy(found[CACHE])}
        assert torch.equal(hf_optim.generate(model, found.sequences, mode=mode, **held, **more).sequences, whole), mode


@pytest.mark.parametrize("way", ["slots", "rings"])
def test_a_session_is_not_used_for_spans_that_have_changed_since(way, request):
    if way == "rings":
        request.getfixturevalue("rings")
    model = spanned(2, False).double()
    with simulated_graphs() as graphs:
        for share in (0.01, 0.03, 0.031):  # the last ones reach as many keys, at other weights
            set_spans(model, [[share] * 4] * 2)
            found = generated(model, settings(30), mode="captured")
            assert torch.equal(found.sequences, model.generate(IDS, **settings(30)))
        assert len(graphs.captured) == 3


def test_rings_take_no_other_spans_and_no_mask(rings):
    model = spanned(2, True)
    cache = model(IDS, use_cache=True)[CACHE]
    layer = StaticKeyValues(cache, 3, 64)._layers[0]
    query, key = torch.randn(3, 4, 1, 16), torch.randn(3, 2, 1, 16)
    for counts, mask, message in (((9,) * 4, None, "other spans"), (layer.counts, key, "no mask of its own")):
        layer.update(key, key)
        with pytest.raises(ValueError, match=message):
            layer.attend_nearest(query, counts, None, 1.0, None, mask, 0.0)


@pytest.mark.interpreted
@pytest.mark.parametrize("fixed", [False, True])
def test_steps_under_adaptive_spans_run_on_the_kernel_of_rings(fixed, monkeypatch):
    monkeypatch.setattr(f"{RINGS}.USED", True)
    model, calls = spanned(2, fixed), []
    launch = importlib.import_module("hf_optim_kernels.ring_attention.launch")
    real = launch.ring_attention
    monkeypatch.setattr(launch, "ring_attention", lambda *given: calls.append(1) or real(*given))
    given = settings(12, output_logits=True)
    found, stock = generated(model, given), model.generate(IDS, return_dict_in_generate=True, **given)
    assert len(calls) == 2 * 11
    assert torch.equal(found.sequences, stock.sequences)
    for ours, theirs in zip(found.logits, stock.logits, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
