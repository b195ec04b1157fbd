"""accelerate, restore and report, on kernels made up here and on the weight-only one."""

from __future__ import annotations

import copy
import gc
import warnings
import weakref
from types import SimpleNamespace

import pytest
import torch
from tiny_models import tiny_gpt2, tiny_llama
from torch import nn

import hf_optim
from hf_optim import Contract, Kernel, Reload, Technique, hookimpl, technique
from hf_optim.acceleration import KernelWarning
from hf_optim.config import OptimConfig
from hf_optim.run import Run


class Doubled:
    """Twice the dense result, so that a test sees whether it ran."""

    def __init__(self, module):
        self.weight = module.weight.detach().clone()
        self.calls = 0

    def __call__(self, x):
        self.calls += 1
        return 2 * (x @ self.weight.T)


def mlp(name, module):
    return None if name.endswith(("up_proj", "down_proj")) else ""


DOUBLE = Kernel("double", serves=mlp, bind=Doubled)
UP = "model.layers.0.mlp.up_proj"


@pytest.fixture
def model():
    return tiny_llama().requires_grad_(False)


@pytest.fixture
def x():
    return torch.randn(3, 32, generator=torch.Generator().manual_seed(0))


def snapshot(model):
    return [(name, type(m), dict(m.__dict__)) for name, m in model.named_modules()]


def runs_on(model, name=UP):
    return {row.name: row for row in hf_optim.report(model)}[name]


def test_kernels_are_bound_and_taken_off_again(model, x):
    before, keys = snapshot(model), list(model.state_dict())
    forward = nn.Linear.forward
    up = model.get_submodule(UP)
    dense = up(x)
    assert hf_optim.accelerate(model, [DOUBLE]) is model
    assert torch.equal(up(x), 2 * dense)
    assert torch.equal(up(input=x), 2 * dense)
    assert list(model.state_dict()) == keys
    assert nn.Linear.forward is forward
    hf_optim.restore(model)
    assert torch.equal(up(x), dense)
    after = snapshot(model)
    assert [(name, cls, list(d)) for name, cls, d in after] == [(name, cls, list(d)) for name, cls, d in before]
    hf_optim.restore(model)


def test_a_forward_of_the_instance_comes_back(model, x):
    up = model.get_submodule(UP)
    up.forward = lambda input: input + 1
    stock = up.__dict__["forward"]
    hf_optim.accelerate(model, [DOUBLE])
    assert up.__dict__["forward"] is not stock
    hf_optim.restore(model)
    assert up.__dict__["forward"] is stock


def test_a_forward_wrapped_meanwhile_is_left_alone(model, x):
    up = model.get_submodule(UP)
    dense = up(x)
    hf_optim.accelerate(model, [DOUBLE])
    inner = up.forward
    up.forward = lambda input: inner(input) + 1
    hf_optim.restore(model)
    assert torch.equal(up(x), dense + 1)


def test_twice_is_once(model, x):
    hf_optim.accelerate(model, [DOUBLE])
    bound = model.get_submodule(UP).forward
    hf_optim.accelerate(model, [DOUBLE])
    assert model.get_submodule(UP).forward is bound
    hf_optim.restore(model)
    assert "forward" not in model.get_submodule(UP).__dict__


def test_the_report_is_a_table_of_every_linear(model):
    assert runs_on(model).reason == "accelerate() was not called"
    hf_optim.accelerate(model, [DOUBLE])
    report = hf_optim.report(model)
    assert len(report) == 15
    assert (runs_on(model).shape, runs_on(model).kernel) == ((48, 32), "double")
    assert (runs_on(model, "lm_head").kernel, runs_on(model, "lm_head").reason) == (None, "not compressed")
    lines = str(report).splitlines()
    assert len(lines) == 16
    assert next(line for line in lines if "up_proj" in line).split() == [UP, "48", "x", "32", "double"]
    assert len(hf_optim.report(tiny_gpt2())) == 9


