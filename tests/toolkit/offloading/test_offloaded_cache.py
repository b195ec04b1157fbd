"""Keys and values in host memory: the tokens of transformers' own cache, and half of the bytes of its offloaded one."""

from __future__ import annotations

import copy

import pytest
import torch
from late_link import LateLink
from tiny_models import tiny_gpt2, tiny_llama, tiny_t5
from transformers import DynamicCache, MistralConfig, MistralForCausalLM

import hf_optim
from hf_optim import KeyValueScheme, ModelError
from hf_optim.toolkit.compat import CACHE
from hf_optim.toolkit.offloading.cache import HostLayer
from hf_optim.toolkit.quantization import set_scheme


def generate(model, ids, cache=None, **more):
    given = {} if cache is None else {CACHE: cache}
    settings = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0, **more}
    return model.generate(input_ids=ids, **settings, **given)


@pytest.mark.many(every=4)
@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
@pytest.mark.parametrize("layers", [1, 2, 3, 5])
@pytest.mark.parametrize("beams", [1, 3])
def test_tokens_are_equal(make, layers, beams):
    name = "n_layer" if make is tiny_gpt2 else "num_hidden_layers"
    model = make(**{name: layers})
    ids = torch.randint(1, 60, (2, 11))
    cache = hf_optim.offloaded_cache(model, LateLink())
    assert all(type(layer) is HostLayer for layer in cache.layers)
    assert torch.equal(generate(model, ids, cache, num_beams=beams), generate(model, ids, num_beams=beams))


def test_it_grows_crops_and_starts_again():
    model = tiny_llama(num_hidden_layers=3, max_position_embeddings=1024)
    ids = torch.randint(1, 60, (2, 700))
    found = []
    for cache in (DynamicCache(config=model.config), hf_optim.offloaded_cache(model, LateLink())):
        with torch.no_grad():
            outputs = [model(input_ids=part, **{CACHE: cache}).logits for part in ids[:, :600].split(150, 1)]
            cache.crop(-20)
            outputs.append(model(input_ids=ids[:, 600:], **{CACHE: cache}).logits)
            assert cache.get_seq_length() == 680
            cache.batch_select_indices(torch.tensor([1]))
            outputs.append(model(input_ids=ids[1:, :5], **{CACHE: cache}).logits)
            cache.batch_repeat_interleave(2)
            outputs.append(model(input_ids=ids[:, :1], **{CACHE: cache}).logits)
        found.append(outputs)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("change", ["grow", "reorder"])
def test_no_copy_is_under_way_from_memory_that_is_given_up(change):
    """Freed pinned memory is unmapped, whatever still reads it."""
    model = tiny_llama(num_hidden_layers=4, max_position_embeddings=1024)
    link = LateLink()
    cache = hf_optim.offloaded_cache(model, link)
    with torch.no_grad():
        for _ in range(2):
            model(input_ids=torch.randint(1, 60, (2, 20)), **{CACHE: cache})
    first = cache.layers[0]
    cache.layers[-1].ring.fetch(first)
    assert any(source.data_ptr() == first.host.data_ptr() for _, source in link.waiting)
    former = first.host
    if change == "grow":
        first._grow(len(former) + 1)
    else:
        first.reorder_cache(torch.tensor([1, 0]))
    assert first.host is not former
    begin, end = former.data_ptr(), former.data_ptr() + former.numel()
    for target, source in link.waiting:
        assert not begin <= source.data_ptr() < end
        assert not begin <= target.data_ptr() < end


def test_a_step_moves_each_layer_once():
    model = tiny_llama(num_hidden_layers=4)
    link, ids = LateLink(), torch.randint(1, 60, (1, 30))
    cache = hf_optim.offloaded_cache(model, link)
    with torch.no_grad():
        model(input_ids=ids, **{CACHE: cache})
        model(input_ids=ids[:, :1], **{CACHE: cache})
        before = link.copied
        model(input_ids=ids[:, :1], **{CACHE: cache})
    token = cache.layers[0].host.shape[1]
    # The last layer has begun to fetch the first one again, with the new token.
    assert link.copied - before == 4 * (31 + 1) * token + token


INT4 = KeyValueScheme(4, "channel", 32, 8)
SCHEMES = {
    "int4": INT4,
    "int8 per token": KeyValueScheme(8, "token", residual=0),
    "float8": KeyValueScheme("float8", "channel", 32, 0),
}


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(("layers", "beams"), [(1, 1), (2, 3), (5, 1)])
def test_codes_give_the_tokens_of_codes_on_the_device(scheme, layers, beams):
    model = tiny_llama(num_hidden_layers=layers, max_position_embeddings=1024)
    ids = torch.randint(1, 60, (2, 90))
    found = []
    for cache in (
        hf_optim.key_value_cache(model, SCHEMES[scheme]),
        hf_optim.offloaded_cache(model, LateLink(), scheme=SCHEMES[scheme]),
    ):
        tokens = generate(model, ids, cache, num_beams=beams, max_new_tokens=45)
        found.append((tokens, [layer.quantized for layer in cache.layers], cache.layers[0].decoded()))
    assert torch.equal(found[0][0], found[1][0])
    assert found[0][1] == found[1][1]
    assert found[0][1][0] > 0
    assert all(torch.equal(a, b) for a, b in zip(found[0][2], found[1][2], strict=True))


