"""A compressed checkpoint that stock transformers could not load is refused before any work."""

from __future__ import annotations

import json

import pytest
import torch
from renamed_families import EXPERTS, IDS, IMAGES, TEXT, TEXTS, VISION, build_family
from tiny_models import tiny_llama, tiny_t5
from transformers import (
    AutoModelForImageClassification,
    Dinov2Config,
    Dinov2ForImageClassification,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersForImageClassification,
    Llama4ForCausalLM,
    Llama4TextConfig,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

import hf_optim
from hf_optim import ModelError, compressed
from hf_optim.cli import main
from hf_optim.compressed import reload_check
from hf_optim.compressed.reload_check import reload_problem
from hf_optim.runs.run import run_of
from hf_optim.runs.scope import Scope
from hf_optim.toolkit.topology.trace_cache import StructureCache

W4 = {"technique": "rtn", "bits": 4, "group_size": 16}
W8A8 = {"technique": "rtn", "bits": 8, "activations": "int8"}
FP8 = {"technique": "rtn", "bits": 8, "format": "fp8"}
STORED = {
    "w4": compressed.scheme(4),
    "w8a8": compressed.scheme(8, activations="int8"),
    "fp8": compressed.scheme(8, "float"),
}
SMALL = {"input_ids": IDS % 60}
LLAMA4 = {"num_local_experts": 4, "num_experts_per_tok": 1, "interleave_moe_layer_step": 1, "attention_chunk_size": 64}


def dinov2(cls=Dinov2ForImageClassification, config=Dinov2Config, **changes):
    torch.manual_seed(0)
    sizes = {key: value for key, value in VISION.items() if key != "intermediate_size"}
    return cls(config(**sizes, **changes)).eval()


def llama4():
    torch.manual_seed(0)
    return Llama4ForCausalLM(Llama4TextConfig(**TEXT, **LLAMA4, intermediate_size_mlp=64)).eval()


MODELS = {
    "dinov2": (dinov2, IMAGES),
    "dinov2 giant": (lambda: dinov2(use_swiglu_ffn=True), IMAGES),
    "dinov2 registers": (lambda: dinov2(Dinov2WithRegistersForImageClassification, Dinov2WithRegistersConfig), IMAGES),
    "llama4": (llama4, TEXTS),
    "llama": (tiny_llama, SMALL),
    "t5": (tiny_t5, {**SMALL, "decoder_input_ids": IDS % 60}),
    "vit": (lambda: build_family("vit")[0], IMAGES),
    "qwen3-moe": (lambda: build_family("qwen3-moe")[0], TEXTS),
}
RECIPES = {"w4": [W4], "w8a8": [W8A8], "fp8": [FP8]}


@torch.no_grad()
def problem_of(model, recipe):
    scope = Scope("", model, model)
    layers, _ = compressed.storable(scope, ("Linear",), integer=recipe != "fp8", experts=True)
    return reload_problem(model, layers, STORED[recipe])


def test_one_structure_is_tried_once_with_the_same_scheme(monkeypatch):
    tried = []
    monkeypatch.setattr(reload_check, "_problems", StructureCache())
    monkeypatch.setattr(reload_check, "_tried", lambda *given: f"problem {tried.append(given) or len(tried)}")
    assert [problem_of(tiny_llama(), recipe) for recipe in ("w4", "w4", "fp8")] == ["problem 1"] * 2 + ["problem 2"]
    assert problem_of(tiny_llama(intermediate_size=80), "w4") == "problem 3"
    assert reload_problem(tiny_llama(), {}, STORED["w4"]) == "problem 4"


@pytest.mark.many
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", [name for name in MODELS if name != "llama4"])
def test_what_the_skeleton_says_is_what_stock_does(name, recipe, tmp_path):
    """``dense=True`` leaves out the check, so that the compressed checkpoint exists to be tried."""
    build, inputs = MODELS[name]
    model = build()
    problem = problem_of(model, recipe)
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    with torch.random.fork_rng():
        torch.manual_seed(1)
        before = torch.random.get_rng_state()
        problem_of(model, recipe)
        assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
    assert not compressed.quantized_modules(model)
    hf_optim.optimize(model, RECIPES[recipe], calibration=[inputs], dense=True).save_pretrained(tmp_path)
    try:
        loaded = type(model).from_pretrained(tmp_path)
        with torch.no_grad():
            works = torch.equal(loaded(**inputs).to_tuple()[0], model(**inputs).to_tuple()[0])
    except (ValueError, RuntimeError, NotImplementedError):
        works = False
    assert works == (not problem)


def test_missing_experts_are_named():
    problem = problem_of(llama4(), "fp8")
    assert "feed_forward.experts.0" in problem


@pytest.mark.many
@pytest.mark.parametrize(("name", "recipe"), [("llama4", FP8), ("dinov2", W4), ("dinov2", W8A8), ("dinov2", FP8)])
@pytest.mark.parametrize("before", [[], [{"technique": "gmp"}]], ids=["first", "after a training"])
def test_refused_before_any_work(name, recipe, before, tmp_path):
    build, inputs = MODELS[name]
    model = build()
    if not problem_of(model, "fp8"):
        pytest.skip("this transformers loads it")
    model.save_pretrained(tmp_path)
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ModelError, match=rf"step {len(before) + 1} \(rtn\): stock transformers .* could not load"):
        hf_optim.optimize(model, [*before, recipe], calibration=[inputs])
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
    assert run_of(model).record.stages == []
    with pytest.raises(ModelError, match="could not load a compressed checkpoint"):
        type(model).from_pretrained(tmp_path, optim_config=[*before, recipe], calibration=[inputs])


