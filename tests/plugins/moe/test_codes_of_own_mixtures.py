"""Integer codes in mixtures whose code is saved with the checkpoint: what transformers reads without hf_optim."""

from __future__ import annotations

import pytest
import torch
from safetensors import safe_open
from tiny_models import tiny_llama, tiny_opt, tiny_t5, tiny_vit
from transformers import AutoModelForCausalLM

import hf_optim
from hf_optim import ModelError
from hf_optim.testing.tiny_runs import inputs_for

MOEFIED = {"technique": "moefication", "experts": 4, "active": 2, "epochs": 2}
RESIDUAL = {"technique": "pr_moe", "experts": [2, 4]}
VISION = {"technique": "vmoe", "experts": 4, "top_k": 2}
TASKS = {"technique": "task_moe", "tasks": ["de", "fr"], "experts": 4, "top_k": 2}
INT4, INT8 = {"technique": "rtn", "bits": 4, "group_size": 16}, {"technique": "rtn", "bits": 8}
ATTENTION = {"technique": "rtn", "bits": 4, "targets": ["*self_attn*"]}
FP8 = {"technique": "rtn", "scheme": "FP8"}

CASES = {
    "moefication": (tiny_llama, MOEFIED, INT4, "AutoModelForCausalLM"),
    "moefication with biases": (tiny_opt, MOEFIED, {"technique": "gptq", "bits": 4}, "AutoModelForCausalLM"),
    "pr_moe with biases": (tiny_opt, RESIDUAL, INT4, "AutoModelForCausalLM"),
    "vmoe": (tiny_vit, VISION, INT8, "AutoModelForImageClassification"),
    "task_moe": (tiny_t5, TASKS, INT4, "AutoModelForSeq2SeqLM"),
    "attention alone": (tiny_llama, MOEFIED, ATTENTION, "AutoModelForCausalLM"),
    "attention alone, with biases": (tiny_opt, RESIDUAL, ATTENTION, "AutoModelForCausalLM"),
    "float8": (tiny_llama, MOEFIED, FP8, "AutoModelForCausalLM"),
}


def mixture(build, step):
    dense = build()
    data = [inputs_for(dense, seed=seed) for seed in range(2)] if step["technique"] == "moefication" else None
    model = hf_optim.optimize(dense, [step], calibration=data)
    return (model if hf_optim.run_of(model).finished else hf_optim.advance(model)).eval()


def inputs_of(model, step):
    inputs = dict(inputs_for(model, seed=9))
    if step is TASKS:
        inputs["task_ids"] = torch.zeros(len(inputs["input_ids"]), dtype=torch.int64)
    return inputs


def expert_keys(folder):
    with safe_open(folder / "model.safetensors", "pt") as file:
        return [key for key in file.keys() if ".experts." in key and not key.endswith("_bias")]  # noqa: SIM118


@pytest.mark.many
@pytest.mark.parametrize("name", CASES)
def test_stock_transformers_reads_the_codes_bit_exact(name, tmp_path, stock):
    build, step, codes, auto_class = CASES[name]
    model = mixture(build, step)
    inputs = inputs_of(model, step)
    data = [inputs] if codes == FP8 or codes["technique"] == "gptq" else None
    model = hf_optim.optimize(model, [codes], calibration=data)
    with torch.no_grad():
        expected = model(**inputs).logits
    model.save_pretrained(tmp_path)
    assert torch.equal(stock.logits(tmp_path, auto_class, inputs, trust_remote_code=True)[1], expected)
    keys = expert_keys(tmp_path)
    if codes in (ATTENTION, FP8):
        assert keys
        assert all(key.endswith("_proj") for key in keys)
    else:
        assert all(key.endswith((".weight_packed", ".weight_scale", ".weight_shape", ".weight")) for key in keys)


@pytest.mark.parametrize("codes", [INT4, ATTENTION])
def test_one_recipe_and_a_checkpoint_on_kernels_compute_the_same(codes, tmp_path):
    tiny_llama().save_pretrained(tmp_path / "dense")
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    data = [inputs_for(dense, seed=seed) for seed in range(2)]
    model = hf_optim.optimize(dense, [MOEFIED, codes], calibration=data)
    inputs = inputs_for(model, seed=9)
    with torch.no_grad():
        expected = model(**inputs).logits
        model.save_pretrained(tmp_path)
        again = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True, optim_config="auto")
        torch.testing.assert_close(again(**inputs).logits, expected, rtol=0, atol=1e-5)
        packed = [row for row in hf_optim.report(again) if row.experts]
        assert len(packed) == (4 if codes is INT4 else 0)
        again.save_pretrained(tmp_path / "again")
        assert expert_keys(tmp_path / "again") == expert_keys(tmp_path)
        last = AutoModelForCausalLM.from_pretrained(tmp_path / "again", trust_remote_code=True)
        torch.testing.assert_close(last(**inputs).logits, expected, rtol=0, atol=1e-5)
        for name, parameter in model.named_parameters():
            assert name.endswith("_scale") or torch.equal(last.get_parameter(name), parameter)


def test_experts_in_floating_point_are_stored_as_before(tmp_path):
    model = mixture(tiny_llama, MOEFIED)
    model.save_pretrained(tmp_path)
    assert {key.rpartition(".")[2] for key in expert_keys(tmp_path)} == {"gate_up_proj", "down_proj"}
    again = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True)
    again.save_pretrained(tmp_path / "again")
    assert expert_keys(tmp_path / "again") == expert_keys(tmp_path)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"symmetric": False}, r"without zero points only\. Use symmetric: true, or leave its experts out"),
        ({"targets": ["*self_attn*", "*experts.0.down_proj"]}, "only if all or none of its experts are packed"),
    ],
)
def test_what_transformers_could_not_read_is_refused(fields, message):
    with pytest.raises(ModelError, match=message):
        hf_optim.optimize(mixture(tiny_llama, MOEFIED), [{**INT4, **fields}])


def test_zero_points_are_possible_beside_experts_in_floating_point(tmp_path, stock):
    model = hf_optim.optimize(mixture(tiny_llama, MOEFIED), [{**INT4, "symmetric": False, "skip": ["*.experts.*"]}])
    inputs = inputs_for(model, seed=9)
    with torch.no_grad():
        expected = model(**inputs).logits
    model.save_pretrained(tmp_path)
    assert torch.equal(stock.logits(tmp_path, "AutoModelForCausalLM", inputs, trust_remote_code=True)[1], expected)


NARROW = {
    "moefication": (
        tiny_llama,
        {**MOEFIED, "experts": 6},
    ),
    "pr_moe": (lambda: tiny_opt(ffn_dim=20), RESIDUAL),
    "vmoe": (lambda: tiny_vit(intermediate_size=20), VISION),
    "task_moe": (lambda: tiny_t5(d_ff=20), TASKS),
}


@pytest.mark.many
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", NARROW)
def test_experts_whose_rows_no_longer_fit_the_grouped_product_are_computed_without_it(name, dtype):
    build, step = NARROW[name]
    model = mixture(build, step)
    model.set_experts_implementation("grouped_mm")
    inputs = inputs_of(model, step)
    if "pixel_values" in inputs:
        inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    model.to(dtype)
    with torch.no_grad():
        found = model(**inputs).logits
        model.set_experts_implementation("eager")
        assert torch.equal(found, model(**inputs).logits)
