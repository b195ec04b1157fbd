"""Layers that read the same tensor run as one product: q, k and v; gate and up."""

from __future__ import annotations

import contextlib
import copy
import gc
import io
import operator
import weakref
from types import SimpleNamespace

import pytest
import torch
from naive_kernel import NAIVE, PARTS, PackedWeight, supports_all
from test_accelerate import Broken, Traced, quantize, runs_on, state
from tiny_models import TINY, tiny_llama
from torch import nn

import hf_optim
from hf_optim import Kernel
from hf_optim.compressed.packed.packed_linear import KernelWarning, PackedLinear
from hf_optim.compressed.packed.shared_output import FusedSlice

OPERANDS = "test_accelerate.py"  # in stack traces of what Traced computes
TOKENS = torch.arange(5, 15)[None]
Q, K, V = (f"model.layers.0.self_attn.{name}_proj" for name in "qkv")
GATE, UP = (f"model.layers.0.mlp.{name}_proj" for name in ("gate", "up"))


def joined(packed_weights):
    """Join several naive packed weights into one."""
    first = packed_weights[0]
    parts = [packed_weight.codes() for packed_weight in packed_weights]

    def codes():
        whole = {"order": first.own_order, "input_scale": first.own_input_scale, "input_zero": first.own_input_zero}
        for name in PARTS[:3]:
            held = [getattr(part, name) for part in parts]
            whole[name] = None if held[0] is None else torch.cat(held)
        return SimpleNamespace(**whole)

    bias = None if first.bias is None else torch.cat([packed_weight.bias for packed_weight in packed_weights])
    shape = (sum(packed_weight.shape[0] for packed_weight in packed_weights), first.shape[1])
    weight = SimpleNamespace(codes=codes, bias=bias, shape=shape, dtype=first.dtype, bits=first.bits,
                             kind="int" if first.own_scale is not None else "dense",
                             inputs=first.inputs)  # fmt: skip
    return type(first)(weight)


JOINING = Kernel("joining", supports=supports_all, prepack=PackedWeight, join=joined)


def quantized(name):
    """Return a tiny model with all linear layers quantized (the head too, so it is not tied)."""
    return quantize(
        TINY[name](**{} if name == "t5" else {"tie_word_embeddings": False}), size=16, only=ONLY.get(name, "")
    )


def packed(name="llama", kernel=JOINING):
    model = quantized(name).requires_grad_(False)
    return hf_optim.accelerate(model, [kernel])


def packed_weights(model):
    """Return the packed weights that hold a weight, without slices of fused ones."""
    return [module for module in model.modules() if isinstance(module, PackedWeight)]


def fused_outputs(model):
    return [module.fused_output for module in model.modules() if isinstance(module, FusedSlice)]


def calls(model):
    return sum(packed_weight.calls for packed_weight in packed_weights(model))


@pytest.fixture
def model():
    return packed()


@pytest.fixture
def x():
    return torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))


def inputs_of(model):
    from hf_optim.toolkit.topology.fake_inputs import dummy_inputs

    return dummy_inputs(model)


ONLY = {"t5": "block"}
# Products of one forward, fused and separate. GPT-2 has no nn.Linear except its head; Mixtral's experts are fused.
COUNTS = {
    "llama": (9, 15), "qwen2": (9, 15), "opt": (9, 13), "bert": (10, 14), "vit": (9, 13), "t5": (22, 32),
    "mixtral": (5, 9),
}  # fmt: skip


@pytest.mark.many
@pytest.mark.parametrize("name", COUNTS)
def test_every_architecture_runs_as_before(name):
    apart, model = packed(name, NAIVE), packed(name)
    inputs = {**inputs_of(model)}
    inputs = {key: torch.cat([value, value]) for key, value in inputs.items()}
    with torch.no_grad():
        wanted, found = apart(**inputs), model(**inputs)
    assert torch.allclose(found.logits, wanted.logits, rtol=1e-4, atol=1e-5)
    assert (calls(model), calls(apart)) == COUNTS[name]
    assert all(fused_output.cached is None for fused_output in fused_outputs(model))
    if model.can_generate():
        texts = [m.generate(inputs["input_ids"], max_new_tokens=5, do_sample=False) for m in (model, apart)]
        assert torch.equal(*texts)
        assert all(fused_output.cached is None for fused_output in fused_outputs(model))


