"""``report``: a summary, one row for layers of the same kind, and what ``accelerate`` would change."""

from __future__ import annotations

import json

import pytest
import torch
from tiny_models import tiny_llama
from transformers import AutoModelForCausalLM

import hf_optim
from hf_optim.compressed.packed import layer_report
from hf_optim.compressed.packed.layer_report import LayerReport, Report
from hf_optim.toolkit.exits import ExitSettings, attach_exits

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


@pytest.mark.filterwarnings("ignore::hf_optim.KernelWarning")
@pytest.mark.parametrize("decoded", [False, True], ids=["as loaded", "decompressed"])
def test_a_float32_model_on_a_cpu_is_promised_what_it_gets(four_bits, decoded):
    model = AutoModelForCausalLM.from_pretrained(four_bits, dtype=torch.float32)
    if decoded:
        model(torch.tensor([[1, 2]]))
    before = {row.name: row.reason for row in hf_optim.report(model)}
    after = {row.name: row.kernel for row in hf_optim.report(hf_optim.accelerate(model))}
    assert before.pop("lm_head") == "not compressed"
    for name, reason in before.items():
        kernel = after[name].partition(", with")[0]
        assert kernel.startswith("dense float32")
        assert reason == f"accelerate() was not called; it would run this layer on {kernel}"


@pytest.mark.filterwarnings("ignore::hf_optim.KernelWarning")
def test_layers_that_accelerate_leaves_alone_are_promised_nothing(four_bits):
    model = AutoModelForCausalLM.from_pretrained(four_bits)
    model(torch.tensor([[1, 2]]))
    first = model.model.layers[0]
    first.self_attn.k_proj.weight = first.self_attn.q_proj.weight
    first.mlp.up_proj.forward = lambda x: x
    names = [f"model.layers.0.{name}" for name in ("self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj")]
    before = {row.name: row.runs_on for row in hf_optim.report(model)}
    after = {row.name: row.runs_on for row in hf_optim.report(hf_optim.accelerate(model))}
    assert {name: before[name] for name in names} == {name: after[name] for name in names}
    assert "tied" in before[names[0]]
    assert "forward" in before[names[2]]


def test_the_pattern_of_codes_as_loaded_is_seen_by_a_sparse_kernel(tmp_path, monkeypatch):
    """Codes of a 2:4 weight run on the kernel for the pattern, which is found when they are decoded."""
    steps = [{"technique": "nm"}, {"technique": "rtn", "bits": 4, "group_size": 32, "symmetric": True}]
    hf_optim.optimize(tiny_llama(num_hidden_layers=1), {"steps": steps}).save_pretrained(tmp_path)
    taking = hf_optim.Kernel(
        "pairs", lambda weight: None if weight.sparse24 else "", lambda weight: None, sparse24=True
    )
    monkeypatch.setattr(layer_report, "kernels_for", lambda model: (taking,))
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    rows = [row for row in hf_optim.report(model) if row.name != "lm_head"]
    assert all(row.reason.endswith("it would run this layer on pairs") for row in rows)
    assert "weight_packed" in model.model.layers[0].mlp.up_proj._parameters  # it stays as it was


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


@pytest.mark.parametrize(
    ("step", "line"),
    [
        (
            {"technique": "kv_cache", "bits": 8, "group": 32},
            "keys and values: 8 bits in hf_optim.generate, scales of keys per channel, groups of 32 tokens, the latest "
            "128 in full precision",
        ),
        (
            {"technique": "calm", "threshold": 0.8, "layers": [0, 1], "guarantee": "none"},
            "early exit: tokens leave in hf_optim.generate after blocks 0, 1, softmax_gap from 0.8",
        ),
        (
            {"technique": "axial", "columns": 8},
            "attention: hf_optim_axial (first 0, rows 0, columns 8, axes 'layers'), attached",
        ),
    ],
    ids=lambda value: value["technique"] if isinstance(value, dict) else "",
)
def test_settings_of_a_model_have_a_line_each(step, line):
    model = hf_optim.optimize(tiny_llama(num_hidden_layers=BLOCKS), {"steps": [step]})
    report = hf_optim.report(model)
    assert report.settings == [line]
    assert str(report).splitlines()[1] == report.full().splitlines()[1] == line
    assert report.to_json()["settings"] == [line]


def test_exits_and_detached_attention_have_a_line_too():
    model = tiny_llama(num_hidden_layers=BLOCKS)
    attach_exits(model, ExitSettings((1,), heads="own"))
    assert hf_optim.report(model).settings == ["exits: after block 1, heads own"]
    axial = hf_optim.optimize(tiny_llama(), {"steps": [{"technique": "axial", "columns": 8}]})
    (line,) = hf_optim.report(hf_optim.restore(axial)).settings
    assert line.endswith("detached, the stock class's attention computes")
    assert "settings" not in hf_optim.report(tiny_llama()).to_json()
