"""A recipe on a checkpoint that an earlier recipe made: what it records, and how its weights are read."""

from __future__ import annotations

import json

import pytest
import torch
from tiny_models import DECODER, tiny_gpt2, tiny_llama, tiny_t5
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, CompressedTensorsConfig, MistralConfig

import hf_optim
from hf_optim import RecipeError, optimize, run_of
from hf_optim.cli.check import check
from hf_optim.cli.jobs.compress import _make_dense
from hf_optim.toolkit import topology

IDS = torch.randint(3, 60, (2, 12), generator=torch.Generator().manual_seed(0))
DATA = [{"input_ids": IDS}]
KV = {"technique": "kv_cache", "bits": 8}
pytestmark = pytest.mark.filterwarnings("ignore::hf_optim.KernelWarning")
RTN = {"technique": "rtn", "bits": 4, "group_size": 16}


def logits(model):
    with torch.no_grad():
        return model.eval()(IDS).logits


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Return a function that gives the checkpoint of a recipe on a tiny Llama, made once."""
    found = {}

    def make(name, *recipe):
        if name not in found:
            found[name] = tmp_path_factory.mktemp(name)
            optimize(tiny_llama(), list(recipe), calibration=DATA).save_pretrained(found[name])
        return found[name]

    return make


@pytest.mark.parametrize(
    ("name", "first", "level", "trust", "auto"),
    [
        ("strided", {"technique": "strided"}, "REMOTE_CODE", True, False),
        ("gobo", {"technique": "gobo"}, "REMOTE_CODE", True, True),
        ("rtn", RTN, "STOCK_FORMAT", False, False),
        ("rtn", RTN, "STOCK_FORMAT", False, True),
        ("magnitude", {"technique": "magnitude"}, "STOCK_DENSE", False, False),
    ],
)
def test_record_and_card_say_how_the_result_loads(name, first, level, trust, auto, made, tmp_path):
    source, allowed = made(name, first), {"trust_remote_code": True} if trust else {}
    given = "auto" if auto else [KV]
    model = AutoModelForCausalLM.from_pretrained(source, optim_config=given, **allowed)
    if auto:
        model = optimize(model, [KV])
    assert run_of(model).record.reload == level
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "hf_optim.json").read_text())["reload"] == level
    card = (tmp_path / "README.md").read_text()
    assert ("trust_remote_code=True" in card) == trust
    assert ("A format that transformers reads natively (compressed-tensors)." in card) == (level == "STOCK_FORMAT")
    assert check([KV], str(source), trust_remote_code=trust)["reload"] == level


def test_codes_of_a_class_of_its_own_are_quantized_weights_when_they_are_loaded(made):
    source = made("gobo", {"technique": "gobo"})
    model = AutoModelForCausalLM.from_pretrained(source, optim_config="auto", trust_remote_code=True)
    with pytest.raises(RecipeError, match=r"step 1 \(magnitude\) needs a model that has floating-point weights"):
        optimize(model, "magnitude")
    with pytest.raises(RecipeError, match=r"step 1 \(magnitude\) needs a model that has floating-point weights"):
        AutoModelForCausalLM.from_pretrained(source, optim_config="magnitude", trust_remote_code=True)


def test_a_dense_equivalent_of_a_stock_class_is_an_ordinary_checkpoint():
    model = optimize(tiny_llama(), "gobo", calibration=DATA)
    _make_dense(run_of(model))
    assert type(model) is type(tiny_llama())
    assert run_of(model).record.reload == "STOCK_DENSE"


@pytest.mark.parametrize("step", ["strided", "local"])
@pytest.mark.parametrize("door", ["from_pretrained", "optimize"])
def test_a_step_that_calls_parts_of_a_model_takes_a_compressed_checkpoint(step, door, made):
    """Stock transformers gives its layers no weights before the first forward of the whole model."""
    source, recipe = made("rtn", RTN), [{"technique": step}]
    expected = optimize(AutoModelForCausalLM.from_pretrained(source, optim_config="auto"), recipe)
    hf_optim.restore(expected)
    if door == "optimize":
        model = optimize(AutoModelForCausalLM.from_pretrained(source), recipe)
    else:
        model = AutoModelForCausalLM.from_pretrained(source, optim_config=recipe)
    hf_optim.restore(model)
    assert torch.equal(logits(model), logits(expected))


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
@pytest.mark.parametrize("scheme", [RTN, {"technique": "rtn", "scheme": "W8A8"}])
def test_how_a_compressed_encoder_decoder_generates(scheme, tmp_path):
    model = optimize(tiny_t5(), [scheme])
    model.save_pretrained(tmp_path)
    expected = model.generate(IDS, max_new_tokens=5)
    with pytest.raises(RuntimeError, match="dtype"):  # if this passes, cards need no such section
        AutoModelForSeq2SeqLM.from_pretrained(tmp_path).generate(IDS, max_new_tokens=5)
    card = (tmp_path / "README.md").read_text()
    assert "stock transformers does not `generate`" in card
    assert ("quantization_config=decoded" in card) == (scheme is RTN)
    if scheme is RTN:
        decoded = CompressedTensorsConfig(dequantize=True)
        again = AutoModelForSeq2SeqLM.from_pretrained(tmp_path, quantization_config=decoded)
        assert torch.equal(again.generate(IDS, max_new_tokens=5), expected)
    again = AutoModelForSeq2SeqLM.from_pretrained(tmp_path, optim_config="auto")
    assert torch.equal(again.generate(IDS, max_new_tokens=5), expected)


def test_experts_that_stock_transformers_decoded_are_saved_again(tmp_path):
    """Of GPT-2 only the experts have codes: no layer shows that the model was compressed."""
    made = optimize(tiny_gpt2(), [{"technique": "moefication", "experts": 4, "active": 2, "epochs": 2}, RTN], DATA)
    made.save_pretrained(tmp_path / "codes")
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "codes", optim_config="auto", trust_remote_code=True, experts_implementation="eager"
    )
    model.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", trust_remote_code=True)
    assert "quantization_config" not in json.loads((tmp_path / "again" / "config.json").read_text())
    assert torch.equal(logits(again), logits(made))


def test_a_trace_leaves_no_tensors_without_values_to_attention_under_a_pattern():
    windowed = AutoModelForCausalLM.from_config(MistralConfig(**DECODER, sliding_window=6)).eval()
    model = optimize(windowed, "strided")
    lengths = topology.dummy_inputs(model)
    topology.trace(model)
    with torch.no_grad():
        assert type(model(**lengths).logits) is torch.Tensor
