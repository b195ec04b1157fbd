"""Forwards that gradient checkpointing computes again in the backward, after others have changed what they used."""

from __future__ import annotations

import pytest
import torch
from tiny_models import tiny_llama
from torch.utils.checkpoint import checkpoint

import hf_optim
from hf_optim_plugins.attention._recomputed import Recomputed

IDS = torch.randint(3, 60, (2, 23), generator=torch.Generator().manual_seed(0))
STEPS = {
    "performer": {"features": 12, "redraw": 1},
    "rfa": {"features": 6, "draws": 8},
    "routing_transformer": {"clusters": 3, "window": 5, "init": "first_batch", "decay": 0.5, "commitment": 1.0},
    "sinkhorn": {"block": 4, "noise": 1.0},
}


@pytest.mark.many
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", STEPS)
def test_two_forwards_before_one_backward_have_the_gradients_of_each(name, reentrant):
    if reentrant and name == "routing_transformer":
        pytest.skip("refused: the commitment loss would have no gradient")
    found = []
    for checkpointing in (False, True):
        model = hf_optim.optimize(tiny_llama().double(), [{"technique": name, **STEPS[name]}]).train()
        if checkpointing:
            enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
            enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        first, second = (model(IDS + shift, labels=IDS, use_cache=False).loss for shift in (0, 1))
        (first + 2 * second).backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    for name, part in found[0].items():
        torch.testing.assert_close(found[1][name], part, rtol=0, atol=1e-9)


def test_a_forward_that_is_not_known_is_not_computed_with_values_of_another():
    forwards, weight = Recomputed(2), torch.ones(1, requires_grad=True)
    made = iter(range(9))

    def layer(x):
        return x * forwards.value(lambda: next(made))

    outs = [checkpoint(lambda x: layer(x) * weight, weight, use_reentrant=False) for _ in range(3)]
    outs[2].backward()
    assert weight.grad == 2 * 2
    with pytest.raises(ValueError, match="call backward after at most 2 forwards"):
        outs[0].backward()
