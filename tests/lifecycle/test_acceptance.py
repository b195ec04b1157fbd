"""Models that no run can work on are refused before work: offloaded, wrapped, compiled, quantized by others, NaN."""

from __future__ import annotations

import copy

import pytest
import torch
from accelerate import cpu_offload, init_empty_weights
from safetensors.torch import load_file, save_file
from tiny_models import tiny_bert, tiny_llama, tiny_t5
from torch import nn
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import hf_optim
from hf_optim import ModelError, NumericalError, OptimError
from hf_optim.cli import main
from hf_optim.toolkit.modules.finite import nonfinite_tensors

STEPS = [{"technique": "rtn", "bits": 8}], [{"technique": "magnitude", "sparsity": 0.5}]
RTN = STEPS[0]
TOKENS = torch.arange(3, 19)[None]


@pytest.fixture
def checkpoint(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def places(model, last):
    parts = ["model.embed_tokens", "model.rotary_emb", "model.norm", "lm_head", "model.layers.0"]
    return dict.fromkeys(parts, "cpu") | {"model.layers.1": last}


# -- offloaded --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("steps", STEPS, ids=lambda steps: steps[0]["technique"])
def test_a_device_map_with_the_disk_is_refused_before_the_weights_are_read(steps, checkpoint, tmp_path):
    (checkpoint / "model.safetensors").write_bytes(b"")  # reading it would raise another error
    with pytest.raises(ModelError, match=r"device_map puts modules on 'disk'.*--driver streamed"):
        AutoModelForCausalLM.from_pretrained(
            checkpoint, optim_config=steps, device_map=places(None, "disk"), offload_folder=tmp_path / "off"
        )


@pytest.mark.parametrize("steps", STEPS, ids=lambda steps: steps[0]["technique"])
def test_an_offloaded_model_is_refused_unchanged(steps, checkpoint, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(
        checkpoint, device_map=places(None, "disk"), offload_folder=tmp_path / "off"
    )
    before = model(input_ids=TOKENS).logits
    with pytest.raises(ModelError, match=r"offloaded to the CPU or to disk \(model\.layers\.1"):
        hf_optim.optimize(model, steps)
    assert torch.equal(model(input_ids=TOKENS).logits, before)


def test_auto_runs_a_dense_offloaded_model_and_refuses_a_compressed_one(checkpoint, tmp_path):
    offload = {"device_map": places(None, "disk"), "offload_folder": tmp_path / "off"}
    expected = AutoModelForCausalLM.from_pretrained(checkpoint)(input_ids=TOKENS).logits
    auto = AutoModelForCausalLM.from_pretrained(checkpoint, optim_config="auto", **offload)
    assert torch.equal(auto(input_ids=TOKENS).logits, expected)
    hf_optim.optimize(tiny_llama(), RTN).save_pretrained(tmp_path / "w8")
    with pytest.raises(ModelError, match="offloaded"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "w8", optim_config="auto", **offload)


def test_a_model_offloaded_by_hand_or_without_weights():
    with pytest.raises(ModelError, match="offloaded"):
        hf_optim.optimize(cpu_offload(tiny_llama()), RTN)
    with init_empty_weights():
        model = LlamaForCausalLM(tiny_llama().config)
    with pytest.raises(ModelError, match="init_empty_weights"):
        hf_optim.optimize(model, RTN)
    partly = tiny_llama()
    partly.model.layers[1].to("meta")
    with pytest.raises(ModelError, match=r"on the meta device.*model\.layers\.1"):
        hf_optim.optimize(partly, RTN)


def test_a_stage_that_follows_training_is_refused_as_well():
    model = hf_optim.optimize(tiny_llama(), [{"technique": "gmp"}, {"technique": "rtn"}])
    model.model.layers[1].to("meta")
    with pytest.raises(OptimError, match="meta device"):
        hf_optim.advance(model)


# -- wrapped, compiled, quantized by others ---------------------------------------------------------------------------
def peft(model):
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))


def compiled_in_place(model):
    model.compile(backend="eager")
    return model


def block_compiled(model):
    model.model.layers[0] = torch.compile(model.model.layers[0], backend="eager")
    return model


def int8_linear(model):
    linear = model.model.layers[0].mlp.up_proj
    linear.weight = nn.Parameter(linear.weight.detach().to(torch.int8), requires_grad=False)
    return model