@pytest.mark.parametrize("driver", ["blockwise", "streamed"])
def test_the_commands_refuse_before_a_weight_is_read(driver, tmp_path, capsys):
    if not problem_of(dinov2(), "w4"):
        pytest.skip("this transformers loads it")
    dinov2().save_pretrained(tmp_path / "model")
    (tmp_path / "recipe.json").write_text(json.dumps({"steps": [W4], "driver": driver}))
    recipe, model, output = str(tmp_path / "recipe.json"), str(tmp_path / "model"), str(tmp_path / "output")
    assert main(["check", recipe, "--model", model]) == 1
    assert "could not load a compressed checkpoint of Dinov2ForImageClassification" in capsys.readouterr().err
    assert main(["compress", model, "--recipe", recipe, "--output", output]) == 2
    captured = capsys.readouterr()
    assert "--dense" in captured.err
    assert "loading" not in captured.out
    if driver == "blockwise":
        assert main(["compress", model, "--recipe", recipe, "--output", output, "--dense"]) == 0
        AutoModelForImageClassification.from_pretrained(output)


def test_the_advice_is_followed_by_success():
    """Integer codes of these experts cannot be stored, and fp8 cannot be loaded: fp8 is not advised."""
    model = llama4()
    if not problem_of(model, "fp8"):
        pytest.skip("this transformers loads it")
    with pytest.raises(ModelError, match="experts are stacked matrices") as raised:
        hf_optim.optimize(model, [W4])
    assert "fp8" not in str(raised.value)


def test_a_model_that_does_not_match_its_class_is_optimized_with_a_warning(caplog):
    """Its ordinary checkpoint could not be loaded either: the compressed format is not the reason."""
    model = tiny_llama()

    class Wrapped(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return self.inner(x)

    model.model.norm = Wrapped(model.model.norm)
    hf_optim.optimize(model, [W4])
    assert compressed.quantized_modules(model)
    assert any("could not be loaded by stock transformers" in record.getMessage() for record in caplog.records)


def test_groups_and_widths_that_do_not_fill_a_word():
    """Without values, the width of packed codes is known up to a word only."""
    for width, bits in ((44, 3), (52, 5), (36, 7), (44, 4)):
        sizes = {**TEXT, **EXPERTS, "intermediate_size": width, "moe_intermediate_size": width}
        hf_optim.optimize(Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes)), [{**W4, "bits": bits, "group_size": None}])
