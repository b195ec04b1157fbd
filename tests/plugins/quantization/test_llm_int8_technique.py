"""LLM.int8(): its decomposition against float64, the checkpoint, and synthetic outliers on a real model."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from exported import exported
from real_stories import perplexity, windows
from tiny_models import tiny_gpt2, tiny_llama
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM

import hf_optim
from hf_optim import OptimConfig, compressed, optimize
from hf_optim.checkpoints.dense import convert_to_dense
from hf_optim.compressed.outlier_columns import outlier_thresholds, set_outlier_threshold
from hf_optim.compressed.packed.accelerate import kernels_for
from hf_optim.compressed.packed.swap import prepack as prepack_first
from hf_optim.compressed.weights import Codes, QuantizedWeight
from hf_optim.errors import ModelError, NumericalError, RecipeError
from hf_optim.runs.run import run_of
from hf_optim.testing.outliers import add_synthetic_outliers
from hf_optim.toolkit import topology
from hf_optim_plugins.quantization.llm_int8 import LLMInt8, kernel

IDS = torch.randint(0, 64, (2, 12), generator=torch.Generator().manual_seed(0))
UP = "model.layers.0.mlp.up_proj"


def quantized(model=None, **fields):
    return optimize(tiny_llama() if model is None else model, LLMInt8(**fields))


def on_kernel(model):
    return hf_optim.accelerate(model, [kernel(everywhere=True)])


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def inputs(rows=7, columns=32, outliers=((2, 5), (6, 31))):
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(1)).clamp(-4, 4)
    for row, column in outliers:
        x[row, column] = 50.0 - row
    return x


def by_definition(x, dense, threshold):
    """The paper's sums, entry by entry, in float64, from the dense weight [out, in]."""
    t = dense.double().abs().amax(1) / 127
    w = (dense.double() / t[:, None]).round()
    x = x.double()
    apart = [k for k in range(x.shape[1]) if bool((x[:, k].abs() > threshold).any())]
    y = torch.zeros(len(x), len(dense), dtype=torch.float64)
    for m, row in enumerate(x):
        s = max((float(abs(v)) for v in row if abs(v) <= threshold), default=0.0) / 127
        for k, v in enumerate(row):
            value = float(v) if k in apart else s * round(float(v) / s)
            y[m] += value * w[:, k] * t
    return y


def close(y, reference, bound=1e-6):
    return float((y.double() - reference).norm() / reference.norm()) < bound


@pytest.mark.parametrize("threshold", [6.0, 48.5, 2.0])
def test_a_layer_is_the_papers_decomposition(threshold):
    dense = tiny_llama().get_submodule(UP).weight.detach()
    layer = on_kernel(quantized(threshold=threshold)).get_submodule(UP)
    x = inputs()
    with torch.no_grad():
        assert close(layer(x), by_definition(x, dense, threshold))


def test_threshold_zero_is_the_decoded_layer_and_none_is_vectorwise_int8():
    dense = tiny_llama().get_submodule(UP).weight.detach()
    x = inputs()
    with torch.no_grad():
        nothing = quantized(threshold=0.0).get_submodule(UP)
        decoded = x.double() @ nothing.weight.double().T
        assert close(nothing(x), decoded)  # stock transformers' own forward
        assert close(on_kernel(quantized(threshold=0.0)).get_submodule(UP)(x), decoded)
        everything = on_kernel(quantized(threshold=None)).get_submodule(UP)(x)
        assert close(everything, by_definition(x, dense, float("inf")))
        assert not close(everything, decoded, 1e-3)