def test_codes_grow_crop_and_start_again():
    model = tiny_llama(num_hidden_layers=3, max_position_embeddings=2048)
    ids = torch.randint(1, 60, (2, 1300))
    found = []
    for cache in (
        hf_optim.key_value_cache(model, INT4),
        hf_optim.offloaded_cache(model, LateLink(), scheme=INT4),
    ):
        with torch.no_grad():
            outputs = [model(input_ids=part, **{CACHE: cache}).logits for part in ids[:, :1200].split(150, 1)]
            cache.crop(-45)
            outputs.append(model(input_ids=ids[:, 1200:], **{CACHE: cache}).logits)
            cache.batch_select_indices(torch.tensor([1]))
            outputs.append(model(input_ids=ids[1:, :5], **{CACHE: cache}).logits)
            cache.batch_repeat_interleave(2)
            outputs.append(model(input_ids=ids[:, :1], **{CACHE: cache}).logits)
            for layer in cache.layers:
                layer.reset()
            outputs.append(model(input_ids=ids[:, :40], **{CACHE: cache}).logits)
        found.append(outputs)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_the_models_setting_quantizes_and_codes_move_as_codes():
    model, link = tiny_llama(num_hidden_layers=4, max_position_embeddings=2048), LateLink()
    set_scheme(model.config, INT4)
    cache = hf_optim.offloaded_cache(model, link)
    ids = torch.randint(1, 60, (1, 600))
    with torch.no_grad():
        model(input_ids=ids, **{CACHE: cache})
        model(input_ids=ids[:, :1], **{CACHE: cache})
        before = link.copied
        model(input_ids=ids[:, :1], **{CACHE: cache})
    size = cache.layers[0].host.numel()
    assert link.copied - before == 4 * size  # nothing goes back: no step of tokens became codes
    plain = 2 * model.config.hidden_size // 2 * 4 * 602
    assert size < 0.8 * plain  # heads of 8 channels are padded to 16, and room for 512 tokens is moved


@pytest.mark.parametrize("scheme", [None, INT4])
def test_a_copied_cache_is_another_one(scheme):
    """As prompts that are read once are: transformers' documents copy their cache for each continuation."""
    model = tiny_llama(num_hidden_layers=3, max_position_embeddings=1024)
    ids = torch.randint(1, 60, (1, 80))
    stock = DynamicCache(config=model.config) if scheme is None else hf_optim.key_value_cache(model, scheme)
    found = []
    for cache in (stock, hf_optim.offloaded_cache(model, LateLink(), scheme=scheme)):
        with torch.no_grad():
            model(input_ids=ids, **{CACHE: cache})
            parts = []
            for seed in range(3):
                own = copy.deepcopy(cache)
                more = torch.randint(1, 60, (1, 40), generator=torch.Generator().manual_seed(seed))
                parts += [model(input_ids=part, **{CACHE: own}).logits for part in more.split(20, 1)]
            parts.append(model(input_ids=ids[:, :3], **{CACHE: cache}).logits)
        found.append(parts)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("scheme", [None, INT4])
def test_no_copy_is_under_way_from_a_cache_that_is_gone(scheme):
    model, link = tiny_llama(num_hidden_layers=4), LateLink()
    cache = hf_optim.offloaded_cache(model, link, scheme=scheme)
    with torch.no_grad():
        for _ in range(2):
            model(input_ids=torch.randint(1, 60, (1, 20)), **{CACHE: cache})
    assert link.waiting
    hosts = [layer.host.data_ptr() for layer in cache.layers]
    del cache
    assert not {pointer for pair in link.waiting for pointer in (pair[0].data_ptr(), pair[1].data_ptr())} & set(hosts)


def test_a_buffer_that_is_too_small_is_not_given_up_while_it_is_copied():
    model, link = tiny_llama(num_hidden_layers=4, max_position_embeddings=2048), LateLink()
    cache = hf_optim.offloaded_cache(model, link)
    with torch.no_grad():
        model(input_ids=torch.randint(1, 60, (1, 20)), **{CACHE: cache})
        ring = cache.layers[0].ring
        slots = [slot for slot in ring.slots if slot is not None]
        for slot in range(2):
            ring.room(slot, torch.empty(len(slots[slot]) + 1, dtype=torch.uint8))
    old = {slot.data_ptr() for slot in slots}
    assert not {side.untyped_storage().data_ptr() for pair in link.waiting for side in pair} & old


def test_windows_stay_on_the_device():
    config = MistralConfig(
        hidden_size=32, intermediate_size=64, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=2,
        vocab_size=64, sliding_window=8,
    )  # fmt: skip
    model = MistralForCausalLM(config).eval()
    cache = hf_optim.offloaded_cache(model, LateLink())
    assert not any(isinstance(layer, HostLayer) for layer in cache.layers)


def test_what_is_refused():
    with pytest.raises(ModelError, match="keys and values are in host memory already"):
        hf_optim.offloaded_cache(tiny_llama())
    with pytest.raises(ModelError, match="t5 has an encoder"):
        hf_optim.offloaded_cache(tiny_t5(), LateLink())