def test_layers_that_stay_dense_are_named_in_one_warning(model):
    stubborn = Kernel("stubborn", serves=lambda n, m: "made of wood" if "mlp" in n else "", bind=Doubled)
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
def test_a_kernel_that_cannot_bind_leaves_the_layer(model, x, error):
    def bind(module):
        raise error

    dense = model.get_submodule(UP)(x)
    with pytest.warns(KernelWarning, match=str(error)):
        hf_optim.accelerate(model, [Kernel("weak", serves=mlp, bind=bind)])
    assert torch.equal(model.get_submodule(UP)(x), dense)
    assert str(error) in runs_on(model).reason


def test_the_next_kernel_is_tried(model, x):
    first = Kernel("first", serves=lambda n, m: "not today", bind=Doubled)
    dense = model.get_submodule(UP)(x)
    with pytest.warns(KernelWarning, match="first: not today"):
        hf_optim.accelerate(model, [first, DOUBLE])
    assert torch.equal(model.get_submodule(UP)(x), 2 * dense)


def test_a_kernel_that_raises_falls_back_once_and_loudly(model, x):
    calls = []

    def broken(x):
        calls.append(x)
        raise RuntimeError("out of shared memory")

    up = model.get_submodule(UP)
    dense = up(x)
    hf_optim.accelerate(model, [Kernel("broken", serves=mlp, bind=lambda module: broken)])
    with pytest.warns(KernelWarning, match=r"layers\.0\.mlp\.up_proj is dense from now on: broken raised RuntimeError"):
        assert torch.equal(up(x), dense)
    assert torch.equal(up(x), dense)
    assert len(calls) == 1
    assert "out of shared memory" in runs_on(model).reason


def test_a_faulty_input_is_not_the_kernels_fault(model, x):
    hf_optim.accelerate(model, [DOUBLE])
    up = model.get_submodule(UP)
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        up(x[:, :5])
    assert runs_on(model).kernel == "double"


def test_a_kernel_may_leave_an_input_to_the_dense_layer(model, x):
    class Few(Doubled):
        label = "double (few rows)"

        def takes(self, x):
            return x.shape[0] < 3

    up = model.get_submodule(UP)
    dense = up(x)
    hf_optim.accelerate(model, [Kernel("few", serves=mlp, bind=Few)])
    assert torch.equal(up(x), dense)
    assert torch.allclose(up(x[:2]), 2 * dense[:2])
    assert runs_on(model).kernel == "double (few rows)"


def test_gradients_are_those_of_the_dense_layer(model, x):
    up = model.get_submodule(UP)
    hf_optim.accelerate(model, [DOUBLE])
    x.requires_grad_()
    up(x).sum().backward()
    assert torch.allclose(x.grad, up.weight.sum(0).expand_as(x))
    with torch.no_grad():
        assert torch.allclose(up(x), 2 * (x @ up.weight.T))
    up.weight.requires_grad_()
    up(x.detach()).sum().backward()
    assert torch.allclose(up.weight.grad, x.detach().sum(0).expand_as(up.weight))


@pytest.mark.parametrize("change", ["in place", "replaced", "type"])
def test_a_weight_that_changed_is_not_computed_with_the_old_codes(model, x, change):
    hf_optim.accelerate(model, [DOUBLE])
    up = model.get_submodule(UP)
    if change == "in place":
        up.weight.mul_(3)
    elif change == "replaced":
        up.weight.data = up.weight.data * 3
    else:
        up.double()
        x = x.double()
    with pytest.warns(KernelWarning, match="its weight changed"):
        y = up(x)
    assert torch.equal(y, x @ up.weight.T)
    assert "call accelerate() again" in runs_on(model).reason
    hf_optim.accelerate(model, [DOUBLE])
    assert torch.equal(up(x), 2 * (x @ up.weight.T))


def test_a_copy_runs_on_its_own_kernels(model, x):
    dense = model.get_submodule(UP)(x)
    hf_optim.accelerate(model, [DOUBLE])
    other = copy.deepcopy(model)
    up = other.get_submodule(UP)
    assert torch.equal(up(x), 2 * dense)
    assert model.get_submodule(UP).forward.call.calls == 0
    assert up.forward.module is up
    up.weight.mul_(2)
    with pytest.warns(KernelWarning, match="its weight changed"):
        assert torch.equal(up(x), 2 * dense)
    hf_optim.restore(other)
    assert "forward" not in up.__dict__
    assert runs_on(model).kernel == "double"
    model.get_submodule(UP).weight.mul_(2)
    assert runs_on(copy.deepcopy(model)).kernel is None


