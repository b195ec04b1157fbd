"""Blocks that leave tensors to later blocks in a container (Gemma 3n) are calibrated in whole forwards."""

from __future__ import annotations

import pytest
import torch
from tiny_models import TINY
from transformers import AlbertConfig, AlbertForSequenceClassification

import hf_optim
from hf_optim.testing.sweep.checks import build
from hf_optim.testing.sweep.inputs import random_inputs
from hf_optim.toolkit import topology


@pytest.fixture(scope="module")
def gemma3n():
    pytest.importorskip("transformers.models.gemma3n")
    return build("Gemma3nForCausalLM")


def test_the_blocks_are_found_and_what_they_exchange_is_named(gemma3n):
    assert len(topology.blocks(gemma3n)) == gemma3n.config.num_hidden_layers
    assert "reads a tensor that" in topology.exchanged_state(gemma3n)


@pytest.mark.parametrize("name", TINY)
def test_other_blocks_exchange_only_what_they_return(name):
    assert topology.exchanged_state(TINY[name]()) == ""


def test_they_are_calibrated_in_whole_forwards(gemma3n):
    batches = [random_inputs(gemma3n, seed) for seed in range(2)]
    step = {"technique": "nm", "score": "activation"}
    with pytest.raises(
        hf_optim.ModelError, match=r"driver blockwise: .* reads a tensor that .* use driver: whole_model"
    ):
        hf_optim.optimize(build("Gemma3nForCausalLM"), {"steps": [step], "driver": "blockwise"}, calibration=batches)
    run = hf_optim.run_of(hf_optim.optimize(gemma3n, step, calibration=batches))
    assert run.record.stages[0]["driver"] == "whole_model"


def test_a_block_that_is_applied_again_is_calibrated_on_all_of_its_inputs():
    config = AlbertConfig(
        vocab_size=64, embedding_size=16, hidden_size=32, intermediate_size=48, num_attention_heads=4,
        num_hidden_layers=3,
    )  # fmt: skip
    torch.manual_seed(0)
    albert = AlbertForSequenceClassification(config).eval()
    tied = hf_optim.optimize(TINY["llama"](), [{"technique": "universal_transformer", "steps": 3}])
    for model, part in ((albert, "ffn"), (tied, "mlp.down_proj")):
        assert "is applied several times" in topology.exchanged_state(model)
        rows = []
        layer = next(module for name, module in model.named_modules() if name.endswith(part))
        handle = layer.register_forward_pre_hook(
            lambda module, args, rows=rows: rows.append(args[0].shape[:-1].numel())
        )
        batches = [{"input_ids": torch.randint(3, 60, (2, 12))}]
        found = hf_optim.optimize(model, [{"technique": "gptq", "bits": 8}], calibration=batches)
        handle.remove()
        assert hf_optim.run_of(found).record.stages[0]["driver"] == "whole_model"
        assert sum(rows) >= 3 * 24
