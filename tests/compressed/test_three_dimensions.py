"""Parameters of three dimensions that are not experts do not keep a model from being stored in integers."""

from __future__ import annotations

import pytest
import torch

import hf_optim
from hf_optim.testing.sweep.checks import build
from hf_optim.testing.sweep.inputs import random_inputs


@pytest.mark.parametrize("name", ["XLNetLMHeadModel", "FunnelForMaskedLM"])
def test_other_stacks_than_experts_are_left_dense(tmp_path, name):
    model = hf_optim.optimize(build(name), {"technique": "rtn", "bits": 4, "group_size": 16})
    inputs = random_inputs(model, 0)
    with torch.no_grad():
        expected = model.eval()(**inputs)[0]
        model.save_pretrained(tmp_path)
        stock = type(model).from_pretrained(tmp_path)
        loaded = type(model).from_pretrained(tmp_path, optim_config="auto")
        assert torch.equal(stock(**inputs)[0], expected)
        assert torch.allclose(loaded(**inputs)[0], expected, rtol=1e-4, atol=1e-4)
