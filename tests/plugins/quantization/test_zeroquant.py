"""ZeroQuant: its grids, their kernels, mixed bits, and real models at dense quality without calibration data."""

from __future__ import annotations

import csv
import re

import pytest
import torch
from real_stories import perplexity, windows
from tiny_models import tiny_bert, tiny_gpt2, tiny_llama
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

import hf_optim
from hf_optim import compressed, optimize
from hf_optim.errors import ModelError, NumericalError, RecipeError
from hf_optim.evaluation.evaluate import mean_pool
from hf_optim.evaluation.metrics import spearman
from hf_optim.runs.run import run_of
from hf_optim_plugins.quantization.zeroquant import ZeroQuant, row_groups

IDS = torch.randint(0, 64, (2, 12), generator=torch.Generator().manual_seed(0))
UP = "model.layers.0.mlp.up_proj"


def quantized(model=None, **fields):
    return optimize(tiny_llama() if model is None else model, ZeroQuant(**fields))


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def by_definition(x, weight, bits, groups):
    """The equations: each group of rows and each token on its own grid. Sums in float64.

    Codes in float32: the largest of a group lies in the middle between two.
    """
    levels = 2**bits - 1
    parts = []
    for part in weight.chunk(groups):
        t = part.abs().max() / (levels / 2)
        parts.append((part / t).round().clamp(-(levels + 1) / 2, (levels - 1) / 2).double() * t)
    s = x.abs().amax(-1, keepdim=True) / 127.5
    return ((x / s).round().clamp(-128, 127).double() * s) @ torch.cat(parts).T


@pytest.mark.many(every=4)
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(("groups", "used"), [(None, 48), (48, 48), (6, 6), (7, 6), (1, 1), (1000, 48)])
def test_a_layer_is_the_papers_equations(bits, groups, used):
    weight = tiny_llama().get_submodule(UP).weight.detach()
    layer = quantized(bits=bits, groups=groups).get_submodule(UP)
    assert len(layer.weight_scale.unique()) == used
    assert layer.weight_scale.shape == (48, 1)
    x = torch.randn(3, 5, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        y = layer(x).double()
    wanted = by_definition(x, weight, bits, used)
    assert float((y - wanted).norm() / wanted.norm()) < 1e-5


def test_finer_groups_have_a_smaller_error():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(48, 40, generator=generator) * torch.rand(48, 1, generator=generator)
    errors = [float((row_groups(weight, 4, g).nearest(weight) - weight).square().sum()) for g in (1, 4, 16, None)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < errors[0] / 2


def test_groups_along_the_inputs():
    layer = quantized(bits=4, group_size=20).get_submodule(UP)
    assert layer.weight_scale.shape == (48, 2)
    assert layer.quantization_scheme.weights.group_size == 16
    assert layer.quantization_scheme.input_activations.strategy == "token"


@pytest.mark.many(every=4)
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"groups": 4},
        {"bits": 4},
        {"bits": 4, "group_size": 16},
        {"bits": 4, "activations": None, "group_size": 16},
        {"symmetric_activations": False},
    ],
    ids=str,
)
def test_stock_transformers_reads_it(fields, tmp_path):
    model = quantized(**fields)
    expected = logits(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path).eval()), expected)


def test_it_needs_no_data():
    assert not ZeroQuant().needs_data()
    assert torch.equal(logits(quantized()), logits(optimize(tiny_llama(), ZeroQuant(), calibration=IDS)))


def test_two_steps_mix_bits():
    """The paper's W4/8: four bits in the feed-forward layers, eight in attention."""
    recipe = [
        {"technique": "zeroquant", "targets": ["*.self_attn.*"]},
        {"technique": "zeroquant", "targets": ["*.mlp.*"], "bits": 4, "groups": 8},
    ]
    model = optimize(tiny_llama(), recipe)
    bits = {n: m.quantization_scheme.weights.num_bits for n, m in compressed.quantized_modules(model).items()}
    assert len(bits) == 14
    assert all(width == (8 if "self_attn" in name else 4) for name, width in bits.items())
    assert run_of(model).record.steps["1"]["layers_by_bits"] == {"4": 6}
    weight = tiny_llama().get_submodule(UP).weight.detach()
    assert torch.equal(model.get_submodule(UP).weight, row_groups(weight, 4, 8).nearest(weight))


