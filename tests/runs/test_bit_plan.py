"""Bits assigned by one step and used by another: from the recipe to the checkpoint, and reloaded."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import tiny_bert, tiny_llama
from torch import nn
from transformers import AutoModelForCausalLM

import hf_optim
from hf_optim import OptimConfig, RecipeError, compressed, optimize
from hf_optim.calibration.block_journal import BlockJournal
from hf_optim.lifecycle.stages import start_run
from hf_optim.recipes.traits import BITS_ASSIGNED, QUANTIZED
from hf_optim.runs import snapshot
from hf_optim.runs.run import run_of
from hf_optim.testing.trait_checks import holds
from hf_optim.toolkit.quantization.bit_budget import row_bytes

IDS = torch.randint(3, 60, (4, 16), generator=torch.Generator().manual_seed(0))
ASSIGN = {"technique": "qbert", "assign_only": True, "budget": 3.5, "shards": 1, "rows": 1, "iterations": 2}
LATER = {
    "rtn": {"technique": "rtn", "bits": 8, "group_size": 16},
    "rtn, int8 inputs": {"technique": "rtn", "bits": 8, "activations": "int8"},
    "gptq": {"technique": "gptq", "group_size": 16},
    "obq": {"technique": "obq", "group_size": None},
}


def widths(model: nn.Module) -> dict[str, int]:
    return {name: m.quantization_scheme.weights.num_bits for name, m in compressed.quantized_modules(model).items()}


@pytest.mark.many
@pytest.mark.parametrize("later", LATER)
@pytest.mark.parametrize("build", [tiny_llama, tiny_bert], ids=["llama", "bert"])
def test_layers_carry_the_planned_bits_into_the_checkpoint_and_back(build, later, tmp_path, stock):
    model = build()
    model = optimize(model, [ASSIGN, LATER[later]], calibration=[{"input_ids": IDS}])
    run = run_of(model)
    assert {BITS_ASSIGNED, QUANTIZED} <= run.traits
    assert all(holds(trait, run) for trait in run.traits)
    assert len(set(run.bit_plan.values())) > 1
    assert widths(model) == run.bit_plan
    with torch.no_grad():
        expected = model(input_ids=IDS).logits
    model.save_pretrained(tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    for name, bits in run.bit_plan.items():
        layer = model.get_submodule(name)
        if f"{name}.weight_packed" in tensors:
            words = tensors[f"{name}.weight_packed"]
            assert words.numel() * 4 == layer.out_features * row_bytes(layer.in_features, bits)
        else:  # with quantized inputs, values take one byte each
            assert int(tensors[f"{name}.weight"].abs().max()) <= 2 ** (bits - 1)
    groups = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["config_groups"]
    assert {group["weights"]["num_bits"] for group in groups.values()} == set(run.bit_plan.values())
    auto = "AutoModelForCausalLM" if build is tiny_llama else "AutoModelForSequenceClassification"
    _, logits = stock.logits(tmp_path / "out", auto, {"input_ids": IDS})
    assert torch.equal(logits, expected)


def test_a_layer_without_a_plan_has_the_bits_of_the_step():
    partial = {**ASSIGN, "targets": ["re:.*mlp.*"]}
    model = optimize(tiny_llama(), [partial, {"technique": "rtn", "bits": 6}], calibration=IDS)
    plan = run_of(model).bit_plan
    assert all(".mlp." in name for name in plan)
    found = widths(model)
    assert {name: bits for name, bits in found.items() if name in plan} == plan
    assert {bits for name, bits in found.items() if name not in plan} == {6}


def test_input_quantization_alone_and_float8_ignore_the_plan():
    for fields in ({"bits": None, "activations": "int8"}, {"format": "fp8"}):
        model = optimize(tiny_llama(), [ASSIGN, {"technique": "rtn", **fields}], calibration=IDS)
        schemes = [m.quantization_scheme.weights for m in compressed.quantized_modules(model).values()]
        assert {scheme and scheme.num_bits for scheme in schemes} == ({None} if "activations" in fields else {8})


def test_unused_bits_are_refused():
    with pytest.raises(RecipeError, match=r"step 1 \(qbert\) must be followed by a quantization step"):
        OptimConfig.parse([ASSIGN]).check()
    with pytest.raises(RecipeError, match="must be followed by"):
        optimize(tiny_llama(), [ASSIGN], calibration=IDS)
    with pytest.raises(RecipeError, match=r"step 2 \(qbert\) needs a model that has floating-point"):
        optimize(tiny_llama(), [{"technique": "rtn"}, ASSIGN], calibration=IDS)


def test_a_killed_run_resumes_with_the_same_plan_and_bits(tmp_path, monkeypatch):
    steps = [ASSIGN, LATER["gptq"]]
    whole = optimize(tiny_llama(), steps, calibration=IDS)
    save = BlockJournal.save

    def killed(self, run, first, name):
        save(self, run, first, name)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(BlockJournal, "save", killed)
        with pytest.raises(KeyboardInterrupt):
            optimize(tiny_llama(), steps, calibration=IDS, journal=BlockJournal(tmp_path / "journal", resume=False))
    restored = []
    restore = BlockJournal.restore
    monkeypatch.setattr(BlockJournal, "restore", lambda *args: restored.append(restore(*args)) or restored[-1])
    resumed = optimize(tiny_llama(), steps, calibration=IDS, journal=BlockJournal(tmp_path / "journal", resume=True))
    assert restored == [True, False]
    assert run_of(resumed).bit_plan == run_of(whole).bit_plan
    for (name, a), (other, b) in zip(resumed.state_dict().items(), whole.state_dict().items(), strict=True):
        assert name == other
        assert torch.equal(a, b)
    assert widths(resumed) == widths(whole)


def test_a_snapshot_has_the_plan():
    model = optimize(tiny_llama(), [ASSIGN, LATER["rtn"]], calibration=IDS)
    run = run_of(model)
    tensors, meta = snapshot.take(run)
    other = start_run(run.recipe, model.config)
    assert other.bit_plan == {}
    snapshot.restore(other, tensors, json.loads(json.dumps(meta)))
    assert other.bit_plan == run.bit_plan
    assert BITS_ASSIGNED in other.traits


@pytest.mark.real_model
def test_a_real_model(shared_models, tmp_path, stock):
    """babyllama-1m: the plan is in the checkpoint, and stock transformers computes the same."""
    home = shared_models / "babyllama-1m"
    model = AutoModelForCausalLM.from_pretrained(home, dtype=torch.float32).eval()
    ids = torch.randint(3, model.config.vocab_size, (4, 64), generator=torch.Generator().manual_seed(0))
    model = hf_optim.optimize(model, [ASSIGN, {"technique": "gptq", "group_size": 32}], calibration=ids)
    plan = run_of(model).bit_plan
    assert len(plan) == 35
    assert len(set(plan.values())) == 3
    assert widths(model) == plan
    with torch.no_grad():
        expected = model(input_ids=ids).logits
    model.save_pretrained(tmp_path)
    assert torch.equal(stock.logits(tmp_path, "AutoModelForCausalLM", {"input_ids": ids})[1], expected)