def test_nothing_keeps_a_model_alive(x):
    model = tiny_llama()
    alive = weakref.ref(hf_optim.accelerate(model, [DOUBLE]).get_submodule(UP))
    del model
    gc.collect()
    assert alive() is None


def test_a_compiled_model_has_no_graph_break(model, x):
    dense = model.get_submodule(UP)(x)
    hf_optim.accelerate(model, [Kernel("double", serves=mlp, bind=lambda m: nn.Sequential(Twice(m.weight)))])
    compiled = torch.compile(model.get_submodule(UP), backend="eager", fullgraph=True)
    with torch.no_grad():
        assert torch.equal(compiled(x), 2 * dense)


class Twice(nn.Module):
    def __init__(self, weight):
        super().__init__()
        self.register_buffer("weight", weight.detach().clone())

    def forward(self, x):
        return 2 * (x @ self.weight.T)


def test_a_saved_model_is_the_stock_one(model, tmp_path):
    model.save_pretrained(tmp_path / "before")
    hf_optim.accelerate(model, [DOUBLE])
    model.save_pretrained(tmp_path / "after")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "before" / name).read_bytes() == (tmp_path / "after" / name).read_bytes()


# -- where kernels come from ------------------------------------------------------------------------------------------
ASKED = []


@technique("offering", family="test", contract=Contract(), reload=Reload.STOCK_DENSE)
class Offering(Technique):
    """Offers the kernel above."""

    @hookimpl
    def register_kernels(self, register):
        ASKED.append(self)
        register(DOUBLE)


@technique("confused", family="test", contract=Contract(), reload=Reload.STOCK_DENSE)
class Confused(Technique):
    """Offers what is no kernel."""

    @hookimpl
    def register_kernels(self, register):
        register("double")


@technique("silent", family="test", contract=Contract(), reload=Reload.STOCK_DENSE)
class Silent(Technique):
    """Offers nothing."""


def optimized(model, *steps):
    run = Run(OptimConfig(steps=steps), model.config)
    run.model = model
    return run


def test_the_steps_of_the_recipe_are_asked_once(model, x):
    ASKED.clear()
    run = optimized(model, Offering(), Offering())
    hf_optim.accelerate(model)
    hf_optim.accelerate(model)
    assert len(ASKED) == 2
    assert list(run.recipe.steps) == ASKED
    assert runs_on(model).kernel == "double"
    hf_optim.restore(model)
    hf_optim.accelerate(model)
    assert len(ASKED) == 2
    assert runs_on(model).kernel == "double"


def test_what_is_no_kernel_is_refused(model):
    optimized(model, Confused())
    with pytest.raises(TypeError, match=r"not an hf_optim\.Kernel"):
        hf_optim.accelerate(model)


def test_a_model_without_a_recipe_asks_the_catalogue(model, monkeypatch):
    found = SimpleNamespace(all=lambda: [Silent, Offering])
    monkeypatch.setattr("hf_optim.acceleration.catalogue", lambda: found)
    hf_optim.accelerate(model)
    assert runs_on(model).kernel == "double"


def test_a_compressed_layer_without_a_kernel_says_so(model):
    optimized(model, Silent())
    model.get_submodule(UP).quantization_scheme = SimpleNamespace()
    with pytest.warns(KernelWarning, match="no technique of the recipe offers a kernel"):
        hf_optim.accelerate(model)


# -- the weight-only kernel -------------------------------------------------------------------------------------------
def quantized_llama(bits=4, group_size=32, dtype=torch.float32, hidden_size=512):
    """A Llama with wide projections of which those of the MLP are quantized, as after the compression of a model."""
    from hf_optim import formats

    model = tiny_llama(hidden_size=hidden_size, intermediate_size=1024, num_hidden_layers=1).to(dtype)
    strategy = "group" if group_size else "channel"
    scheme = formats.scheme(bits, strategy=strategy, group_size=group_size)
    high = 2 ** (bits - 1) - 1
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and ".mlp." in name:
            weight = module.weight.detach().float().view(module.out_features, -1, group_size or module.in_features)
            scale = (weight.abs().amax(-1, keepdim=True) / high).to(dtype)
            codes = (weight / scale.float()).round().clamp(-high - 1, high).to(torch.int8)
            formats.store(module, scheme, codes.view_as(module.weight), scale[..., 0])
    return model


