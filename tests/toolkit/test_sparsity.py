"""Sparsity metrics of layers."""

from __future__ import annotations

import torch
from tiny_models import tiny_llama

from hf_optim.toolkit.pruning import sparsity


def test_metrics_and_table_rows_count_zeros_in_the_weights():
    model = tiny_llama()
    names = ["model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj", "lm_head"]
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[:24] = 0.0
        model.lm_head.weight[:16] = 0.0
    found = sparsity.metrics(model, names)
    assert found["layers"] == {names[0]: 0.5, names[1]: 0.0, "lm_head": 0.25}
    assert found["sparsity"] == round((768 + 512) / (2 * 1536 + 2048), 6)
    assert found["counted"] == {names[0]: [1536, 768], names[1]: [1536, 0], "lm_head": [2048, 512]}
    assert sparsity.table_rows(found["counted"]) == [
        ["lm_head", "1", "2,048", "25.0 %", "25.0 %", "25.0 %"],
        ["model.layers.*.mlp.up_proj", "2", "3,072", "25.0 %", "0.0 %", "50.0 %"],
    ]
    assert all(len(row) == len(sparsity.TABLE_HEADER) for row in sparsity.table_rows(found["counted"]))


def test_the_overall_share_counts_every_weight_once():
    """The mean of the layers' shares, 0.5, is not the share of the zeros among all weights."""
    model = tiny_llama()
    large, small = "lm_head", "model.layers.0.self_attn.k_proj"
    with torch.no_grad():
        model.lm_head.weight.zero_()
    found = sparsity.metrics(model, [large, small])
    assert found["layers"] == {large: 1.0, small: 0.0}
    assert found["sparsity"] == round(2048 / (2048 + 512), 6) == 0.8


def test_no_layers_have_no_zeros():
    assert sparsity.metrics(tiny_llama(), []) == {"sparsity": 0.0, "layers": {}, "counted": {}}
