"""Blocks that leave tensors to later blocks in a container (Gemma 3n) are calibrated in whole forwards."""

from __future__ import annotations

import pytest
from tiny_models import TINY

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
