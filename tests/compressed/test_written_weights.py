"""RWKV models whose forward divides weights in place: refused, or run dense, since kernels have no such weights."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, RwkvConfig, RwkvForCausalLM

import hf_optim
from hf_optim.errors import ModelError

IDS = torch.arange(8)[None] + 3
STEP = {"technique": "rtn", "bits": 8}


def rwkv(**changes):
    config = RwkvConfig(vocab_size=64, hidden_size=32, num_hidden_layers=3, context_length=32, **changes)
    return RwkvForCausalLM(config).eval()


def logits(model):
    with torch.no_grad():
        return model.eval()(IDS).logits


@pytest.mark.filterwarnings("ignore::hf_optim.compressed.packed.packed_linear.KernelWarning")
@pytest.mark.parametrize("every", [0, 6])
def test_a_model_with_constant_weights_is_saved_and_loaded(tmp_path, every):
    model = hf_optim.optimize(rwkv(rescale_every=every), STEP)
    expected = logits(model)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, optim_config="auto")
    assert any(row.kernel for row in hf_optim.report(loaded)) is (every == 0)
    assert torch.allclose(logits(loaded), expected, atol=1e-5)
    assert torch.equal(logits(hf_optim.restore(loaded)), expected)


def test_a_model_that_divides_weights_is_refused(tmp_path):
    rwkv(rescale_every=2).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"divides weights in place every 2 layers: .* rescale_every=0"):
        AutoModelForCausalLM.from_pretrained(tmp_path, optim_config=STEP)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, optim_config=STEP, rescale_every=0)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.allclose(logits(model), logits(stock), rtol=0.05, atol=0.05)
