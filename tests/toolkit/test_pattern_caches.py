"""Decoding with a cache under a pattern: the outputs of the whole row, few keys held, and no wrong cache taken."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from patterned import DROPPING, HEADS, TERMS, patterned, registered
from tiny_models import tiny_bert, tiny_gpt2, tiny_llama, tiny_opt
from transformers import AutoModelForCausalLM, DynamicCache, LlamaForCausalLM, MistralConfig, StaticCache
from transformers.cache_utils import DynamicLayer

import hf_optim
from hf_optim.toolkit.attention import (
    FIELD,
    Band,
    HeadPatterns,
    Pattern,
    PatternLayer,
    dense_attention,
    kept,
    slots_for,
    tokens_kept,
)
from hf_optim.toolkit.attention.caches import HeldKeys
from hf_optim.toolkit.compat import CACHE

MODELS = {"llama": tiny_llama, "gpt2": tiny_gpt2, "opt": tiny_opt}
LENGTH = 40
IDS = torch.randint(3, 50, (3, LENGTH), generator=torch.Generator().manual_seed(0))
SPLITS = {"tokens": [1] * LENGTH, "prompt": [22] + [1] * 18, "parts": [13, 9, 11, 1, 5, 1]}
CASES = [(name,) for name in TERMS if name != "ends"] + [tuple(HEADS), tuple(DROPPING)]


@pytest.fixture(autouse=True)
def _registered():
    with registered():
        yield


def make(name, *terms, **fields):
    torch.manual_seed(1)
    return patterned(MODELS[name](**fields).double(), *terms)


def padding(side):
    """Return a mask ``[3, LENGTH]``: no padding, on the left, or between prompts and the tokens that follow."""
    mask = torch.ones_like(IDS)
    if side == "left":
        mask[1, :7] = mask[2, :19] = 0
    if side == "after the prompt":
        mask[1, 15:22] = mask[2, 3:22] = 0
    return mask


@torch.no_grad()
def in_parts(model, ids, mask=None, split=(), cache=None):
    """Return the logits of a row that is given in parts, and the cache."""
    found, at = [], 0
    for count in split:
        given = {} if cache is None else {CACHE: cache}
        if mask is not None:
            given["attention_mask"] = mask[:, : at + count]
            if "opt" not in type(model).__name__.lower():
                given["position_ids"] = (mask.cumsum(1) - 1).clamp_min(0)[:, at : at + count]
        out = model(ids[:, at : at + count], use_cache=True, **given)
        cache, at = out[CACHE], at + count
        found.append(out.logits)
    return torch.cat(found, 1), cache


@torch.no_grad()
def whole(model, ids):
    return model(ids, use_cache=False).logits


# -- the outputs of the whole row -------------------------------------------------------------------------------------
@pytest.mark.many
@pytest.mark.parametrize("terms", CASES, ids="+".join)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_row_in_parts_has_the_outputs_of_the_whole_row(name, terms):
    model = make(name, *terms)
    expected = whole(model, IDS)
    for split in SPLITS.values():
        found, cache = in_parts(model, IDS, split=split)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
        assert {type(layer) for layer in cache.layers} == {PatternLayer}


@pytest.mark.parametrize("side", ["left", "after the prompt"])
@pytest.mark.parametrize("terms", CASES, ids="+".join)
def test_padded_rows_in_parts_have_the_outputs_of_each_row_alone(terms, side):
    model, mask = make("llama", *terms), padding(side)
    for split in ("prompt", "parts") if side == "left" else ("prompt",):
        found, _ = in_parts(model, IDS, mask, SPLITS[split])
        for row, valid in enumerate(mask.bool()):
            alone = whole(model, IDS[row : row + 1, valid])
            torch.testing.assert_close(found[row : row + 1, valid], alone, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["gpt2", "opt"])
def test_padded_rows_of_models_with_learned_positions(name):
    model, mask = make(name, *HEADS), padding("left")
    found, _ = in_parts(model, IDS, mask, SPLITS["prompt"])
    for row, valid in enumerate(mask.bool()):
        alone = whole(model, IDS[row : row + 1, valid])
        torch.testing.assert_close(found[row : row + 1, valid], alone, rtol=0, atol=1e-12)


def test_a_padding_token_in_the_middle_of_a_row_is_not_a_position():
    model, mask = make("llama", *HEADS), padding("after the prompt")
    with torch.no_grad():
        places = (mask.cumsum(1) - 1).clamp_min(0)
        found = model(IDS, attention_mask=mask, position_ids=places, use_cache=False).logits
    for row, valid in enumerate(mask.bool()):
        alone = whole(model, IDS[row : row + 1, valid])
        torch.testing.assert_close(found[row : row + 1, valid], alone, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["bool", "additive"])
def test_a_mask_of_the_caller_is_intersected_with_the_pattern(kind):
    model = make("llama", "window", "dilated", "window", "dilated")
    hidden = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
    hidden[10:, 8] = False
    mask = hidden[None, None].expand(3, 1, -1, -1)
    if kind == "additive":
        mask = torch.zeros(mask.shape, dtype=torch.double).masked_fill(~mask, torch.finfo(torch.double).min)
    with torch.no_grad():
        expected = model(IDS, attention_mask=mask, use_cache=False).logits
        cache = model(IDS[:, :30], attention_mask=mask[:, :, :30, :30], use_cache=True)[CACHE]
        found = model(IDS[:, 30:], attention_mask=mask[:, :, 30:], **{CACHE: cache}).logits
    torch.testing.assert_close(found, expected[:, 30:], rtol=0, atol=1e-12)


def test_attention_weights_are_refused():
    with pytest.raises(ValueError, match="does not form weights"):
        make("llama", "window")(IDS[:1], output_attentions=True)


@pytest.mark.parametrize("first", [None, 3])
def test_tokens_that_were_read_cannot_become_padding_behind_dropped_keys(first):
    model, later = make("llama", "chunks"), torch.ones(1, 26, dtype=torch.long)
    later[:, :7] = 0
    earlier = {} if first is None else {"attention_mask": (torch.arange(22) >= first).long()[None]}
    with torch.no_grad():
        cache = model(IDS[:1, :22], use_cache=True, **earlier)[CACHE]
        with pytest.raises(ValueError, match="hides other earlier tokens than before"):
            model(IDS[:1, 22:26], attention_mask=later, **{CACHE: cache})
        # Where no key was dropped, the mask says which tokens count.
        model = make("llama", "all")
        cache = model(IDS[:1, :22], use_cache=True)[CACHE]
        found = model(IDS[:1, 22:26], attention_mask=later, **{CACHE: cache}).logits
    assert torch.isfinite(found).all()


def test_gradients_through_a_cache_are_those_of_the_whole_row():
    model = make("llama", "window")
    embedded = torch.randn(1, 12, model.config.hidden_size, dtype=torch.double, requires_grad=True)
    expected = torch.autograd.grad(model(inputs_embeds=embedded, use_cache=False).logits.square().sum(), embedded)
    cache, parts = None, []
    for start, stop in ((0, 9), (9, 10), (10, 11), (11, 12)):
        out = model(inputs_embeds=embedded[:, start:stop], use_cache=True, **({CACHE: cache} if cache else {}))
        cache = out[CACHE]
        parts.append(out.logits)
    found = torch.autograd.grad(torch.cat(parts, 1).square().sum(), embedded)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


# -- generate ---------------------------------------------------------------------------------------------------------
GENERATE = {"max_new_tokens": 20, "do_sample": False}


@pytest.mark.many(every=4)
@pytest.mark.parametrize("settings", [
    {}, {"num_beams": 3}, {"cache_implementation": "static"}, {"prefill_chunk_size": 5},
    {"num_beams": 4, "num_beam_groups": 1, "num_return_sequences": 2},
], ids=["greedy", "beams", "static", "chunked", "several"])  # fmt: skip
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_generate_makes_the_tokens_of_a_loop_without_a_cache(name, settings):
    model, mask = make(name, *DROPPING), padding("left")[:2, :17]
    kwargs = {**GENERATE, **settings, "attention_mask": mask}
    found = model.generate(IDS[:2, :17], **kwargs)
    without = {key: value for key, value in kwargs.items() if key not in ("cache_implementation", "prefill_chunk_size")}
    assert torch.equal(found, model.generate(IDS[:2, :17], use_cache=False, **without))


@pytest.mark.filterwarnings("ignore:Passing `generation_config` together")
@pytest.mark.parametrize("assistant", ["a pattern", "none", "the prompt"])
def test_assisted_decoding_takes_tokens_back(assistant):
    model = make("llama", *DROPPING)
    expected = model.generate(IDS[:1, :17], use_cache=False, **GENERATE)
    torch.manual_seed(2)
    if assistant == "the prompt":
        helper = {"prompt_lookup_num_tokens": 3}
    else:
        draft = tiny_llama().double().eval()
        draft.generation_config.eos_token_id = None
        helper = {"assistant_model": draft if assistant == "none" else patterned(draft, "window")}
    assert torch.equal(model.generate(IDS[:1, :17], **helper, **GENERATE), expected)


def test_a_conversation_goes_on_from_the_cache_of_the_answer():
    model = make("llama", *DROPPING)
    first = model.generate(IDS[:1, :9], return_dict_in_generate=True, **GENERATE)
    longer = torch.cat([first.sequences, IDS[:1, :6]], 1)
    found = model.generate(longer, **{CACHE: first[CACHE]}, **GENERATE)
    assert torch.equal(found, model.generate(longer, use_cache=False, **GENERATE))


def test_a_model_with_a_window_of_its_own_keeps_both():
    torch.manual_seed(1)
    fields = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = MistralConfig(**fields, num_key_value_heads=2, head_dim=8, vocab_size=64, sliding_window=9)
    model = patterned(AutoModelForCausalLM.from_config(config).double(), "fixed")
    found, cache = in_parts(model, IDS, split=SPLITS["prompt"])
    torch.testing.assert_close(found, whole(model, IDS), rtol=0, atol=1e-12)
    assert {type(layer) for layer in cache.layers} == {PatternLayer}
    with pytest.raises(ValueError, match="leave cache_implementation out"):
        model.generate(IDS, cache_implementation="static", **GENERATE)


def test_a_mask_of_the_caller_on_a_static_cache_is_refused():
    model = make("llama", "window")
    cache = StaticCache(config=model.config, max_cache_len=30)
    with pytest.raises(ValueError, match="a mask of four dimensions"):
        model(IDS[:, :1], attention_mask=torch.ones(3, 1, 1, 30, dtype=torch.bool), **{CACHE: cache})


@pytest.mark.parametrize("way", ["torch.compile", "in place"])
def test_a_compiled_model_decodes_as_before(way):
    model = make("llama", *DROPPING)
    expected = whole(model, IDS)
    compiled = model
    if way == "in place":
        model.compile(backend="eager")
    else:
        compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        cache = compiled(IDS[:, :30], use_cache=True)[CACHE]
        for at in (30, 31):
            found = compiled(IDS[:, at : at + 1], **{CACHE: cache}).logits
            torch.testing.assert_close(found, expected[:, at : at + 1], rtol=0, atol=1e-12)
    assert {type(layer) for layer in cache.layers} == {PatternLayer}
    torch.compiler.reset()


@pytest.mark.many
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("build", [tiny_llama, tiny_bert])
def test_a_compiled_model_without_a_cache_computes_as_before(build, padded):
    model = hf_optim.optimize(build(), [{"technique": "blockwise", "block": 4}]).eval()
    mask = torch.ones_like(IDS)
    mask[0, 25:] = 0
    given = {"input_ids": IDS, **({"attention_mask": mask} if padded else {})}
    given |= {"use_cache": False} if build is tiny_llama else {}
    with torch.no_grad():
        found = torch.compile(model, backend="eager")(**given)[0]
        assert torch.equal(found, model(**given)[0])
    torch.compiler.reset()


# -- what is held and read --------------------------------------------------------------------------------------------
def numbers(cache):
    return {layer.keys.shape[2] for layer in cache.layers}


@pytest.mark.parametrize(("terms", "held"), [
    ("window", 5), ("all", 300), ("dilated", 12), ("chunks", 300 % 8), ("fixed", 300 // 8 * 2 + 300 % 8),
    ("seen globals", 4 + 4), ("globals", 4 + 4),
])  # fmt: skip
def test_bytes_follow_from_what_later_tokens_see(terms, held):
    model = make("llama", terms, max_position_embeddings=2048)
    ids = torch.randint(3, 50, (1, 380), generator=torch.Generator().manual_seed(1))
    _, cache = in_parts(model, ids, split=[300])
    assert numbers(cache) == {held}
    config = model.config
    per_token = 2 * config.num_key_value_heads * (config.hidden_size // config.num_attention_heads) * 8
    assert {layer.nbytes() for layer in cache.layers} == {slots_for(held) * per_token}
    patterns = HeadPatterns.of([Pattern(tuple(TERMS[terms]), True)], 4)
    for start in range(300, 380):
        _, cache = in_parts(model, ids[:, start:], split=[1], cache=cache)
        most = slots_for(tokens_kept(patterns, start + 1)) * per_token
        assert max(layer.nbytes() for layer in cache.layers) <= most
    assert {layer.get_seq_length() for layer in cache.layers} == {380}


def test_each_row_of_a_padded_batch_holds_its_own_tokens():
    """Shifted by its padding, each row has other columns: the batch holds as many as one row does, not their union."""
    model, mask = make("llama", "fixed"), padding("left")
    _, cache = in_parts(model, IDS, mask, [LENGTH])
    alone = [in_parts(model, IDS[:1, -int(row.sum()) :], split=[int(row.sum())])[1] for row in mask]
    assert numbers(cache) == {max(max(numbers(each)) for each in alone)}


def test_a_step_gathers_the_keys_it_sees(monkeypatch):
    read = []
    product = kept.masked_attention
    monkeypatch.setattr(
        kept, "masked_attention", lambda q, key, *args: (read.append(key.shape[2]), product(q, key, *args))[1]
    )
    plain = kept.dense_product
    monkeypatch.setattr(
        kept,
        "dense_product",
        lambda q, key, *args, **kwargs: (read.append(key.shape[2]), plain(q, key, *args, **kwargs))[1],
    )
    model = make("llama", "strided", max_position_embeddings=2048)
    ids = torch.randint(3, 50, (1, 351), generator=torch.Generator().manual_seed(1))
    found, cache = in_parts(model, ids, split=[350, 1])
    assert numbers(cache) == {351}  # another query sees other keys of the stride
    assert set(read[-model.config.num_hidden_layers :]) == {350 // 7 + 1 + 6}
    torch.testing.assert_close(found, whole(model, ids), rtol=0, atol=1e-12)


def test_layers_work_out_what_they_hold_together():
    model = make("llama", *DROPPING)
    _, cache = in_parts(model, IDS, padding("left"), SPLITS["prompt"])
    assert len({id(layer.kept) for layer in cache.layers}) == 1


# -- what caches are asked to do --------------------------------------------------------------------------------------
@pytest.fixture(params=[False, True], ids=["whole rows", "padded"])
def filled(request):
    """A model, a batch of 3 with a cache of 30 tokens, and its mask."""
    model, mask = make("llama", *DROPPING), padding("left" if request.param else "none")
    _, cache = in_parts(model, IDS[:, :30], mask[:, :30], [28, 1, 1])
    return model, cache, mask


def step(model, cache, mask, rows=slice(None), at=30):
    given = {"attention_mask": mask[rows, : at + 1], "position_ids": mask[rows, : at + 1].sum(1)[:, None] - 1}
    with torch.no_grad():
        return model(IDS[rows, at : at + 1], **given, **{CACHE: cache}).logits


@pytest.mark.parametrize("rows", [[2, 0, 1], [1, 1, 2], [0]], ids=str)
def test_rows_are_chosen(filled, rows):
    model, cache, mask = filled
    expected = step(model, copy.deepcopy(cache), mask)[rows]
    others = copy.deepcopy(cache)
    cache.reorder_cache(torch.tensor(rows))
    torch.testing.assert_close(step(model, cache, mask, rows), expected, rtol=0, atol=1e-12)
    others.batch_select_indices(torch.tensor(rows))
    torch.testing.assert_close(step(model, others, mask, rows), expected, rtol=0, atol=1e-12)


def test_rows_are_repeated(filled):
    model, cache, mask = filled
    expected = step(model, copy.deepcopy(cache), mask).repeat_interleave(2, 0)
    cache.batch_repeat_interleave(2)
    torch.testing.assert_close(step(model, cache, mask, [0, 0, 1, 1, 2, 2]), expected, rtol=0, atol=1e-12)


def test_copies_pickles_and_moves_do_not_change_a_cache(filled):
    model, cache, mask = filled
    expected = step(model, copy.deepcopy(cache), mask)
    for layer in cache.layers:
        layer.offload()
        layer.prefetch()
    file = io.BytesIO()
    torch.save(cache, file)
    file.seek(0)
    assert torch.equal(step(model, torch.load(file, weights_only=False), mask), expected)
    assert torch.equal(step(model, cache, mask), expected)


def test_a_cache_that_is_reset_begins_again(filled):
    model, cache, _ = filled
    cache.reset()
    found, _ = in_parts(model, IDS, split=[20, 1], cache=cache)
    torch.testing.assert_close(found, whole(model, IDS)[:, :21], rtol=0, atol=1e-12)


def test_tokens_are_taken_back_while_their_keys_are_held(filled):
    model, cache, mask = filled
    expected = step(model, copy.deepcopy(cache), mask)
    cache.activate_past_recording()
    with torch.no_grad():
        places = (mask.cumsum(1) - 1).clamp_min(0)[:, 30:]
        model(IDS[:, 30:], attention_mask=mask, position_ids=places, **{CACHE: cache})
    cache.crop(-10)
    assert cache.get_seq_length() == 30
    torch.testing.assert_close(step(model, cache, mask), expected, rtol=0, atol=1e-12)
    cache.crop(-31)
    assert cache.get_seq_length() == 0


def test_a_crop_behind_dropped_keys_is_refused(filled):
    model, cache, mask = filled
    expected = step(model, copy.deepcopy(cache), mask)
    cache.crop(-1)
    step(model, cache, mask, at=29)
    with pytest.raises(ValueError, match=r"cannot go back from 30 tokens to 27: .* dropped at 28"):
        cache.layers[0].crop(-3)
    with pytest.raises(ValueError, match="31 cannot be removed"):
        cache.layers[0].crop(-31)
    with pytest.raises(ValueError, match="as a negative number"):
        cache.layers[0].crop(3)
    torch.testing.assert_close(step(model, cache, mask), expected, rtol=0, atol=1e-12)


def test_a_dense_pattern_is_cropped_at_any_time():
    model = make("llama", "all")
    _, cache = in_parts(model, IDS, split=SPLITS["prompt"])
    cache.crop(-25)
    found, _ = in_parts(model, IDS[:, 15:], split=[1], cache=cache)
    torch.testing.assert_close(found, whole(model, IDS)[:, 15:16], rtol=0, atol=1e-12)


@pytest.mark.parametrize("made", [lambda config: DynamicCache(), lambda config: DynamicCache(config=config)])
def test_a_cache_of_the_caller_drops_keys_as_well(made):
    model = make("llama", "window")
    cache = made(model.config)
    found, _ = in_parts(model, IDS, split=SPLITS["prompt"], cache=cache)
    torch.testing.assert_close(found, whole(model, IDS), rtol=0, atol=1e-12)
    assert {type(layer) for layer in cache.layers} == {PatternLayer}


# -- refusals ---------------------------------------------------------------------------------------------------------
@torch.no_grad()
def go_on(model, cache, rows=3, **given):
    model(IDS[:rows, 20:21], **given, **{CACHE: cache})


@torch.no_grad()
def begun(model, **given):
    return model(IDS[:, :20], use_cache=True, **given)[CACHE]


def test_a_model_without_a_pattern_does_not_take_the_cache():
    cache = begun(make("llama", "window"))
    with pytest.raises(ValueError, match="no other attention can compute with them"):
        go_on(tiny_llama().double().eval(), cache)


def test_another_pattern_does_not_take_the_cache():
    cache = begun(make("llama", "window"))
    with pytest.raises(ValueError, match="another attention pattern"):
        go_on(make("llama", "chunks"), cache)


def test_another_model_or_batch_does_not_take_the_cache():
    model = make("llama", "window")
    with pytest.raises(ValueError, match="another model or batch"):
        go_on(model, begun(model), rows=2)
    with pytest.raises(ValueError, match="another model or batch"):
        go_on(make("gpt2", "window"), begun(model))


def test_a_cache_that_has_dropped_keys_by_a_window_is_not_taken():
    config = MistralConfig(**tiny_llama().config.to_dict() | {"sliding_window": 6})
    cache = DynamicCache(config=config)
    keys = torch.zeros(3, 2, 20, 8, dtype=torch.double)
    for index in range(config.num_hidden_layers):
        cache.update(keys, keys, index)
    with pytest.raises(ValueError, match="has dropped keys"):
        go_on(make("llama", "window"), cache)


def test_the_mask_of_earlier_tokens_is_missed():
    model, mask = make("llama", "window"), padding("left")[:, :20]
    with pytest.raises(ValueError, match="earlier tokens had padding"):
        go_on(model, begun(model, attention_mask=mask))
    with pytest.raises(ValueError, match="1 columns for 21 tokens"):
        go_on(model, begun(model), attention_mask=torch.ones(3, 1, dtype=torch.long))


def test_keys_that_something_computes_with_on_the_way_are_refused(monkeypatch):
    update = PatternLayer.update
    monkeypatch.setattr(PatternLayer, "update", lambda *args, **kw: tuple(x.clone() for x in update(*args, **kw)))
    with pytest.raises(ValueError, match="no other attention can compute with them"):
        begun(make("llama", "window"))


def test_keys_of_which_nothing_is_known_are_refused(monkeypatch):
    def plain(*args, **kwargs):
        keys, values = update(*args, **kwargs)
        return keys.plain(), values

    model = make("llama", "window")
    cache, update = begun(model), PatternLayer.update
    monkeypatch.setattr(PatternLayer, "update", plain)
    with pytest.raises(ValueError, match="keys of 6 tokens for a row of 21"):
        go_on(model, cache)
    cache = begun(model)  # nothing is dropped yet
    with pytest.raises(ValueError, match="did not see the last tokens"):
        go_on(model, cache)


def test_held_keys_tell_their_size_and_refuse_the_rest():
    keys = HeldKeys.of(torch.zeros(1, 2, 3, 4), PatternLayer())
    assert (keys.shape, keys.dtype, keys.device.type, keys.size(2), keys.dim()) == (
        (1, 2, 3, 4), torch.float32, "cpu", 3, 4,
    )  # fmt: skip
    for operation in (lambda: keys + 1, lambda: keys.mT, lambda: keys[0], lambda: torch.cat([keys]), keys.contiguous):
        with pytest.raises(ValueError, match="make a new cache for a model without the pattern"):
            operation()
    assert type(keys.plain()) is torch.Tensor


def test_a_row_with_global_tokens_at_its_end_does_not_grow():
    model = make("llama", "ends")
    with pytest.raises(ValueError, match="global tokens at the end of the row"):
        go_on(model, begun(model))
    with pytest.raises(ValueError, match="changes with later ones"):
        model.generate(IDS, cache_implementation="static", **GENERATE)


def test_a_model_that_sees_later_tokens_does_not_grow():
    model = make("llama", "window")
    model.config.is_causal = False
    for layer in model.model.layers:
        layer.self_attn.is_causal = False
    with pytest.raises(ValueError, match="see later ones"):
        go_on(model, begun(model))


def test_the_body_of_a_model_takes_the_cache_as_well():
    model = make("llama", *DROPPING)
    cache = begun(model)
    with torch.no_grad():
        hidden = model.model(IDS[:, 20:21], **{CACHE: cache})[0]
        expected = model.model(IDS[:, :21], use_cache=False)[0][:, 20:]
        torch.testing.assert_close(hidden, expected, rtol=0, atol=1e-12)
        # By itself, the body has transformers' cache, which holds all tokens.
        made = model.model(IDS[:, :20], use_cache=True)[CACHE]
        torch.testing.assert_close(model.model(IDS[:, 20:21], **{CACHE: made})[0], expected, rtol=0, atol=1e-12)
    assert {type(layer) for layer in made.layers} == {DynamicLayer}
    assert {type(layer) for layer in begun(model).layers} == {PatternLayer}


@torch.no_grad()
def test_a_cache_is_made_where_transformers_makes_one():
    model = make("llama", "window")
    assert model(IDS)[CACHE].layers[0].keys.shape[2] == 5
    assert CACHE not in model(IDS, use_cache=False)
    model.config.use_cache = False
    assert CACHE not in model(IDS)
    # Documents of one row are found by transformers only where it makes the cache itself.
    places = torch.arange(20).repeat(2)[None]
    packed = make("llama", "window")(IDS[:1], position_ids=places, use_cache=False).logits
    torch.testing.assert_close(packed[:, 20:], whole(model, IDS[:1, 20:]), rtol=0, atol=1e-12)
    encoder = patterned(tiny_bert(), "window")
    assert torch.equal(encoder(IDS)[0], encoder(IDS)[0])


def test_a_model_whose_pattern_is_taken_off_has_its_stock_cache():
    model = make("llama", "window")
    model.__class__ = LlamaForCausalLM
    delattr(model.config, FIELD)
    model.set_attn_implementation("sdpa")
    found, cache = in_parts(model, IDS, split=SPLITS["prompt"])
    torch.testing.assert_close(found, whole(model, IDS), rtol=0, atol=1e-12)
    assert {type(layer) for layer in cache.layers} == {DynamicLayer}
    assert not any(module._forward_pre_hooks for module in model.modules())


# -- how many tokens --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", TERMS)
def test_tokens_kept_are_the_most_that_any_later_token_sees(name):
    pattern = Pattern(tuple(TERMS[name]), True)
    heads = HeadPatterns.of([pattern], 1)
    key = torch.arange(60)
    for length in (1, 7, 8, 30, 47):
        seen = [pattern.sees(torch.arange(now, 60)[:, None], key[None, :now], 60) for now in range(1, length + 1)]
        most = max(int(each.any(0).sum()) for each in seen)
        # Nothing is dropped where the last tokens are global: the row has no end yet.
        assert tokens_kept(heads, length) == (length if name == "ends" else most)


def test_a_window_beyond_the_row_keeps_all_of_it():
    assert tokens_kept(HeadPatterns.of([Pattern((Band(10**6),), True)], 1), 50) == 50


def test_products_of_unequal_lengths_leave_the_backends_as_they_were(monkeypatch):
    """On a device, cuDNN is not asked: it plans each number of keys anew."""
    seen = []

    class OnDevice:
        is_cuda = True

        def __init__(self, tokens):
            self.shape = (1, 2, tokens, 4)

    def attention(query, key, *_, **__):
        seen.append((query.shape[2], key.shape[2], torch.backends.cuda.cudnn_sdp_enabled()))
        if key.shape[2] == 7:
            raise RuntimeError("no room")

    monkeypatch.setattr(dense_attention.functional, "scaled_dot_product_attention", attention)
    allowed = torch.backends.cuda.cudnn_sdp_enabled()
    try:
        torch.backends.cuda.enable_cudnn_sdp(True)
        for query, key in ((1, 5), (5, 5)):
            kept.dense_product(OnDevice(query), OnDevice(key), OnDevice(key))
        with pytest.raises(RuntimeError, match="no room"):
            kept.dense_product(OnDevice(1), OnDevice(7), OnDevice(7))
        assert torch.backends.cuda.cudnn_sdp_enabled()
        torch.backends.cuda.enable_cudnn_sdp(False)
        kept.dense_product(OnDevice(5), OnDevice(5), OnDevice(5))
        assert not torch.backends.cuda.cudnn_sdp_enabled()
    finally:
        torch.backends.cuda.enable_cudnn_sdp(allowed)
    assert seen == [(1, 5, False), (5, 5, True), (1, 7, False), (5, 5, False)]
