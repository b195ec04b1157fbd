"""Every reload level of the techniques of sparse attention and of ``mqa``, in a process that cannot import hf_optim."""

from __future__ import annotations

import pytest
import torch
from tiny_models import TINY, tiny_bert, tiny_gpt2, tiny_llama, tiny_vit
from transformers import BertModel

import hf_optim

IDS = torch.randint(3, 60, (2, 24), generator=torch.Generator().manual_seed(0))
IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
STOCK, REMOTE = "STOCK_ARCH", "REMOTE_CODE"


def encoder():
    return BertModel(tiny_bert().config)


LEVELS = [
    (STOCK, "MistralForCausalLM", tiny_llama, {"technique": "local", "window": 4}),
    (STOCK, "MinistralForCausalLM", tiny_llama, {"technique": "local", "window": 4, "full_layers": [1]}),
    (REMOTE, "LocalGPT2LMHeadModel", tiny_gpt2, {"technique": "local", "window": 4}),
    (REMOTE, "BlockwiseGPT2LMHeadModel", tiny_gpt2, {"technique": "blockwise", "block": 8}),
    (REMOTE, "StridedLlamaForCausalLM", tiny_llama, {"technique": "strided", "stride": 5, "window": 2}),
    (REMOTE, "DilatedOPTForCausalLM", TINY["opt"], {"technique": "dilated", "window": 3, "dilation": [2]}),
    (REMOTE, "CompressedLlamaForCausalLM", tiny_llama, {"technique": "compressed", "stride": 3, "local": 4}),
    (
        REMOTE,
        "SparseTransformerGPT2LMHeadModel",
        tiny_gpt2,
        {"technique": "sparse_transformer", "stride": 6, "vertices": 2},
    ),
    (REMOTE, "AxialViTForImageClassification", tiny_vit, {"technique": "axial"}),
    (REMOTE, "EtcBertModel", encoder, {"technique": "etc", "radius": 4}),
    (REMOTE, "LongformerBertModel", encoder, {"technique": "longformer", "window": 4}),
    (STOCK, "LongformerModel", encoder, {"technique": "longformer", "window": 4, "stock_class": True}),
    (REMOTE, "BigBirdBertModel", encoder, {"technique": "big_bird", "block": 4, "random": 1}),
    (STOCK, "LlamaForCausalLM", tiny_llama, {"technique": "mqa", "kv_heads": 1}),
    (STOCK, "GPTBigCodeForCausalLM", tiny_gpt2, {"technique": "mqa", "kv_heads": 1}),
    (REMOTE, "MqaGPT2LMHeadModel", tiny_gpt2, {"technique": "mqa", "kv_heads": 2}),
]


@pytest.mark.many("level", every=4)
@pytest.mark.parametrize(("level", "name", "build", "step"), LEVELS, ids=[each[1] for each in LEVELS])
def test_a_checkpoint_needs_no_hf_optim_at_its_level(level, name, build, step, tmp_path, stock):
    model = hf_optim.optimize(build(), [step]).eval()
    assert hf_optim.run_of(model).record.reload == level
    inputs = {"pixel_values": IMAGES} if model.main_input_name == "pixel_values" else {"input_ids": IDS}
    with torch.no_grad():
        found = model(**inputs)
    model.save_pretrained(tmp_path)
    auto = "AutoModelForCausalLM" if "CausalLM" in name or "LMHead" in name else "AutoModel"
    auto = "AutoModelForImageClassification" if "Image" in name else auto
    loaded = stock.load(tmp_path, auto, inputs, trust_remote_code=level == REMOTE)
    assert loaded.class_name == type(model).__name__ == name
    assert not loaded.missing
    expected = found.logits if "logits" in found else found[0]
    assert torch.equal(loaded.output, expected)
    if level == REMOTE:
        with pytest.raises(Exception, match="trust_remote_code"):
            stock.load(tmp_path, auto, inputs)