@pytest.mark.parametrize(
    ("wrap", "message"),
    [
        (lambda model: torch.compile(model, backend="eager"), "_orig_mod"),
        (compiled_in_place, "was compiled"),
        (block_compiled, "was compiled"),
        (nn.DataParallel, r"model\.module"),
        (peft, "merge_and_unload"),
        (lambda model: peft(model).get_base_model(), r"q_proj of LlamaForCausalLM holds adapters: merge them first"),
        (int8_linear, "int8 codes of another quantizer"),
        (lambda model: model.model.layers[0], "not a transformers model"),
        (lambda model: None, "expected a transformers model"),
        (lambda model: "org/model", "expected a transformers model"),
    ],
)
def test_wrapped_models(wrap, message):
    with pytest.raises(ModelError, match=message):
        hf_optim.optimize(wrap(tiny_llama()), RTN)


def test_inference_tensors():
    with torch.inference_mode():
        model = LlamaForCausalLM(tiny_llama().config)
    with pytest.raises(ModelError, match="inference_mode"):
        hf_optim.optimize(model, RTN)


def test_optimizing_under_inference_mode_leaves_weights_that_can_be_trained():
    model = tiny_llama()
    with torch.inference_mode():
        hf_optim.optimize(model, [{"technique": "gptq", "group_size": 8}], calibration=[{"input_ids": TOKENS}])
    assert not any(tensor.is_inference() for tensor in (*model.parameters(), *model.buffers()))
    model(input_ids=TOKENS, labels=TOKENS).loss.backward()


def test_training_mode_and_frozen_parameters_do_not_matter():
    expected = hf_optim.optimize(tiny_llama(), RTN)
    model = tiny_llama().train().requires_grad_(False)
    found = hf_optim.optimize(model, RTN)
    assert found.training
    assert all(torch.equal(a, b) for a, b in zip(found.parameters(), expected.parameters(), strict=True))


# -- not finite -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("steps", STEPS, ids=lambda steps: steps[0]["technique"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"])
def test_weights_that_are_not_finite_are_refused_by_steps_that_need_no_data(name, value, steps):
    model = tiny_llama()
    model.get_parameter(name).data.view(-1)[5] = value
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(NumericalError, match=f"{name}: the weights of the model"):
        hf_optim.optimize(model, steps)
    assert all(torch.equal(found.nan_to_num(), before[key].nan_to_num()) for key, found in model.state_dict().items())


@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.1.post_attention_layernorm.weight"])
def test_the_streamed_driver_refuses_them(name, checkpoint, tmp_path, capsys):
    tensors = load_file(checkpoint / "model.safetensors")
    tensors[name][3] = float("nan")
    save_file(tensors, checkpoint / "model.safetensors", metadata={"format": "pt"})
    argv = ["compress", str(checkpoint), "--recipe", "rtn", "--output", str(tmp_path / "out"), "--driver", "streamed"]
    assert main(argv) == 2
    assert f"{name}: the weights of the model hold NaN" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_step_that_writes_weights_that_are_not_finite_is_named(monkeypatch):
    from hf_optim_plugins.quantization.smoothquant import SmoothQuant, folding

    monkeypatch.setattr(folding, "move_norm_scale_", lambda group, scale: group.module.weight.data.fill_(torch.inf))
    steps = [SmoothQuant(), {"technique": "rtn", "bits": 8}]
    model = tiny_llama()
    with pytest.raises(NumericalError, match=r"step 1 \(smoothquant\): model\.layers\.0\.input_layernorm\.weight"):
        hf_optim.optimize(model, steps, calibration=[{"input_ids": TOKENS}])
    with pytest.raises(OptimError):
        model.save_pretrained("nowhere")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float8_e4m3fn, torch.complex64])
def test_finite_tensors_of_every_dtype(dtype):
    module = nn.Module()
    module.register_buffer("one", torch.ones(3).to(dtype))
    module.register_buffer("two", torch.tensor([1.0, float("nan"), 2.0]).to(dtype))
    module.register_buffer("empty", torch.ones(0, dtype=dtype))
    module.register_buffer("ids", torch.arange(3))
    module.register_buffer("mask", torch.tensor([0.0, -float("inf")]), persistent=False)
    module.register_buffer("bad_mask", torch.tensor([0.0, float("nan")]), persistent=False)
    assert nonfinite_tensors(module) == ["two", "bad_mask"]


@pytest.mark.parametrize("build", [tiny_bert, tiny_t5])
def test_a_float16_model_whose_weights_sum_beyond_its_range_is_finite(build):
    model = build().half()
    model.get_input_embeddings().weight.data.fill_(65504.0)
    assert nonfinite_tensors(model) == []
