"""``report``: a summary, one row for layers of the same kind, and what ``accelerate`` would change."""

from __future__ import annotations

import json

import pytest
import torch
from tiny_models import tiny_llama
from transformers import AutoModelForCausalLM

import hf_optim
from hf_optim.compressed.packed.layer_report import LayerReport, Report

BLOCKS = 3
NAMES = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")


@pytest.fixture(scope="module")
def four_bits(tmp_path_factory):
    model = tiny_llama(num_hidden_layers=BLOCKS).to(torch.bfloat16)
    home = tmp_path_factory.mktemp("report") / "w4"
    hf_optim.optimize(model, {"steps": [{"technique": "rtn", "bits": 4, "group_size": 32}]}).save_pretrained(home)
    return home


def test_a_dense_model_is_not_told_to_accelerate():
    report = hf_optim.report(tiny_llama(num_hidden_layers=BLOCKS))
    assert report.summary == f"all {7 * BLOCKS + 1} linear layers run dense (not compressed)"
    assert "accelerate" not in str(report) + report.full()


def test_layers_of_one_kind_are_one_row():
    report = hf_optim.report(tiny_llama(num_hidden_layers=BLOCKS))
    rows = str(report).splitlines()
    assert len(rows) == 3 + 8
    (row,) = [row for row in rows if row.startswith("model.layers.*.mlp.up_proj ")]
    assert row.split()[1:5] == [str(BLOCKS), str(report[5].shape[0]), "x", str(report[5].shape[1])]
    assert len(report) == len(report.layers) == len(report.full().splitlines()) - 3 == 7 * BLOCKS + 1


@pytest.mark.filterwarnings("ignore::hf_optim.KernelWarning")
@pytest.mark.parametrize("decoded", [False, True], ids=["as loaded", "decompressed"])
def test_what_accelerate_would_change_is_said_of_compressed_layers_alone(four_bits, decoded):
    model = AutoModelForCausalLM.from_pretrained(four_bits)
    if decoded:
        model(torch.tensor([[1, 2]]))
    before = hf_optim.report(model)
    reasons = {row.name: row.reason for row in before}
    assert reasons.pop("lm_head") == "not compressed"
    after = {row.name: row for row in hf_optim.report(hf_optim.accelerate(model))}
    for name, reason in reasons.items():
        promised = reason.startswith("accelerate() was not called; it would run this layer on ")
        assert promised == (after[name].kernel is not None), (reason, after[name])
    assert any(row.kernel for row in after.values())  # a CPU kernel reads 4-bit codes


def test_the_summary_counts_kernels_and_names_dense_layers():
    rows = [LayerReport(f"layers.{i}.{name}", (8, 8), "int4 (CPU), with others") for i in range(9) for name in NAMES]
    rows += [LayerReport(f"layers.{i}.up", (8, 8), "int8 (CPU)") for i in range(2)]
    rows += [LayerReport(f"layers.{i}.down", (8, 8), None, "172 inputs") for i in range(5)]
    rows += [LayerReport("lm_head", (8, 8), None, "not compressed")]
    assert Report(rows).summary == (
        "36 of 44 linear layers on int4 (CPU), 2 on int8 (CPU); 6 dense (layers.0.down, layers.1.down, layers.2.down "
        "and 2 more: 172 inputs; lm_head: not compressed)"
    )
    assert Report([]).summary == str(Report([])) == "no linear layers"


def test_json_has_every_layer():
    report = hf_optim.report(tiny_llama(num_hidden_layers=BLOCKS))
    document = json.loads(json.dumps(report.to_json()))
    assert document["summary"] == report.summary
    assert document["layers"][-1] == {
        "name": "lm_head", "shape": list(report[-1].shape), "kernel": None, "reason": "not compressed", "experts": 0,
    }  # fmt: skip
