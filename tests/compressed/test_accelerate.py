"""accelerate, restore and report, on a kernel of the tests that supports every weight."""

from __future__ import annotations

import copy
import gc
import io
import warnings
import weakref

import pytest
import torch
from naive_kernel import NAIVE, NAIVE24, PackedWeight
from safetensors.torch import load_file
from tiny_models import tiny_gpt2, tiny_llama
from torch import nn
from transformers import LlamaForCausalLM

import hf_optim
from hf_optim import Contract, Kernel, Reload, Technique, compressed, hookimpl, technique
from hf_optim.compressed import codes
from hf_optim.compressed.packed.accelerate import kernels_for
from hf_optim.compressed.packed.packed_linear import KernelWarning, PackedLinear
from hf_optim.errors import ModelError
from hf_optim.lifecycle.stages import start_run
from hf_optim.recipes.config import OptimConfig
from hf_optim.toolkit.quantization.grids import GridSpec, make_grid

UP = "model.layers.0.mlp.up_proj"
TOKENS = torch.arange(5, 15)[None]


def quantize(model, bits=4, size=16, symmetric=True, only=".mlp.", kind="int", **inputs):
    """Put the linears of a model into the quantized state."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and only in name:
            spec = GridSpec(bits, kind, "group" if size else "channel", size, symmetric)
            grid = make_grid(module.weight.detach(), spec, "minmax")
            codes = grid.quantize(module.weight.detach())
            static = {"input_scale": torch.tensor([0.02])} if inputs.get("static") else {}
            if inputs.get("static") and not inputs.get("symmetric_activations", True):
                static["input_zero_point"] = torch.tensor([3], dtype=torch.int8)
            scheme = compressed.scheme_of(spec, **inputs)
            compressed.store(module, scheme, codes, grid.scale, grid.zero_point, **static)
    compressed.attach_quantizer(model)
    return model


@pytest.fixture
def model():
    return quantize(tiny_llama().requires_grad_(False))


@pytest.fixture
def x():
    return torch.randn(3, 32, generator=torch.Generator().manual_seed(0))


def state(model):
    """Return the state of all modules of a model, for comparison."""
    seen = []
    for name, module in model.named_modules():
        own = {key: value for key, value in module.__dict__.items() if key not in ("_parameters", "_modules")}
        seen.append((name, type(module), list(own), [*module._modules], str(own.get("quantization_scheme"))))
        seen += [
            (name, key, p.requires_grad, p.dtype, p.shape) for key, p in module._parameters.items() if p is not None
        ]
        seen.append((name, getattr(own.get("forward"), "__func__", None)))
    return seen


def runs_on(model, name=UP):
    return {row.name: row for row in hf_optim.report(model)}[name]


CASES = [
    {"bits": 4},
    {"bits": 4, "symmetric": False},
    {"bits": 3, "size": None},
    {"bits": 8, "size": None, "symmetric": False},
    {"bits": 8, "size": None, "activations": "int8"},
    {"bits": 8, "size": None, "activations": "int8", "symmetric_activations": False},
    {"bits": 8, "size": None, "activations": "int8", "static": True, "symmetric_activations": False},
    {"bits": 8, "size": None, "kind": "float", "activations": "fp8"},
]


@pytest.mark.many
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_and_restored(case, dtype, tmp_path):
    if dtype == torch.bfloat16 and case["bits"] == 8 and not case.get("symmetric", True):
        pytest.skip("bfloat16 cannot tell 255 steps apart: such a layer is refused (see below)")
    model = quantize(tiny_llama().to(dtype), **case)
    before, tensors = state(model), {key: value.clone() for key, value in model.state_dict().items()}
    model.save_pretrained(tmp_path / "before")
    modules = dict(model.named_modules())
    with torch.no_grad():
        logits = model(TOKENS).logits
        assert hf_optim.accelerate(model, [NAIVE]) is model
        packed = [name for name, m in model.named_modules() if isinstance(m, PackedLinear)]
        assert len(packed) == 6
        assert all(model.get_submodule(name) is modules[name] for name in packed)
        assert "weight" not in dict(model.get_submodule(UP).named_parameters())
        assert torch.equal(model.get_submodule(UP).weight, tensors[f"{UP}.weight"])
        other = model(TOKENS).logits
        tolerance = 1e-5 if dtype == torch.float32 else 2e-2
        assert float((other - logits).double().norm() / logits.double().norm()) < tolerance
        model.save_pretrained(tmp_path / "after")
        for name in ("model.safetensors", "config.json"):
            assert (tmp_path / "before" / name).read_bytes() == (tmp_path / "after" / name).read_bytes()
        hf_optim.restore(model)
        assert state(model) == before
        again = model.state_dict()
        assert list(again) == list(tensors)
        assert all(torch.equal(again[key], value) for key, value in tensors.items())
        assert torch.equal(model(TOKENS).logits, logits)
    hf_optim.restore(model)


@pytest.mark.parametrize("case", [CASES[0], CASES[1], CASES[4], CASES[6]], ids=str)
def test_layers_that_were_cast_are_restored_as_if_they_had_been_loaded_in_that_dtype(case, tmp_path):
    model = quantize(tiny_llama(), **case)
    model.save_pretrained(tmp_path / "out")
    expected = LlamaForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    with torch.no_grad():
        expected(TOKENS)  # stock transformers decodes now
    hf_optim.restore(hf_optim.accelerate(model, [NAIVE]).to(torch.bfloat16))
    found = dict(model.named_parameters())
    kept = {name: value for name, value in expected.named_parameters() if not name.endswith("weight_shape")}
    assert all(torch.equal(value, found[name]) for name, value in kept.items())
    model.save_pretrained(tmp_path / "cast")
    stored, kept = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "cast"))
    assert stored.keys() == kept.keys()


def test_a_weight_off_its_grid_stays(model, x):
    model.get_submodule(UP).weight.mul_(1.01)
    dense = model.get_submodule(UP)(x)
    with pytest.warns(KernelWarning, match="up_proj .*not on the grid"):
        hf_optim.accelerate(model, [NAIVE])
    assert torch.equal(model.get_submodule(UP)(x), dense)


def test_memory_holds_no_dense_weight(model):
    from hf_optim.evaluation.sizes import parameter_bytes

    dense = parameter_bytes(model)
    weights = sum(m.weight.numel() for n, m in model.named_modules() if isinstance(m, nn.Linear) and ".mlp." in n)
    alive = weakref.ref(model.get_submodule(UP)._parameters["weight"])
    hf_optim.accelerate(model, [NAIVE])
    gc.collect()
    assert alive() is None
    # One byte per weight instead of four.
    assert parameter_bytes(model) <= dense - 3 * weights
    hf_optim.restore(model)
    assert parameter_bytes(model) == dense


def test_dense_weights_are_checked_only_for_kernels_of_24(tmp_path):
    model = tiny_llama()
    with torch.no_grad():
        model.get_submodule(UP).weight.view(-1, 4)[:, 2:] = 0
    model.save_pretrained(tmp_path / "before")
    logits = model(TOKENS).logits
    before = state(model)
    hf_optim.accelerate(model, [NAIVE])
    assert runs_on(model).kernel is None
    hf_optim.accelerate(model, [NAIVE24])
    assert runs_on(model).kernel == "naive dense32"
    assert [row.name for row in hf_optim.report(model) if row.kernel] == [UP]
    assert torch.allclose(model(TOKENS).logits, logits, atol=1e-6)
    model.save_pretrained(tmp_path / "after")
    one, two = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("before", "after"))
    assert one == two
    hf_optim.restore(model)
    assert state(model) == before
    assert torch.equal(model(TOKENS).logits, logits)


def test_a_forward_replaced_by_others_is_kept(model, x):
    up = model.get_submodule(UP)
    up.forward = lambda input: input + 1
    with pytest.warns(KernelWarning, match="something else has replaced its forward"):
        hf_optim.accelerate(model, [NAIVE])
    assert torch.equal(up(x), x + 1)


def test_accelerating_twice_changes_nothing(model):
    hf_optim.accelerate(model, [NAIVE])
    packed_weight = model.get_submodule(UP).packed_weight
    hf_optim.accelerate(model, [NAIVE])
    assert model.get_submodule(UP).packed_weight is packed_weight


def test_the_report_is_a_table_of_every_linear(model):
    assert runs_on(model).reason.startswith("accelerate() was not called")
    hf_optim.accelerate(model, [NAIVE])
    report = hf_optim.report(model)
    assert len(report) == 15
    assert (runs_on(model).shape, runs_on(model).kernel) == ((48, 32), "naive int4")
    assert (runs_on(model, "lm_head").kernel, runs_on(model, "lm_head").reason) == (None, "not compressed")
    lines = report.full().splitlines()
    assert lines[0].startswith("6 of 15 linear layers on naive int4; 9 dense (")
    assert lines[0].endswith(" and 6 more: not compressed)")
    assert len(lines) == 18
    assert next(line for line in lines if "0.mlp.up_proj" in line).split() == [UP, "48", "x", "32", "naive", "int4"]
    assert len(hf_optim.report(tiny_gpt2())) == 9


def test_layers_that_stay_dense_are_named_in_one_warning(model):
    stubborn = Kernel("stubborn", supports=lambda w: "made of wood", prepack=PackedWeight)
    with pytest.warns(KernelWarning) as caught:
        hf_optim.accelerate(model, [stubborn])
    assert len(caught) == 1
    text = str(caught[0].message)
    assert "model.layers.0.mlp.gate_proj" in text
    assert "and 3 more" in text
    assert "stubborn: made of wood" in text
    assert "lm_head" not in text
    assert caught[0].filename == __file__
    assert runs_on(model).reason == "stubborn: made of wood"


@pytest.mark.parametrize("error", [ValueError("off the grid"), OSError("no driver")])
def test_a_kernel_that_cannot_prepack_leaves_the_layer(model, x, error):
    def prepack(weight):
        raise error

    dense = model.get_submodule(UP)(x)
    with pytest.warns(KernelWarning, match=str(error)):
        hf_optim.accelerate(model, [Kernel("weak", supports=lambda w: None, prepack=prepack)])
    assert torch.equal(model.get_submodule(UP)(x), dense)
    assert str(error) in runs_on(model).reason


def test_a_packed_weight_must_have_the_required_methods(model):
    with pytest.warns(KernelWarning, match="its packed weight is not an nn.Module with forward, accepts, codes, label"):
        hf_optim.accelerate(model, [Kernel("plain", supports=lambda w: None, prepack=lambda w: nn.Identity())])
    assert runs_on(model).kernel is None


def test_the_next_kernel_is_tried(model):
    hf_optim.accelerate(model, [Kernel("first", supports=lambda w: "not today", prepack=PackedWeight), NAIVE])
    assert runs_on(model).kernel == "naive int4"


class Broken(PackedWeight):
    def forward(self, x):
        self.calls += 1
        raise RuntimeError("out of shared memory")


def test_a_kernel_whose_check_raises_disables_itself_alone(model, x):
    expected = model.get_submodule(UP)(x)
    broken = Kernel("broken", supports=lambda w: 1 / 0, prepack=PackedWeight)
    with pytest.warns(KernelWarning, match="broken: ZeroDivisionError"):
        hf_optim.accelerate(model, [broken])
    assert torch.equal(model.get_submodule(UP)(x), expected)
    working = Kernel("working", supports=lambda w: None, prepack=PackedWeight)
    hf_optim.accelerate(model, [broken, working])
    assert model.get_submodule(UP).packing.kernel is working


def test_a_kernel_that_raises_falls_back_with_one_warning(model, x):
    up = model.get_submodule(UP)
    dense = up(x)
    hf_optim.accelerate(model, [Kernel("broken", supports=lambda w: None, prepack=Broken)])
    with pytest.warns(
        KernelWarning, match=r"layers\.0\.mlp\.up_proj falls back to the dense path: broken raised RuntimeError"
    ):
        assert torch.equal(up(x), dense)
    assert torch.equal(up(x), dense)
    assert up.packed_weight.calls == 1
    assert "out of shared memory" in runs_on(model).reason
    assert torch.equal(copy.deepcopy(up)(x), dense)
    hf_optim.accelerate(model, [NAIVE])
    assert runs_on(model).kernel == "naive int4"


@pytest.mark.parametrize("inputs", [{"activations": "int8"}, {"activations": "int8", "static": True}])
def test_the_fallback_rounds_inputs_too(inputs, x):
    model = quantize(tiny_llama().requires_grad_(False), 8, None, **inputs)
    up, x = model.get_submodule(UP), x[None]
    dense = up(x)
    hf_optim.accelerate(model, [Kernel("broken", supports=lambda w: None, prepack=Broken)])
    with pytest.warns(KernelWarning):
        assert torch.equal(up(x), dense)
    assert torch.equal(up(x[0]), dense[0])
    x.requires_grad_()
    up(x).sum().backward()
    assert torch.allclose(x.grad, up.weight.sum(0).expand_as(x))


def test_a_faulty_input_is_not_the_kernels_fault(model, x):
    hf_optim.accelerate(model, [NAIVE])
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        model.get_submodule(UP)(x[:, :5])
    assert runs_on(model).kernel == "naive int4"


def test_an_input_that_the_packed_weight_does_not_accept(model, x):
    up = model.get_submodule(UP)
    dense = up(x)
    with torch.autocast("cpu", torch.bfloat16):
        wanted = up(x.bfloat16())
    hf_optim.accelerate(model, [NAIVE])
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(up(x.bfloat16()), wanted)
    assert up.packed_weight.calls == 0
    assert torch.allclose(up(x), dense, atol=1e-6)
    assert up.packed_weight.calls == 1


def test_gradients_reach_the_input_and_the_bias():
    model = quantize(tiny_llama(attention_bias=True), only="q_proj")
    layer = model.model.layers[0].self_attn.q_proj
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(0), requires_grad=True)
    wanted = torch.autograd.grad((layer(x) ** 2).sum(), (x, layer.bias))
    hf_optim.accelerate(model, [NAIVE])
    found = torch.autograd.grad((layer(x) ** 2).sum(), (x, layer.bias))
    assert layer.packed_weight.calls == 1
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(found, wanted, strict=True))
    for each in (layer, copy.deepcopy(layer)):
        with torch.no_grad():
            old = each(x)
            each.bias += 1
            assert torch.allclose(each(x), old + 1)
            each.bias = nn.Parameter(each.bias + 1)
            assert torch.allclose(each(x), old + 2)


def test_writing_into_the_decoded_weight_raises(model):
    hf_optim.accelerate(model, [NAIVE])
    up = model.get_submodule(UP)
    delta = torch.ones_like(up.weight)
    with pytest.raises(ModelError, match="restore"):
        up.weight.data += delta
    with pytest.raises(ModelError, match="restore"):
        up.weight.data = delta
    with pytest.raises(RuntimeError, match="nference"), torch.no_grad():
        up.weight.add_(delta)
    assert type(up.weight + 1) is torch.Tensor
    with pytest.raises(KeyError, match="weight"):
        up.weight = nn.Parameter(delta)


def test_a_copy_runs_on_its_own_packed_weight(model, x):
    hf_optim.accelerate(model, [NAIVE])
    dense = model.get_submodule(UP)(x)
    calls = model.get_submodule(UP).packed_weight.calls
    other = copy.deepcopy(model)
    up = other.get_submodule(UP)
    assert torch.equal(up(x), dense)
    assert model.get_submodule(UP).packed_weight.calls == calls
    hf_optim.restore(other)
    assert type(up) is nn.Linear
    assert runs_on(model).kernel == "naive int4"
    file = io.BytesIO()
    torch.save(model.get_submodule(UP), file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(x), dense)


def test_another_dtype_is_prepacked_again_and_scales_are_not_rounded(model, x):
    hf_optim.accelerate(model, [NAIVE])
    up = model.get_submodule(UP)
    exact = up.codes()
    model.to(torch.bfloat16)
    assert runs_on(model).kernel == "naive int4"
    assert up(x.bfloat16()).dtype == torch.bfloat16
    assert up.weight.dtype == torch.bfloat16
    assert torch.equal(up.codes().scale, exact.scale)
    model.to(torch.float32)
    assert torch.allclose(up(x), x @ up.weight.T, atol=1e-5)
    picky = Kernel(
        "picky", supports=lambda w: None if w.dtype == torch.float32 else "float32 only", prepack=PackedWeight
    )
    hf_optim.accelerate(hf_optim.restore(model), [picky])
    with pytest.warns(KernelWarning, match="picky: float32 only"):
        model.to(torch.bfloat16)
    assert torch.isfinite(up(x.bfloat16())).all()
    assert "float32 only" in runs_on(model).reason


def test_nothing_keeps_a_model_alive(model):
    alive = weakref.ref(hf_optim.accelerate(model, [NAIVE]).get_submodule(UP).packed_weight)
    hf_optim.restore(model)
    gc.collect()
    assert alive() is None


def test_a_compiled_model_has_no_graph_break(model):
    hf_optim.accelerate(model, [Kernel("twice", supports=lambda w: None, prepack=Traced)])
    mlp = model.model.layers[0].mlp
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = mlp(x)
        assert torch.allclose(torch.compile(mlp, backend="eager", fullgraph=True)(x), wanted)


class Traced(PackedWeight):
    """Without the call counter, each value of which would make the compiler recompile."""

    def forward(self, x):
        return x @ self.decoded().T


def test_coverage_counts_packed_weights(model):
    from hf_optim.toolkit import topology

    names = [name for name in topology.linears(model) if ".mlp." in name]
    before = topology.coverage(model, names)
    hf_optim.accelerate(model, [NAIVE])
    after = topology.coverage(model, names)
    assert (after.covered, after.block_linears) == (before.covered, before.block_linears)


# -- where kernels come from ------------------------------------------------------------------------------------------
CALLED = []


@technique("offering", family="test", contract=Contract(), reload=Reload.STOCK_DENSE)
class Offering(Technique):
    """Registers the naive kernel."""

    @hookimpl
    def register_kernels(self, register):
        CALLED.append(self)
        register(NAIVE)


@technique("confused", family="test", contract=Contract(), reload=Reload.STOCK_DENSE)
class Confused(Technique):
    """Registers an object that is not a Kernel."""

    @hookimpl
    def register_kernels(self, register):
        register("double")


@technique("silent", family="test", contract=Contract(), reload=Reload.STOCK_DENSE)
class Silent(Technique):
    """Registers nothing."""


def optimized(model, *steps):
    run = start_run(OptimConfig(steps=steps), model.config)
    run.model = model
    return run


def test_the_hooks_of_a_recipe_are_called_once(model, x):
    CALLED.clear()
    run = optimized(model, Offering(), Offering())
    hf_optim.accelerate(model)
    hf_optim.accelerate(model)
    assert len(CALLED) == 2
    assert list(run.recipe.steps) == CALLED
    assert runs_on(model).kernel == "naive int4"
    hf_optim.restore(model)
    hf_optim.accelerate(model)
    assert len(CALLED) == 2
    assert runs_on(model).kernel == "naive int4"


def test_registering_something_else_raises(model):
    optimized(model, Confused())
    with pytest.raises(TypeError, match=r"not an hf_optim\.Kernel"):
        hf_optim.accelerate(model)


INSTALLED = "hf_optim.compressed.packed.accelerate.installed_kernels"


@pytest.mark.parametrize("steps", [(), (Silent(),)])
def test_installed_kernels_run_a_model_with_and_without_a_recipe(steps, model, monkeypatch):
    monkeypatch.setattr(INSTALLED, lambda: (NAIVE,))
    if steps:
        optimized(model, *steps)
    hf_optim.accelerate(model)
    assert runs_on(model).kernel == "naive int4"


def test_kernels_of_the_recipe_are_tried_before_installed_ones(model, monkeypatch):
    installed = Kernel("installed", supports=lambda w: None, prepack=PackedWeight)
    monkeypatch.setattr(INSTALLED, lambda: (installed, NAIVE))
    optimized(model, Offering())
    assert kernels_for(model) == (NAIVE, installed)


def test_a_compressed_layer_without_a_kernel_is_reported(model, monkeypatch):
    monkeypatch.setattr(INSTALLED, lambda: ())
    with pytest.warns(KernelWarning, match="no kernel handles this kind of weight"):
        hf_optim.accelerate(model)


# -- with other libraries ----------------------------------------------------------------------------------------------
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # read by peft
def test_an_adapter_trains_over_packed_layers(model):
    peft = pytest.importorskip("peft")
    dense = copy.deepcopy(model)
    hf_optim.accelerate(model, [NAIVE])
    grads = []
    for each in (model, dense):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            config = peft.LoraConfig(target_modules=["up_proj"], r=2, init_lora_weights=False)
            adapted = peft.get_peft_model(each, config)
        adapted(TOKENS, labels=TOKENS).loss.backward()
        grads.append([p.grad for p in adapted.parameters() if p.requires_grad])
    assert len(grads[0]) == 4
    assert isinstance(model.model.layers[0].mlp.up_proj.base_layer, PackedLinear)
    assert all(float((a - b).norm() / b.norm()) < 1e-4 for a, b in zip(*grads, strict=True))


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # read by peft
@pytest.mark.parametrize("safe", [False, True])
def test_an_adapter_is_not_merged_into_packed_layers(model, safe):
    peft = pytest.importorskip("peft")
    hf_optim.accelerate(model, [NAIVE])
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["up_proj"], r=2, init_lora_weights=False))
    with pytest.raises(ModelError, match="restore"):
        adapted.merge_and_unload(safe_merge=safe)


def test_a_stock_checkpoint_runs_packed(model, tmp_path):
    from transformers import LlamaForCausalLM

    model.save_pretrained(tmp_path / "a")
    stock = LlamaForCausalLM.from_pretrained(tmp_path / "a")
    assert hasattr(stock, "ct_decompress_hook")
    hf_optim.accelerate(stock, [NAIVE])
    assert not hasattr(stock, "ct_decompress_hook")
    assert sum(row.kernel is not None for row in hf_optim.report(stock)) == 6
    hf_optim.accelerate(model, [NAIVE])
    with torch.no_grad():
        assert torch.equal(model(TOKENS).logits, stock(TOKENS).logits)
    stock.save_pretrained(tmp_path / "b")
    one, two = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("a", "b"))
    assert one == two


def test_no_warning_for_a_model_without_compressed_layers():
    model = tiny_llama()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hf_optim.accelerate(model, [NAIVE])
    assert all(row.kernel is None for row in hf_optim.report(model))


@pytest.mark.parametrize("name", ["babyllama-1m", "stories260k"])
def test_greedy_text_is_that_of_the_stock_reload(name, shared_models, tmp_path):
    from transformers import AutoModelForCausalLM

    folder = shared_models / name
    made = quantize(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), 4, 4, only="layers")
    made.save_pretrained(tmp_path)
    tokens = torch.tensor([[1, 40, 7]])
    texts = []
    for kernels in ([], [NAIVE]):
        model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
        if kernels:
            hf_optim.accelerate(model, kernels)
            assert sum(row.kernel is not None for row in hf_optim.report(model)) >= 7
        texts.append(model.generate(tokens, max_new_tokens=200, do_sample=False, eos_token_id=None, pad_token_id=0))
    assert texts[0].shape[1] == 203
    assert torch.equal(*texts)


def test_a_kernel_for_outliers_is_tried_first_and_only_for_weights_with_a_threshold():
    model = quantize(tiny_llama().requires_grad_(False), bits=8, size=None)
    compressed.set_outlier_threshold(model, [UP], 5.0)
    asked = []
    apart = Kernel("apart", lambda weight: asked.append((weight.name, weight.outliers)), PackedWeight, outliers=True)
    hf_optim.accelerate(model, [NAIVE, apart])
    assert asked == [(UP, 5.0)]
    assert model.get_submodule(UP).packing.kernel is apart
    assert model.model.layers[1].mlp.up_proj.packing.kernel is NAIVE
    hf_optim.restore(model)
    # If it declines, other kernels are tried; the description still has the threshold.
    hf_optim.accelerate(model, [Kernel("apart", lambda weight: "not here", PackedWeight, outliers=True), NAIVE])
    assert model.get_submodule(UP).packing.kernel is NAIVE
    assert model.get_submodule(UP).packing.description.outliers == 5.0


def test_the_24_pattern_is_checked_in_every_chunk(monkeypatch):
    monkeypatch.setattr(codes, "CHUNK", 24)
    matrix = torch.arange(1.0, 57.0).view(7, 8)
    matrix[:, ::2] = 0
    assert codes.is_sparse24(matrix)
    assert codes.is_sparse24(matrix.T.contiguous().T)
    for row in range(7):
        changed = matrix.clone()
        changed[row, 4] = 1
        assert not codes.is_sparse24(changed)
    assert not codes.is_sparse24(matrix[:, :6])
    assert not codes.is_sparse24(matrix[:0])


def test_outlier_thresholds_of_other_weights_are_ignored():
    for fields in ({"bits": 4}, {"bits": 8, "size": 16}, {"bits": 8, "size": None, "activations": "int8"}):
        model = quantize(tiny_llama().requires_grad_(False), **fields)
        compressed.set_outlier_threshold(model, [UP], 5.0)
        hf_optim.accelerate(model, [NAIVE])
        assert model.get_submodule(UP).packing.description.outliers is None


def test_codes_that_no_kernel_runs_are_saved_as_codes(tmp_path):
    quantize(tiny_llama().requires_grad_(False), 8, None, kind="float", activations="fp8").save_pretrained(tmp_path)
    model = LlamaForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad(), pytest.warns(KernelWarning):
        expected = hf_optim.accelerate(model, [])(TOKENS).logits
    model.save_pretrained(tmp_path / "again")
    assert load_file(tmp_path / "again" / "model.safetensors")[f"{UP}.weight"].dtype == torch.float8_e4m3fn
    with torch.no_grad():
        assert torch.equal(LlamaForCausalLM.from_pretrained(tmp_path / "again")(TOKENS).logits, expected)
