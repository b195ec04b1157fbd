"""The order of a residual stream, read off the embeddings of two models."""

from __future__ import annotations

import copy

import torch
from tiny_models import tiny_bert, tiny_llama, tiny_t5

from hf_optim.toolkit.topology import find_residual_order, permute_residual_


def test_an_order_is_found_again_after_training_and_pruning():
    origin = tiny_llama()
    model = copy.deepcopy(origin)
    order = torch.randperm(32, generator=torch.Generator().manual_seed(0))
    permute_residual_(model, order)
    assert torch.equal(find_residual_order(model, origin), order)
    assert torch.equal(find_residual_order(origin, model), order.argsort())
    table = model.get_input_embeddings().weight
    with torch.no_grad():
        table += 0.3 * table.std() * torch.randn(table.shape, generator=torch.Generator().manual_seed(1))
        table *= torch.rand(table.shape, generator=torch.Generator().manual_seed(2)) < 0.8
    assert torch.equal(find_residual_order(model, origin), order)


def test_models_that_stand_alike_or_have_nothing_in_common_have_none():
    model = tiny_llama()
    assert find_residual_order(model, copy.deepcopy(model)) is None
    assert find_residual_order(model, tiny_llama(seed=1)) is None
    assert find_residual_order(model, tiny_llama(hidden_size=64)) is None
    assert find_residual_order(tiny_t5(), tiny_t5(seed=1)) is None
    assert find_residual_order(tiny_bert(), tiny_bert()) is None