def test_the_largest_weight_of_a_row_has_the_last_code():
    dense, model = tiny_llama(), tiny_llama()
    for one in (dense, model):
        one.get_submodule(UP).weight.data[3] = 0.0
    layer = quantized(model).get_submodule(UP)
    weight, scale = dense.get_submodule(UP).weight.detach(), layer.weight_scale
    assert scale.shape == (48, 1)
    torch.testing.assert_close(scale[:3], weight[:3].abs().amax(1, keepdim=True) / 127)
    assert bool(((layer.weight - weight).abs() <= scale * 0.5001).all())
    codes = layer.weight / scale
    assert int(codes.round().abs().max()) == 127
    assert bool((layer.weight[3] == 0).all())


def test_the_checkpoint_is_stock_and_keeps_the_threshold(tmp_path):
    model = quantized(threshold=4.5, skip=("*.down_proj",))
    expected = logits(model)
    model.save_pretrained(tmp_path / "first")
    config = json.loads((tmp_path / "first" / "config.json").read_text())
    (entry,) = config["hf_optim"]["outliers"]
    assert entry["threshold"] == 4.5
    assert "model.layers.*.mlp.up_proj" in entry["modules"]
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "first").eval()
    assert torch.equal(logits(stock), expected)
    # What stock transformers does not know, it keeps.
    stock.config.save_pretrained(tmp_path / "second")
    assert json.loads((tmp_path / "second" / "config.json").read_text())["hf_optim"] == config["hf_optim"]
    served = {row.name: row.kernel for row in hf_optim.report(on_kernel(stock))}
    assert served[UP] == "llm_int8 int8 product of PyTorch (outliers above 4.5), with gate_proj"
    assert served["model.layers.0.mlp.down_proj"] is None
    assert torch.equal(logits(stock), logits(on_kernel(model)))
    hf_optim.restore(stock)
    assert torch.equal(logits(stock), expected)


def test_the_base_model_of_a_checkpoint_is_supported_too(tmp_path):
    quantized(threshold=4.5).save_pretrained(tmp_path)
    base = on_kernel(AutoModel.from_pretrained(tmp_path))
    assert base.layers[0].mlp.up_proj.packed_weight.fused.threshold == 4.5


def test_a_packed_checkpoint_loads_onto_the_kernel(tmp_path, monkeypatch):
    """Small layers are left to the decoded weight on a CPU; here every layer counts as large."""
    from hf_optim_kernels.llm_int8 import cpu

    model = quantized()
    model.save_pretrained(tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, optim_config="auto")
    assert "llm_int8" not in str(hf_optim.report(plain))
    assert torch.equal(logits(plain), logits(model))
    monkeypatch.setattr(cpu, "LEAST_WEIGHTS", 1)
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: True)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, optim_config="auto")
    kernels = {row.kernel for row in hf_optim.report(loaded)[:-1]}
    assert all(name.startswith("llm_int8") for name in kernels)
    assert torch.equal(logits(loaded), logits(on_kernel(model)))


def test_dense_removes_the_threshold():
    model = quantized()
    convert_to_dense(model)
    assert not hasattr(model.config, "hf_optim")
    assert not compressed.quantized_modules(model)


def test_other_steps_and_other_layers_do_not_change():
    recipe = OptimConfig.parse([{"technique": "llm_int8", "targets": ["*.mlp.*"], "threshold": 3.0}])
    model = on_kernel(optimize(tiny_llama(), recipe))
    names = list(topology.linears(model))
    assert set(outlier_thresholds(model, names)) == {name for name in names if ".mlp." in name}
    assert model.model.layers[0].self_attn.q_proj.weight.dtype == torch.float32
    set_outlier_threshold(model, [UP], 5.0)
    found = outlier_thresholds(model, names)
    assert found[UP] == 5.0
    assert found["model.layers.1.mlp.up_proj"] == 3.0
    with pytest.raises(ValueError, match="finite"):
        set_outlier_threshold(model, [UP], float("nan"))


