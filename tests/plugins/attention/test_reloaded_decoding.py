"""A checkpoint with a pattern decodes with a cache that drops keys, before and after it is loaded again."""

from __future__ import annotations

import pytest
import torch
from tiny_models import tiny_gpt2, tiny_llama
from transformers import AutoModelForCausalLM

import hf_optim
from hf_optim.toolkit.compat import CACHE

IDS = torch.randint(3, 50, (2, 11), generator=torch.Generator().manual_seed(0))
SETTINGS = {"max_new_tokens": 30, "do_sample": False}
MODELS = {"llama": tiny_llama, "gpt2": tiny_gpt2}


STOCK = """
import torch
from transformers import AutoModelForCausalLM

loaded = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.double)
ids, mask = torch.tensor(ids), torch.tensor(mask)
out = loaded.generate(ids, attention_mask=mask, return_dict_in_generate=True, **settings)
layers = out[name].layers
with torch.no_grad():
    held = [layer.keys.shape[2] for layer in loaded(ids[:1, :10], use_cache=True)[name].layers]
result = [out.sequences.tolist(), [type(layer).__name__ for layer in layers], held]
"""


@pytest.mark.parametrize("name", MODELS)
def test_a_checkpoint_brings_its_cache(name, tmp_path, stock_python):
    torch.manual_seed(0)
    model = MODELS[name]().double()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    model = hf_optim.optimize(model, {"steps": [{"technique": "blockwise", "block": 8}]})
    model.save_pretrained(tmp_path)
    mask = torch.ones_like(IDS)
    mask[1, :4] = 0
    expected = model.generate(IDS, attention_mask=mask, use_cache=False, **SETTINGS)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True, dtype=torch.double)
    for each in (model, loaded, model):
        out = each.generate(IDS, attention_mask=mask, return_dict_in_generate=True, **SETTINGS)
        assert torch.equal(out.sequences, expected)
        assert {type(layer).__name__ for layer in out[CACHE].layers} == {"PatternLayer"}
    given = {"folder": str(tmp_path), "ids": IDS.tolist(), "mask": mask.tolist(), "settings": SETTINGS, "name": CACHE}
    done = stock_python.copy("".join(f"{key} = {value!r}\n" for key, value in given.items()) + STOCK)
    assert done.status == 0, done.err
    assert done.result == [expected.tolist(), ["PatternLayer"] * 2, [10 % 8] * 2]