def test_assigned_bits_are_used():
    from hf_optim import Contract, Reload, Technique, hookimpl, technique
    from hf_optim.recipes.traits import BITS_ASSIGNED, FLOAT_WEIGHTS

    @technique(
        "planner",
        family="quantization",
        contract=Contract(needs={FLOAT_WEIGHTS}, adds={BITS_ASSIGNED}),
        reload=Reload.STOCK_DENSE,
    )
    class Planner(Technique):
        def needs_data(self):
            return False

        @hookimpl
        def calibrate(self, run, scope):
            yield
            run.bit_plan.update(dict.fromkeys((n for n in scope.linears if n.endswith("up_proj")), 3))
            run.cover(self, scope.linears)

    model = optimize(tiny_llama(), [Planner(), ZeroQuant()])
    assert model.get_submodule(UP).quantization_scheme.weights.num_bits == 3
    assert model.model.layers[0].mlp.gate_proj.quantization_scheme.weights.num_bits == 8
    assert run_of(model).record.steps["1"]["layers_by_bits"] == {"3": 2, "8": 12}


def test_kernels_support_groups_of_rows(monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: True)
    model = hf_optim.accelerate(quantized(bits=4, groups=4))
    assert all(row.kernel.startswith("w8a8") for row in hf_optim.report(model)[:-1])
    expected = logits(quantized(bits=4, groups=4))
    assert float((logits(model) - expected).norm() / expected.norm()) < 0.02
    with pytest.warns(hf_optim.KernelWarning, match="group size 16"):
        hf_optim.accelerate(quantized(bits=4, group_size=16))


def test_zeros_stay():
    model = tiny_llama()
    zeros = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            module.weight.data[module.weight.abs() < 0.1] = 0.0
            zeros[name] = module.weight == 0
    for name, module in compressed.quantized_modules(quantized(model, bits=4, groups=2)).items():
        assert bool((module.weight[zeros[name]] == 0).all())


def test_a_named_head_is_quantized_too():
    assert "lm_head" in compressed.quantized_modules(quantized(targets=("lm_head", "Linear")))


def test_refusals():
    with pytest.raises(RecipeError, match="exclude each other"):
        ZeroQuant(groups=4, group_size=16)
    with pytest.raises(ModelError, match=r"step 1 \(zeroquant\).*Conv1D"):
        quantized(tiny_gpt2())
    with pytest.raises(RecipeError, match="floating-point"):
        optimize(tiny_llama(), [{"technique": "zeroquant", "targets": ["*.mlp.*"]}, {"technique": "zeroquant"}])
    with pytest.raises(ModelError, match="quantized already"):
        optimize(tiny_llama(), [ZeroQuant(), ZeroQuant(targets=("*.mlp.*",))])
    model = tiny_bert()
    name, layer = next((n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear))
    layer.weight.data[0, 0] = float("inf")
    with pytest.raises(NumericalError, match=re.escape(f"{name}.weight: the weights of the model hold NaN")):
        quantized(model)


@pytest.mark.parametrize(
    ("fields", "words"),
    [({"groups": 4}, "group of rows (4 groups)"), ({"group_size": 8}, "up to 8 inputs"), ({}, "14 to 8 bits")],
)
def test_the_card(fields, words):
    class Card:
        def paragraph(self, title, markdown):
            self.text = markdown

    model, card = quantized(**fields), Card()
    run = run_of(model)
    run.recipe.steps[0].export(run, None, card)
    assert words in card.text


@pytest.mark.real_model
def test_int8_minilm_is_as_good_as_dense_without_data(minilm, shared_data):
    """Sentence vectors on a part of STS-B, dense and INT8."""
    with (shared_data / "stsb" / "test.tsv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))[::24]
    tokenizer = AutoTokenizer.from_pretrained(minilm)
    scores = torch.tensor([float(row["score"]) for row in rows])

    def quality(model):
        vectors = []
        for key in ("sentence1", "sentence2"):
            batch = tokenizer([row[key] for row in rows], padding=True, truncation=True, return_tensors="pt")
            with torch.no_grad():
                vectors.append(mean_pool(model, batch))
        return spearman(nn.functional.cosine_similarity(*vectors), scores)

    dense = quality(AutoModel.from_pretrained(minilm).eval())
    int8 = quality(quantized(AutoModel.from_pretrained(minilm).eval()))
    assert dense > 0.7
    assert abs(int8 - dense) < 0.005


def test_an_int8_language_model_is_as_good_as_dense_without_data(shared_models, shared_data):
    home = shared_models / "babyllama-1m"
    held_out = windows(home, shared_data, "eval", 4)
    dense = perplexity(AutoModelForCausalLM.from_pretrained(home).eval(), held_out)
    assert perplexity(quantized(AutoModelForCausalLM.from_pretrained(home).eval()), held_out) < 1.003 * dense
