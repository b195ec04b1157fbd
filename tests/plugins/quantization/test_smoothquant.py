"""SmoothQuant: exact before quantization, and its effect after it."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_models import DECODER, TINY, tiny_bert, tiny_llama, tiny_mixtral
from torch import nn
from transformers import AutoModelForCausalLM, Gemma2Config, Gemma2ForCausalLM

import hf_optim
from hf_optim import OptimConfig, RecipeError, Scope
from hf_optim.lifecycle.stages import start_run
from hf_optim.toolkit import topology
from hf_optim.toolkit.permutation import folding
from hf_optim.toolkit.topology.linear_layers import weight_out_in
from hf_optim_plugins.quantization._scale_plan import SHARED
from hf_optim_plugins.quantization.smoothquant import SmoothQuant, smoothing_scale

OUTLIERS = (3, 17, 29)


def inputs_of(model, rows=4, seed=0):
    """Return random inputs of the kind and length of the model's dummy inputs."""
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for name, value in topology.dummy_inputs(model).items():
        shape = (rows, *value.shape[1:])
        if value.is_floating_point():
            made[name] = torch.randn(shape, generator=generator).to(value)
        else:
            made[name] = torch.randint(3, 60, shape, generator=generator)
    return made


def logits(model, inputs):
    with torch.no_grad():
        return model(**inputs).logits


def add_outliers_(model, channels=OUTLIERS, factor=50.0):
    """Make a few inputs of every linear after an exclusive norm 50 times larger, without changing the function."""
    for group in topology.find_norm_groups(model):
        if group.exclusive:
            scale = torch.ones(group.module.weight.numel(), dtype=torch.float64)
            scale[list(channels)] = 1.0 / factor
            folding.move_norm_scale_(group, scale)
    return model


def smooth_(model, inputs, **fields):
    """Call the hook over the whole model, and return the run with its record."""
    recipe = OptimConfig.parse([SmoothQuant(**fields)])
    run = start_run(recipe, model.config)
    run.model = model
    steps = recipe.steps[0].calibrate(run, Scope("", model, model))
    with torch.no_grad():
        for _ in steps:
            model(**inputs)
    return run


class W8A8:
    """Fake 8-bit quantization of every linear in the blocks: weights per row, inputs per token, both symmetric."""

    def __init__(self, model):
        self.model = model

    def __enter__(self):
        self.saved, self.handles = {}, []
        for name, module in topology.linears(self.model).items():
            if topology.is_output_head(self.model, name):
                continue
            self.saved[name] = weight_out_in(module).detach().clone()
            with torch.no_grad():
                weight_out_in(module).copy_(rounded(self.saved[name]))
            self.handles.append(module.register_forward_pre_hook(lambda module, args: (rounded(args[0]), *args[1:])))
        return self.model

    def __exit__(self, *raised):
        for handle in self.handles:
            handle.remove()
        with torch.no_grad():
            for name, weight in self.saved.items():
                weight_out_in(self.model.get_submodule(name)).copy_(weight)


def rounded(x):
    step = x.abs().amax(-1, keepdim=True).clamp_min(1e-9) / 127
    return (x / step).round().clamp(-128, 127) * step


def w8a8_error(model, inputs, reference):
    with W8A8(model):
        return float((logits(model, inputs) - reference).pow(2).mean().sqrt())


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "opt", "vit", "t5", "bert"])
def test_outputs_are_equal_and_the_w8a8_error_is_at_least_halved(family):
    model = add_outliers_(TINY[family]().double())
    inputs = inputs_of(model)
    before, start = logits(model, inputs), copy.deepcopy(model.state_dict())
    error = w8a8_error(model, inputs, before)
    run = smooth_(model, inputs)
    touched, _ = run.covered(run.recipe.steps[0])
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, start[name])}
    assert {f"{name}.weight" for name in touched} <= changed
    assert torch.allclose(logits(model, inputs), before, rtol=0, atol=1e-10)
    assert not any(module._forward_pre_hooks for module in model.modules())
    if family != "bert":  # its norms feed the residual, so that neither outliers nor scales go through them
        assert w8a8_error(model, inputs, before) <= error / 2


def test_the_scale_is_the_papers():
    model = tiny_llama().double()
    inputs = inputs_of(model)
    seen = {}
    name = "model.layers.0.mlp.gate_proj"
    handle = model.get_submodule(name).register_forward_pre_hook(
        lambda module, args: seen.update(x=args[0].detach().abs().flatten(0, -2).amax(0))
    )
    logits(model, inputs)
    handle.remove()
    mlp = model.model.layers[0].mlp
    gain, weight = model.model.layers[0].post_attention_layernorm.weight.detach().clone(), mlp.gate_proj.weight.clone()
    both = torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]).detach().abs().amax(0)
    expected = seen["x"] ** 0.8 / both**0.2
    smooth_(model, inputs, alpha=0.8, pairs=False)
    assert torch.allclose(mlp.gate_proj.weight / weight, expected.expand_as(weight), rtol=1e-6)
    assert torch.allclose(model.model.layers[0].post_attention_layernorm.weight, gain / expected, rtol=1e-6)


def test_the_two_ends_of_alpha():
    peak, weight = torch.tensor([4.0, 9.0]), torch.tensor([0.25, 16.0])
    assert smoothing_scale(peak, weight, 1.0).tolist() == [4.0, 9.0]
    assert smoothing_scale(peak, weight, 0.0).tolist() == [4.0, 0.0625]
    assert smoothing_scale(peak, weight, 0.5).tolist() == [4.0, 0.75]


def test_dead_channels_keep_their_scale():
    zero = torch.tensor([0.0, 1.0])
    assert smoothing_scale(zero, torch.ones(2), 0.5).tolist() == [1.0, 1.0]
    assert smoothing_scale(torch.ones(2), zero, 0.5).tolist() == [1.0, 1.0]