@pytest.mark.parametrize("name", ["llama", "qwen2", "bert"])
def test_codes_are_bit_exact_and_nothing_is_held_twice(name, tmp_path):
    model, apart = packed(name), packed(name, NAIVE)
    for row in hf_optim.report(model):
        one, two = (m.get_submodule(row.name).codes() for m in (model, apart))
        assert torch.equal(one.codes, two.codes)
        assert torch.equal(one.scale, two.scale)
    counts = [sum(buffer.numel() for buffer in m.buffers()) for m in (model, apart)]
    assert counts[0] == counts[1]
    apart.save_pretrained(tmp_path / "a")
    model.save_pretrained(tmp_path / "b")
    one, two = ((tmp_path / name / "model.safetensors").read_bytes() for name in "ab")
    assert one == two


@pytest.mark.parametrize("name", ["llama", "qwen2", "bert"])
def test_restore_leaves_no_trace(name):
    model = quantized(name)
    before, weights = state(model), {key: value.clone() for key, value in model.state_dict().items()}
    hf_optim.accelerate(model, [JOINING])
    assert any(isinstance(module, FusedSlice) for module in model.modules())
    hf_optim.restore(model)
    assert state(model) == before
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
    pointers = [parameter.untyped_storage().data_ptr() for parameter in model.parameters()]
    assert len(set(pointers)) == len(pointers)


def test_dense_24_weights_are_joined_too(tmp_path):
    model = tiny_llama().requires_grad_(False)
    for name in (Q, K, V, UP):
        model.get_submodule(name).weight.view(-1, 4)[:, :2] = 0
    model.save_pretrained(tmp_path / "a")
    wanted = model(TOKENS).logits
    hf_optim.accelerate(model, [Kernel("24", supports=supports_all, prepack=PackedWeight, sparse24=True, join=joined)])
    assert runs_on(model, Q).kernel == "naive dense32, with k_proj, v_proj"
    assert runs_on(model, UP).kernel == "naive dense32"
    assert torch.allclose(model(TOKENS).logits, wanted, atol=1e-5)
    model.save_pretrained(tmp_path / "b")
    one, two = ((tmp_path / name / "model.safetensors").read_bytes() for name in "ab")
    assert one == two
    assert torch.equal(hf_optim.restore(model)(TOKENS).logits, wanted)


def test_the_report_names_the_fused_layers(model):
    assert runs_on(model, K).kernel == "naive int4, with q_proj, v_proj"
    assert runs_on(model, UP).kernel == "naive int4, with gate_proj"
    assert runs_on(model, "model.layers.0.mlp.down_proj").kernel == "naive int4"


def test_layers_of_a_kernel_that_cannot_join_stay_separate():
    def weary(packed_weights):
        raise RuntimeError("not today")

    for join in (None, lambda packed_weights: None, weary):
        model = packed(kernel=Kernel("single", supports=supports_all, prepack=PackedWeight, join=join))
        assert not fused_outputs(model)
        assert runs_on(model, K).kernel == "naive int4"


def test_different_weights_stay_separate():
    model = quantize(tiny_llama().requires_grad_(False), 4, 16, only="q_proj")
    quantize(model, 8, 16, only="k_proj")
    quantize(model, 4, 16, only="v_proj")
    hf_optim.accelerate(model, [JOINING])
    assert runs_on(model, Q).kernel == "naive int4, with v_proj"
    assert runs_on(model, K).kernel == "naive int8"


# -- a slice is correct for every input -------------------------------------------------------------------------------
def test_a_slice_is_correct_for_every_input(model, x):
    q, k, v = (model.get_submodule(name) for name in (Q, K, V))
    other = x + 1
    dense = {(layer, t): t @ layer.weight.T for layer in (q, k, v) for t in (x, other)}

    def right(layer, t):
        return torch.allclose(layer(t), dense[layer, t], atol=1e-5)

    assert all(right(*pair) for pair in ((q, x), (k, other), (v, x), (v, x), (k, x), (q, x), (q, other), (v, other)))
    old = k(x)
    x.mul_(2)
    assert torch.allclose(v(x), 2 * dense[v, x], atol=1e-4)
    assert torch.allclose(k(x), 2 * old, atol=1e-4)
    assert torch.allclose(q(x.clone()), 2 * dense[q, x], atol=1e-4)


