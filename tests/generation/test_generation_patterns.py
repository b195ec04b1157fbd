"""``hf_optim.generate`` and quantized caches for models with an attention pattern."""

from __future__ import annotations

import warnings

import pytest
import torch
from patterned import DROPPING, patterned, registered
from tiny_models import tiny_llama

import hf_optim
from hf_optim import KeyValueScheme, ModelError
from hf_optim.generation.door import GenerationWarning
from hf_optim.generation.quantized_cache import QuantizedLayer, key_value_cache
from hf_optim.toolkit.attention import PatternLayer
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


@pytest.mark.parametrize("mode", ["eager", "captured", "auto", "stock"])
def test_a_model_with_a_pattern_runs_in_the_loop_of_transformers_with_one_warning(mode):
    model = make(*DROPPING)
    mask = torch.ones_like(IDS)
    mask[1, :5] = 0
    given = {"attention_mask": mask, "return_dict_in_generate": True, **SETTINGS}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = hf_optim.generate(model, IDS, mode=mode, **given)
    assert torch.equal(found.sequences, model.generate(IDS, use_cache=False, **given).sequences)
    assert {type(layer) for layer in found[CACHE].layers} == {PatternLayer}
    told = [str(each.message) for each in caught if each.category is GenerationWarning]
    reason = "generating in transformers' loop: attention by a pattern keeps a cache of its own"
    assert told == ([reason] if mode in ("eager", "captured") else [])


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
