"""``restore`` detaches attention: registries are as before, stock attention computes, ``accelerate`` brings it back."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from simulated_graphs import simulated_graphs
from tiny_models import TINY, tiny_bert, tiny_gpt2, tiny_llama, tiny_vit
from transformers import AttentionInterface, AutoModelForCausalLM
from transformers.masking_utils import AttentionMaskInterface

import hf_optim

IDS = torch.randint(3, 60, (2, 24), generator=torch.Generator().manual_seed(0))
IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
MASK = torch.ones_like(IDS)
MASK[1, :5] = 0

DETACHED = {
    "local": (tiny_gpt2, {"window": 4}),
    "blockwise": (tiny_gpt2, {"block": 8}),
    "strided": (tiny_llama, {"stride": 5, "window": 2}),
    "dilated": (TINY["opt"], {"window": 3, "dilation": [2]}),
    "sparse_transformer": (tiny_gpt2, {"stride": 6, "vertices": 2}),
    "axial": (tiny_vit, {}),
    "longformer": (tiny_bert, {"window": 4, "global_first": 1, "global_projections": True}),
    "etc": (tiny_bert, {"radius": 4}),
    "big_bird": (tiny_bert, {"block": 2, "random": 1}),
    "compressed": (tiny_llama, {"stride": 3, "local": 4}),
    "adaptive_span": (tiny_gpt2, {"max_span": 8}),
    "linformer": (tiny_bert, {"k": 4}),
    "performer": (tiny_gpt2, {"features": 8}),
    "rfa": (tiny_gpt2, {"features": 8}),
    "sinkhorn": (tiny_bert, {"block": 8}),
}
KEPT = {
    "reformer": (tiny_gpt2, {}),
    "routing_transformer": (tiny_bert, {"init": "first_batch"}),
    "set_transformer": (tiny_bert, {}),
    "transformer_xl": (tiny_gpt2, {}),
    "compressive_transformer": (tiny_llama, {"segment": 8, "memory": 8, "compressed": 4, "ratio": 2}),
}


@pytest.fixture(autouse=True)
def _without_models_of_other_tests():
    gc.collect()


def registered():
    return set(AttentionInterface()), set(AttentionMaskInterface())


def outputs(model, **more):
    images = model.main_input_name == "pixel_values"
    with torch.no_grad():
        return model(**({"pixel_values": IMAGES} if images else {"input_ids": IDS, **more})).logits


def changed(name, table):
    build, settings = table[name]
    stock = build().eval()
    return stock, hf_optim.optimize(copy.deepcopy(stock), [{"technique": name, **settings}]).eval()


@pytest.mark.many(every=4)
@pytest.mark.parametrize("name", DETACHED)
def test_a_restored_model_computes_stock_attention_and_leaves_the_registries(name):
    before = registered()
    stock, model = changed(name, DETACHED)
    own = model.config._attn_implementation
    assert own in registered()[0] - before[0]
    assert own in registered()[1] - before[1]
    expected, sparse = outputs(stock), outputs(model)
    assert not torch.equal(sparse, expected)
    hf_optim.restore(model)
    assert registered() == before
    assert torch.equal(outputs(model), expected)
    if model.main_input_name == "input_ids":
        torch.testing.assert_close(outputs(model, attention_mask=MASK), outputs(stock, attention_mask=MASK))
    hf_optim.restore(model)  # once more changes nothing
    hf_optim.accelerate(model)
    assert own in registered()[0] & registered()[1]
    assert torch.equal(outputs(model), sparse)
    hf_optim.restore(model)


@pytest.mark.many(every=4)
@pytest.mark.parametrize("name", KEPT)
def test_attention_that_no_stock_class_computes_stays(name):
    _, model = changed(name, KEPT)
    found, names = outputs(model), registered()
    hf_optim.restore(model)
    assert registered() == names
    assert torch.equal(outputs(model), found)


@pytest.mark.parametrize("name", ["local", "strided", "compressed", "performer"])
def test_a_restored_decoder_generates_as_the_stock_one(name):
    stock, model = changed(name, DETACHED)
    asked = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None, "attention_mask": MASK}
    with torch.no_grad():
        cache = model(IDS).past_key_values
    hf_optim.restore(model)
    assert torch.equal(model.generate(IDS, **asked), stock.generate(IDS, **asked))
    with pytest.raises(ValueError, match="detached from this model"):
        model(IDS[:, :1], past_key_values=cache)
    with simulated_graphs() as graphs, torch.no_grad():
        assert torch.equal(hf_optim.generate(model, IDS, mode="captured", **asked), stock.generate(IDS, **asked))
    assert graphs.captured


def test_a_name_stays_while_a_copy_uses_it():
    before = registered()
    _, model = changed("strided", DETACHED)
    copied, expected = copy.deepcopy(model), outputs(model)
    hf_optim.restore(model)
    assert copied.config._attn_implementation in registered()[0] & registered()[1]
    assert torch.equal(outputs(copied), expected)
    body = copied.base_model
    del copied
    with torch.no_grad():
        body(IDS)  # a body outlives its head
    del body
    assert registered() == before  # nor do names outlive their models


def test_an_implementation_may_be_chosen_for_a_restored_model():
    stock, model = changed("blockwise", DETACHED)
    hf_optim.restore(model)
    for name in ("eager", "sdpa"):
        model.set_attn_implementation(name)
        stock.set_attn_implementation(name)
        assert model.config._attn_implementation == name
        assert torch.equal(outputs(model), outputs(stock))


def test_a_restored_model_is_saved_with_its_pattern(tmp_path):
    stock, model = changed("local", DETACHED)
    sparse = outputs(model)
    hf_optim.restore(model).save_pretrained(tmp_path)
    # By the code of the checkpoint, whose classes are others.
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True).eval()
    own = loaded.config._attn_implementation
    assert torch.equal(outputs(loaded), sparse)
    hf_optim.restore(loaded)
    assert own not in registered()[0] | registered()[1]
    assert torch.equal(outputs(loaded), outputs(stock))
    hf_optim.accelerate(loaded)
    assert torch.equal(outputs(loaded), sparse)


def test_what_was_captured_is_dropped_with_the_pattern(monkeypatch):
    from hf_optim.toolkit.modules import graph_capture

    def record(run, restore, device, pool):
        run()
        return run, "pool"

    monkeypatch.setattr(graph_capture, "has_graphs", lambda device: True)
    monkeypatch.setattr(graph_capture, "_record", record)
    stock, model = changed("big_bird", DETACHED)
    forward = hf_optim.captured(model)
    with torch.no_grad():
        for _ in range(3):
            forward(input_ids=IDS)
        assert forward.graphs
        hf_optim.restore(model)
        for _ in range(4):
            assert torch.equal(forward(input_ids=IDS).logits, outputs(stock))