def test_the_product_is_computed_once_and_released(model, x):
    q, k, v = (model.get_submodule(name) for name in (Q, K, V))
    before, once = calls(model), x.clone()
    with torch.no_grad():
        assert q(once).shape == (2, 5, 32)
        k(once)
        assert q.packed_weight.fused_output.cached is not None
        v(once)
    assert calls(model) == before + 1
    assert q.packed_weight.fused_output.cached is None
    alive = weakref.ref(once)
    del once
    assert alive() is None


def test_outputs_may_be_modified_in_place(model, x):
    q, k, v = (model.get_submodule(name) for name in (Q, K, V))
    x.requires_grad_()
    outs = [layer(x).mul_(2) for layer in (q, k, v)]
    dense = [2 * (x @ layer.decoded().T) for layer in (q, k, v)]
    for out, wanted in zip(outs, dense, strict=True):
        assert torch.allclose(out, wanted, atol=1e-5)
    (found,), (wanted,) = (torch.autograd.grad(sum(o.square().sum() for o in each), x) for each in (outs, dense))
    assert torch.allclose(found, wanted, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_gradients_are_recorded_where_required(model, x, mode):
    q, k, v = (model.get_submodule(name) for name in (Q, K, V))
    x.requires_grad_()
    with mode():
        q(x)
    out = k(x)
    (wanted,) = torch.autograd.grad((x @ k.decoded().T).square().sum(), x)
    (found,) = torch.autograd.grad(out.square().sum(), x)
    assert torch.allclose(found, wanted, rtol=1e-4, atol=1e-4)
    with torch.inference_mode():
        y = torch.ones(3, 32)
        assert torch.allclose(v(y), y @ v.weight.T, atol=1e-5)
        assert torch.allclose(q(y), y @ q.weight.T, atol=1e-5)


def test_hooks_run_on_their_own_layer(model):
    seen = {}
    for name in (Q, K, V):
        model.get_submodule(name).register_forward_hook(lambda m, i, o, name=name: seen.update({name: o.shape}))
    model.get_submodule(K).register_forward_hook(lambda m, i, o: o * 2)
    apart = packed(kernel=NAIVE)
    apart.get_submodule(K).register_forward_hook(lambda m, i, o: o * 2)
    with torch.no_grad():
        assert torch.allclose(model(TOKENS).logits, apart(TOKENS).logits, atol=1e-5)
    assert [shape[-1] for shape in seen.values()] == [32, 16, 16]


def test_outputs_are_contiguous_where_the_model_needs_it(monkeypatch):
    from transformers.models.llama.modeling_llama import LlamaMLP

    def flat(self, x):
        gate = self.gate_proj(x)
        return self.down_proj(self.act_fn(gate.view(-1)).view(gate.shape) * self.up_proj(x))

    monkeypatch.setattr(LlamaMLP, "forward", flat)
    model, apart = packed(), packed(kernel=NAIVE)
    with torch.no_grad():
        assert torch.allclose(model(TOKENS).logits, apart(TOKENS).logits, atol=1e-5)
    assert calls(model) == 9


def test_layers_of_a_model_that_cannot_be_traced_stay_separate(monkeypatch):
    from transformers.models.llama.modeling_llama import LlamaMLP

    forward = LlamaMLP.forward
    monkeypatch.setattr(LlamaMLP, "forward", lambda self, x: [][0])
    model = packed()
    assert not fused_outputs(model)
    monkeypatch.setattr(LlamaMLP, "forward", forward)
    assert type(model.get_submodule(Q)) is PackedLinear
    assert calls(model) == 0


# -- training ---------------------------------------------------------------------------------------------------------
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # read by peft
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("first", ["join", "adapt"])
def test_an_adapter_trains_over_joined_layers(checkpointing, first):
    peft = pytest.importorskip("peft")
    grads = []
    for kernel in (JOINING, NAIVE):
        model = quantize(tiny_llama().requires_grad_(False), size=16, only="")
        if first == "join":
            hf_optim.accelerate(model, [kernel])
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=2, init_lora_weights=False)
            adapted = peft.get_peft_model(model, config)
        if first == "adapt":
            hf_optim.accelerate(adapted, [kernel])
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            model.train()
        loss = adapted(TOKENS, labels=TOKENS).loss
        assert calls(model) == (9 if kernel is JOINING else 15)
        loss.backward()
        grads.append([p.grad for p in adapted.parameters() if p.requires_grad])
    assert len(grads[0]) == 8
    assert all(float((a - b).norm() / b.norm()) < 1e-4 for a, b in zip(*grads, strict=True))


