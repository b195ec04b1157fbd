"""Quantized caches, and calls in transformers' loop, for models with an attention pattern."""

from __future__ import annotations

import pytest
import torch
from patterned import patterned, registered
from tiny_models import tiny_llama
from transformers import DynamicCache

import hf_optim
from hf_optim import KeyValueScheme, ModelError
from hf_optim.generation.door import GenerationWarning
from hf_optim.generation.quantized_cache import QuantizedLayer, key_value_cache
from hf_optim.toolkit.compat import CACHE
from hf_optim.toolkit.quantization import set_scheme

IDS = torch.randint(3, 50, (2, 13), generator=torch.Generator().manual_seed(0))
SETTINGS = {"max_new_tokens": 12, "do_sample": False}


@pytest.fixture(autouse=True)
def _registered():
    with registered():
        yield


def make(*terms):
    torch.manual_seed(1)
    return patterned(tiny_llama(), *terms)


def test_layers_that_drop_keys_are_not_quantized():
    scheme = KeyValueScheme(8, residual=0)
    with pytest.raises(ModelError, match="an attention pattern, and holds few tokens"):
        key_value_cache(make("window"), scheme)
    assert {type(layer) for layer in key_value_cache(make("strided"), scheme).layers} == {QuantizedLayer}


def test_a_pattern_that_drops_nothing_runs_on_a_quantized_cache():
    model = make("strided")
    expected = model.generate(IDS, **SETTINGS)
    set_scheme(model.config, KeyValueScheme(8, residual=0))
    found = hf_optim.generate(model, IDS, return_dict_in_generate=True, **SETTINGS)
    assert {type(layer) for layer in found[CACHE].layers} == {QuantizedLayer}
    assert (found.sequences == expected).float().mean() > 0.8


def told_by(model, **given):
    with pytest.warns(GenerationWarning) as caught:
        found = hf_optim.generate(model, IDS, mode="eager", return_dict_in_generate=True, **SETTINGS, **given)
    (told,) = {str(each.message) for each in caught}
    return told, found


def test_what_has_no_slots_runs_in_the_loop_of_transformers_with_one_warning():
    model = make("strided")
    recording = DynamicCache(config=model.config)
    model(IDS[:, :6], use_cache=True, **{CACHE: recording})
    for layer in recording.layers:
        layer.activate_past_recording()
    told, _ = told_by(model, **{CACHE: recording})
    assert told == "generating in transformers' loop: the cache records its past, so that tokens can be taken back"

    set_scheme(model.config, KeyValueScheme(8, residual=0))
    told, _ = told_by(model)
    assert "under this attention pattern the cache has a QuantizedLayer" in told

    compressed = hf_optim.optimize(tiny_llama(), [{"technique": "compressed", "stride": 3, "local": 4}])
    told, found = told_by(compressed)
    assert "whose state cannot stay at one address" in told
    assert torch.equal(found.sequences, compressed.generate(IDS, **SETTINGS))