def test_names_under_wrappers_are_found():
    model = quantized()
    wrapped = nn.ModuleDict({"base_model": nn.ModuleDict({"model": model})})
    assert outlier_thresholds(wrapped, [f"base_model.model.{UP}"]) == {f"base_model.model.{UP}": 6.0}
    assert outlier_thresholds(model, [f"{UP}.base_layer", "model.layers.0.mlp"]) == {f"{UP}.base_layer": 6.0}


def test_a_named_head_is_quantized_too():
    model = quantized(targets=("lm_head", "Linear"))
    assert len(compressed.quantized_modules(model)) == 15
    assert "lm_head" in outlier_thresholds(model, ["lm_head"])


def test_zeros_stay():
    model = tiny_llama()
    zeros = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            module.weight.data[module.weight.abs() < 0.1] = 0.0
            zeros[name] = module.weight == 0
    for name, module in compressed.quantized_modules(quantized(model)).items():
        assert bool((module.weight[zeros[name]] == 0).all())


def test_refusals():
    with pytest.raises(ModelError, match=r"step 1 \(llm_int8\).*Conv1D"):
        quantized(tiny_gpt2())
    for wrong in (-1.0, float("inf")):
        with pytest.raises(RecipeError, match="threshold"):
            LLMInt8(threshold=wrong)
    model = tiny_llama()
    model.get_submodule(UP).weight.data[0, 0] = float("nan")
    with pytest.raises(NumericalError, match=r"mlp\.up_proj\.weight: the weights of the model hold NaN"):
        quantized(model)


def described(device, **changes):
    about = {
        "name": "layer", "shape": (2048, 2048), "dtype": torch.bfloat16, "device": torch.device(device), "kind": "int",
        "bits": 8, "group_size": 2048, "symmetric": True, "ordered": False, "inputs": None, "sparse24": False,
        "bias": None, "codes": lambda: Codes(torch.empty(0), None, None), "outliers": 6.0,
    }  # fmt: skip
    return QuantizedWeight(**about | changes)


def test_what_the_kernel_supports(monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    supports = kernel().supports
    assert supports(described("cuda")) is None
    assert supports(described("cpu")) is None
    assert supports(described("cuda", outliers=None)) == ""
    assert "faster dense" in supports(described("cpu", shape=(64, 64)))
    assert kernel(everywhere=True).supports(described("cpu", shape=(64, 64))) is None
    assert "float64" in supports(described("cuda", dtype=torch.float64))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert "compute capability" in supports(described("cuda"))


def test_the_weight_only_kernel_is_tried_after_it(monkeypatch):
    def prepack(weight):
        raise ValueError("not now")

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    installed = kernels_for(quantized())
    assert kernel() in installed
    tried = prepack_first(described("cuda"), [replace(each, prepack=prepack) for each in installed])
    assert tried == "llm_int8: not now; wna16: not now"


def test_the_record_and_the_card():
    model = quantized(threshold=4.5)
    assert run_of(model).record.steps["0"]["layers"] == 14
    (text,) = exported(model).paragraphs.values()
    assert "14 linear layers" in text
    assert "above 4.5" in text


@pytest.mark.slow
def test_synthetic_outliers_do_not_hurt_it_while_they_break_naive_int8(shared_models, shared_data):
    home = shared_models / "babyllama-1m"
    ids = windows(home, shared_data, "eval", 8)
    dense = perplexity(AutoModelForCausalLM.from_pretrained(home).eval(), ids)

    def with_outliers():
        model = AutoModelForCausalLM.from_pretrained(home).eval()
        add_synthetic_outliers(model, factor=20.0, sample={"input_ids": ids})
        return model

    static = {"technique": "rtn", "activations": "int8", "dynamic": False, "symmetric_activations": False}
    assert perplexity(optimize(with_outliers(), static, calibration=[{"input_ids": ids}]), ids) > 1.10 * dense
    apart = perplexity(on_kernel(quantized(with_outliers())), ids)
    assert apart < 1.01 * dense
    assert perplexity(on_kernel(quantized(with_outliers(), threshold=None)), ids) > apart