def test_a_bias_shares_memory_with_the_fused_bias():
    model = quantized("qwen2")
    hf_optim.accelerate(model, [JOINING])
    k = model.get_submodule(K)
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(0), requires_grad=True)
    wanted = torch.autograd.grad((x @ k.decoded().T + k.bias).square().sum(), (x, k.bias))
    found = torch.autograd.grad(k(x).square().sum(), (x, k.bias))
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-4) for a, b in zip(found, wanted, strict=True))
    for each in (model, copy.deepcopy(model)):
        layer, other = each.get_submodule(K), each.get_submodule(Q)
        with torch.no_grad():
            old, untouched = layer(x), other(x)
            layer.bias += 1
            assert torch.allclose(layer(x), old + 1)
            layer.bias = nn.Parameter(layer.bias + 1)
            assert torch.allclose(layer(x), old + 2)
            layer.bias.data.add_(1)
            assert torch.allclose(layer(x), old + 3)
            assert torch.equal(other(x), untouched)


# -- copies, moves, failures ------------------------------------------------------------------------------------------
def test_copies_are_fused_and_complete(model, x):
    q = model.get_submodule(Q)
    other = copy.deepcopy(model)
    with torch.no_grad():
        wanted = model(TOKENS).logits
        before = calls(model)
        assert torch.equal(other(TOKENS).logits, wanted)
        assert calls(model) == before
        q(x)
        alone = copy.deepcopy(model.get_submodule(V))
        assert torch.equal(alone(x), model.get_submodule(V)(x))
        assert alone.packed_weight.fused_output.cached is not None
        assert alone.packed_weight.fused_output.cached[0] is x
        file = io.BytesIO()
        torch.save(model.get_submodule(K), file)
        file.seek(0)
        assert torch.equal(torch.load(file, weights_only=False)(x), model.get_submodule(K)(x))
    hf_optim.restore(other)
    assert not fused_outputs(other)
    assert torch.equal(model(TOKENS).logits, wanted)


def test_the_state_dict_round_trips(model):
    other = packed()
    for buffer in packed_weights(other):
        buffer.own_codes.zero_()
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(other(TOKENS).logits, model(TOKENS).logits)


def test_another_dtype_is_fused_again():
    model = quantized("qwen2").requires_grad_(False)
    hf_optim.accelerate(model, [JOINING])
    exact, bias = model.get_submodule(K).codes(), model.get_submodule(K).bias.clone()
    model.to(torch.bfloat16)
    assert runs_on(model, K).kernel == "naive int4, with q_proj, v_proj"
    with torch.no_grad():
        assert torch.isfinite(model(TOKENS).logits).all()
    assert calls(model) == 9
    found = model.get_submodule(K).codes()
    assert torch.equal(found.codes, exact.codes)
    assert torch.equal(found.scale, exact.scale)
    assert torch.equal(model.get_submodule(K).bias, bias.bfloat16())
    model.get_submodule(K).to(torch.float32)
    assert runs_on(model, K).kernel == runs_on(model, Q).kernel == "naive int4"
    model.to(torch.float32)
    assert runs_on(model, K).kernel == "naive int4, with q_proj, v_proj"


def test_a_fused_weight_that_raises_falls_back_layer_by_layer(x):
    model = packed(kernel=Kernel("broken", supports=supports_all, prepack=Broken, join=joined))
    q, k = model.get_submodule(Q), model.get_submodule(K)
    for layer in (q, k):
        with pytest.warns(KernelWarning, match="falls back to the dense path: broken raised RuntimeError"):
            assert torch.allclose(layer(x), x @ layer.weight.T)
        assert torch.allclose(layer(x), x @ layer.weight.T)
    hf_optim.accelerate(model, [JOINING])
    assert "v_proj" not in str(runs_on(model, Q).kernel)
    assert runs_on(model, Q).kernel == "naive int4, with k_proj"
    assert torch.allclose(q(x), x @ q.weight.T, atol=1e-5)


def test_an_input_that_the_fused_weight_does_not_accept(model, x):
    k = model.get_submodule(K)
    with torch.autocast("cpu", torch.bfloat16):
        y = k(x.bfloat16())
    assert y.dtype == torch.bfloat16
    assert torch.allclose(y.float(), x @ k.weight.T, atol=0.1)
    assert calls(model) == 0


