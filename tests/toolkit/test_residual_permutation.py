"""The residual-channel permutation between two models, determined from their embeddings."""

from __future__ import annotations

import copy

import torch
from tiny_models import tiny_bert, tiny_llama, tiny_t5

from hf_optim.toolkit.topology import find_residual_order, permute_residual_


def test_the_permutation_is_found_after_training_and_pruning():
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


def test_equal_or_unrelated_models_have_none():
    model = tiny_llama()
    assert find_residual_order(model, copy.deepcopy(model)) is None
    assert find_residual_order(model, tiny_llama(seed=1)) is None
    assert find_residual_order(model, tiny_llama(hidden_size=64)) is None
    assert find_residual_order(tiny_t5(), tiny_t5(seed=1)) is None
    assert find_residual_order(tiny_bert(), tiny_bert()) is None