def test_values_of_grouped_heads_take_the_largest_of_their_readers():
    model = tiny_llama().double()
    inputs = inputs_of(model)
    before = logits(model, inputs)
    value = model.model.layers[0].self_attn.v_proj.weight.detach().clone()
    output = model.model.layers[0].self_attn.o_proj.weight.detach().clone()
    smooth_(model, inputs, targets=("*.v_proj", "*.o_proj"))
    rows = (value / model.model.layers[0].self_attn.v_proj.weight)[:, 0]
    columns = (model.model.layers[0].self_attn.o_proj.weight / output)[0]
    assert not torch.allclose(rows, torch.ones_like(rows))
    assert torch.allclose(columns, torch.cat([rows[:8], rows[:8], rows[8:], rows[8:]]), rtol=1e-12)
    assert torch.allclose(logits(model, inputs), before, rtol=0, atol=1e-10)


def test_pairs_can_be_left_out():
    model = tiny_llama()
    down = model.model.layers[0].mlp.down_proj.weight.detach().clone()
    run = smooth_(model, inputs_of(model), pairs=False)
    assert torch.equal(model.model.layers[0].mlp.down_proj.weight, down)
    assert run.record.steps["0"]["pairs"] == 0
    assert run.record.steps["0"]["norms"] == 4


def test_a_gain_stored_as_a_difference_from_one():
    config = Gemma2Config(**DECODER, head_dim=8)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Gemma2ForCausalLM(config).double().eval()
    inputs = inputs_of(model)
    before = logits(model, inputs)
    run = smooth_(model, inputs)
    assert run.record.steps["0"]["norms"] == 4
    # This norm computes in float32 whatever the model's dtype is.
    assert torch.allclose(logits(model, inputs), before, rtol=0, atol=1e-6)


def test_norms_of_a_post_norm_model_are_skipped_with_the_reason():
    model = tiny_bert()
    run = smooth_(model, inputs_of(model))
    touched, skipped = run.covered(run.recipe.steps[0])
    assert "bert.encoder.layer.1.intermediate.dense" in skipped[SHARED]
    assert touched == {
        f"bert.encoder.layer.{layer}.attention.{name}" for layer in (0, 1) for name in ("self.value", "output.dense")
    }


def test_norms_that_feed_a_router_are_skipped_with_the_reason():
    model = tiny_mixtral()
    inputs = inputs_of(model)
    before = logits(model, inputs)
    run = smooth_(model, inputs)
    touched, _ = run.covered(run.recipe.steps[0])
    assert "model.layers.0.self_attn.q_proj" in touched
    assert run.record.steps["0"]["norms"] == 2
    assert torch.allclose(logits(model, inputs), before, atol=1e-4)


def test_a_skipped_linear_excludes_its_whole_group():
    model = tiny_llama()
    start = copy.deepcopy(model.state_dict())
    run = smooth_(model, inputs_of(model), pairs=False, skip=("*.q_proj",))
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, start[name])}
    assert changed == {
        f"model.layers.{layer}.{name}.weight"
        for layer in (0, 1)
        for name in ("mlp.gate_proj", "mlp.up_proj", "post_attention_layernorm")
    }
    assert any("k_proj" in name for names in run.covered(run.recipe.steps[0])[1].values() for name in names)


def test_zeros_stay_zeros():
    model = tiny_llama()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear):
                module.weight[:, ::4] = 0
    zeros = {name: value == 0 for name, value in model.state_dict().items() if value.dim() == 2}
    smooth_(model, inputs_of(model))
    assert all(torch.equal(model.state_dict()[name] == 0, mask) for name, mask in zeros.items())


def test_observers_are_removed_if_a_pass_fails():
    model = tiny_llama()
    run = start_run(OptimConfig.parse([SmoothQuant()]), model.config)
    run.model = model
    steps = run.recipe.steps[0].calibrate(run, Scope("", model, model))
    next(steps)
    assert any(module._forward_pre_hooks for module in model.modules())
    steps.close()
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_alone_it_is_refused():
    with pytest.raises(RecipeError, match="smoothquant"):
        OptimConfig.parse([SmoothQuant()]).check()


@pytest.fixture
def babyllama(shared_models):
    return AutoModelForCausalLM.from_pretrained(shared_models / "babyllama-1m").eval()


def test_synthetic_outliers_on_a_trained_model(babyllama):
    ids = torch.randint(3, babyllama.config.vocab_size, (4, 64), generator=torch.Generator().manual_seed(0))
    add_outliers_(babyllama)
    reference = logits(babyllama, {"input_ids": ids})
    before = w8a8_error(babyllama, {"input_ids": ids}, reference)
    smooth_(babyllama, {"input_ids": ids})
    assert (logits(babyllama, {"input_ids": ids}) - reference).abs().max() < 1e-3
    assert w8a8_error(babyllama, {"input_ids": ids}, reference) <= before / 2


@pytest.mark.parametrize("driver", ["whole_model", "blockwise"])
def test_smoothed_then_quantized_beats_quantized(driver):
    inputs = inputs_of(tiny_llama())
    reference = logits(add_outliers_(tiny_llama()), inputs)
    quantize = {"technique": "rtn", "bits": 8, "activations": "int8"}

    def error(*steps):
        recipe = {"steps": list(steps), "driver": driver}
        model = hf_optim.optimize(add_outliers_(tiny_llama()), recipe, calibration=[inputs])
        return float((logits(model, inputs) - reference).pow(2).mean().sqrt())

    assert error({"technique": "smoothquant"}, quantize) <= error(quantize) / 2