def test_accelerating_twice_traces_once(model, monkeypatch):
    before = [id(packed_weight) for packed_weight in packed_weights(model)]
    monkeypatch.setattr("hf_optim.compressed.packed.fused_projections.trace", lambda model: pytest.fail("traced again"))
    hf_optim.accelerate(model, [JOINING])
    assert [id(packed_weight) for packed_weight in packed_weights(model)] == before


def test_nothing_keeps_packed_weights_alive(model):
    alive = weakref.ref(model.get_submodule(K).packed_weight.fused)
    hf_optim.restore(model)
    gc.collect()
    assert alive() is None


# -- compiled ---------------------------------------------------------------------------------------------------------
TRACED = Kernel("traced", supports=supports_all, prepack=Traced, join=joined)


@pytest.fixture
def captured():
    """A compiler backend that records its graphs."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    backend.graphs = graphs
    yield backend
    torch._dynamo.reset()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, contextlib.nullcontext])
def test_a_compiled_model_has_one_product_per_group(captured, mode):
    model = packed(kernel=TRACED)
    with mode():
        wanted = model(TOKENS, use_cache=False).logits
        run = torch.compile(model, backend=captured, fullgraph=True)
        for _ in range(2):
            assert torch.allclose(run(TOKENS, use_cache=False).logits, wanted, atol=1e-6)
    assert len(captured.graphs) == 1
    nodes = [node for node in captured.graphs[0].graph.nodes if node.target is operator.matmul]
    assert len([node for node in nodes if "in decoded" not in node.stack_trace and OPERANDS in node.stack_trace]) == 9
    assert all(fused_output.cached is None for fused_output in fused_outputs(model))


@pytest.mark.many
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_model_generates(backend):
    model = packed(kernel=TRACED)
    settings = {"max_new_tokens": 6, "do_sample": False, "cache_implementation": "static", "disable_compile": True}
    wanted = model.generate(TOKENS, **settings)
    model.forward = torch.compile(model.forward, backend=backend, fullgraph=True)
    assert torch.equal(model.generate(TOKENS, **settings), wanted)
    torch._dynamo.reset()


# -- the packed weights that ship -------------------------------------------------------------------------------------
def test_wna16_fused_equals_wna16_separate():
    layer = pytest.importorskip("hf_optim_kernels.wna16.layer")
    form = (4, 16, torch.bfloat16)

    def prepack(weight):
        return layer.PackedWeight.from_codes(weight.codes(), *form, weight.bias)

    logits = []
    for join in (None, layer.join):
        model = quantize(
            TINY["qwen2"]().to(torch.bfloat16).requires_grad_(False), size=16, symmetric=False, only="proj"
        )
        codes = hf_optim.accelerate(model, [NAIVE]).get_submodule(K).codes()
        hf_optim.restore(model)
        hf_optim.accelerate(model, [Kernel("wna16", supports=supports_all, prepack=prepack, join=join)])
        found = model.get_submodule(K).codes()
        for name in ("codes", "scale", "zero"):
            assert torch.equal(getattr(found, name), getattr(codes, name))
        with torch.no_grad():
            logits.append(model(TOKENS).logits.float())
    assert "with q_proj, v_proj" in runs_on(model, K).kernel
    assert float((logits[0] - logits[1]).norm() / logits[0].norm()) < 1e-2


@pytest.mark.parametrize("inputs", [{}, {"symmetric_activations": False}])
def test_w8a8_on_a_cpu_fused_equals_w8a8_separate(inputs):
    from hf_optim_kernels.w8a8 import cpu, layer

    logits, saved = [], []
    for join in (None, layer.join):
        model = quantize(TINY["qwen2"]().requires_grad_(False), 8, None, only="proj", activations="int8", **inputs)
        hf_optim.accelerate(model, [Kernel("w8a8", supports=supports_all, prepack=cpu.prepack, join=join)])
        with torch.no_grad():
            logits.append(model(TOKENS).logits)
        saved.append(model.get_submodule(K).codes())
    assert "with q_proj, v_proj" in runs_on(model, K).kernel
    assert torch.equal(*logits)
    assert torch.equal(saved[0].codes, saved[1].codes)
    assert torch.equal(saved[0].scale, saved[1].scale)