def wna16_kernel():
    from hf_optim_kernels.wna16 import layer

    return Kernel("wna16", serves=layer.serves, bind=layer.bind)


@pytest.mark.parametrize(
    ("bits", "group_size", "dtype"),
    [(4, 32, torch.float32), (4, 128, torch.bfloat16), (8, None, torch.float32)],
    ids=str,
)
def test_a_quantized_model_runs_packed(bits, group_size, dtype):
    model = quantized_llama(bits, group_size, dtype, 512 if bits == 4 else 1024)
    tokens = torch.arange(5, 12)[None]
    with torch.no_grad():
        dense = model(tokens).logits.double()
        hf_optim.accelerate(model, [wna16_kernel()])
        kernels = {row.name: row.kernel for row in hf_optim.report(model)}
        assert {name for name, kernel in kernels.items() if kernel} == {n for n in kernels if ".mlp." in n}
        packed = model(tokens).logits.double()
        assert not torch.equal(packed, dense)
        assert float((packed - dense).norm() / dense.norm()) < 1e-2
        hf_optim.restore(model)
        assert torch.equal(model(tokens).logits.double(), dense)


def test_a_quantized_model_compiles_in_one_graph():
    model = hf_optim.accelerate(quantized_llama(), [wna16_kernel()])
    mlp = model.model.layers[0].mlp
    x = torch.randn(1, 1, 512, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = mlp(x)
        assert torch.allclose(torch.compile(mlp, backend="eager", fullgraph=True)(x), wanted)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # read by peft
def test_an_adapter_trains_over_packed_layers():
    peft = pytest.importorskip("peft")
    model = quantized_llama()
    dense = copy.deepcopy(model)
    hf_optim.accelerate(model, [wna16_kernel()])
    grads = []
    for each in (model, dense):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            config = peft.LoraConfig(target_modules=["up_proj"], r=2, init_lora_weights=False)
            adapted = peft.get_peft_model(each, config)
        adapted(torch.arange(5, 9)[None], labels=torch.arange(5, 9)[None]).loss.backward()
        grads.append([p.grad for p in adapted.parameters() if p.requires_grad])
    assert len(grads[0]) == 2
    # The layers before the first adapter record no gradient and run packed.
    assert all(float((a - b).norm() / b.norm()) < 1e-2 for a, b in zip(*grads, strict=True))


def test_layers_too_small_stay_dense_and_are_named():
    from hf_optim import formats

    model = tiny_llama()
    up = model.get_submodule(UP)
    scale = up.weight.abs().amax(1, keepdim=True) / 7
    formats.store(up, formats.scheme(4), (up.weight / scale).round().to(torch.int8), scale)
    with pytest.warns(KernelWarning, match=r"up_proj \(wna16: a layer of 1,536 weights is faster dense"):
        hf_optim.accelerate(model, [wna16_kernel()])
    assert runs_on(model).kernel is None


def test_a_stock_checkpoint_runs_packed(tmp_path):
    from transformers import LlamaForCausalLM

    from hf_optim import formats

    formats.attach_quantizer(made := quantized_llama())
    made.save_pretrained(tmp_path)
    model = LlamaForCausalLM.from_pretrained(tmp_path)
    assert hasattr(model, "ct_decompress_hook")
    hf_optim.accelerate(model, [wna16_kernel()])
    assert not hasattr(model, "ct_decompress_hook")
    assert sum(row.kernel is not None for row in hf_optim.report(model)) == 3
    hf_optim.accelerate(made, [wna16_kernel()])
    tokens = torch.arange(5, 12)[None]
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, made(tokens).logits)


def test_no_warning_where_nothing_was_to_be_accelerated(model):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hf_optim.accelerate(model, [wna16_kernel()])
    assert all(row.kernel is None for row in hf_optim.report(model))
