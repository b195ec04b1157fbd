"""Checkpoints that llm-compressor and AutoRound wrote, through ``"auto"``: the perplexity that their README gives."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_optim
from hf_optim.evaluation.evaluate import perplexity

pytestmark = pytest.mark.real_model
# First 60 stories of eval.jsonl, windows of 256 tokens, float32; of the last it says that logits equal the stock ones.
PERPLEXITIES = {
    "llmcompressor-w4a16_asym_g32": 2.3423,
    "llmcompressor-w8a8_smooth": 2.3103,
    "auto_gptq": 2.3955,
    "auto_awq": 2.3910,
    "llmcompressor-mixed": None,
}


@pytest.fixture(scope="module")
def windows(shared_models, shared_data):
    tokenizer = AutoTokenizer.from_pretrained(shared_models / "babyllama-1m")
    lines = (shared_data / "tinystories" / "eval.jsonl").read_text(encoding="utf-8").splitlines()[:60]
    ids = [token for line in lines for token in tokenizer(json.loads(line)["text"], verbose=False).input_ids]
    return torch.tensor(ids[: len(ids) // 256 * 256]).view(-1, 256)


@pytest.mark.parametrize("name", PERPLEXITIES)
def test_auto_has_the_perplexity_of_its_readme(name, shared_checkpoints, windows):
    model = AutoModelForCausalLM.from_pretrained(shared_checkpoints / name, optim_config="auto", dtype=torch.float32)
    assert "35 of 36 linear layers on" in hf_optim.report(model).summary
    wanted = PERPLEXITIES[name]
    if wanted is None:
        stock = AutoModelForCausalLM.from_pretrained(shared_checkpoints / name, dtype=torch.float32)
        wanted = perplexity(stock, windows)["perplexity"]
    assert perplexity(model, windows)["perplexity"] == pytest.approx(wanted, abs=6e-5)
