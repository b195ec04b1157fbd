"""Mixtures on hf_optim's experts function in generation and under torch.compile."""

from __future__ import annotations

import pytest
import tiny_mixtures
import torch
from capped_oracle import without_other_users
from interpreting import CUDA, INTERPRETER

import hf_optim
from hf_optim.toolkit.topology.experts import fused_experts

IDS = torch.arange(3, 21).reshape(2, 9)
GREEDY = {"max_new_tokens": 3, "do_sample": False}


def hints_of_inductor(test):
    """Let Inductor say what it thinks of the softmax of a router, of products in float32, and of its first graph."""
    for start in ("Online softmax is disabled", "TensorFloat32 tensor cores", "The CUDA Graph is empty"):
        test = pytest.mark.filterwarnings(rf"ignore:\s*{start}:UserWarning")(test)
    return test


@pytest.fixture(autouse=True)
def alone():
    with without_other_users():
        yield


def built(kind, device):
    return tiny_mixtures.build(kind).to(device), IDS.to(device)


@hints_of_inductor
@pytest.mark.parametrize(
    ("kind", "device"),
    [("qwen3_moe", "cpu"), ("gpt_oss", "cpu"), pytest.param("gpt_oss", *INTERPRETER.values, marks=INTERPRETER.marks)]
    + [pytest.param(kind, *CUDA.values, marks=CUDA.marks) for kind in ("qwen3_moe", "gpt_oss")],
)
def test_stock_generate_and_the_door_say_what_the_stock_experts_say(kind, device):
    model, ids = built(kind, device)
    static = {"cache_implementation": "static", "disable_compile": device == "cpu"}
    expected = model.generate(ids, **GREEDY)
    hf_optim.accelerate(model)
    assert torch.equal(model.generate(ids, **GREEDY, **static), expected)
    assert torch.equal(hf_optim.generate(model, input_ids=ids, **GREEDY), expected)
    hf_optim.restore(model)
    assert torch.equal(model.generate(ids, **GREEDY), expected)


@pytest.mark.parametrize("device", [INTERPRETER, CUDA])
@pytest.mark.parametrize("kind", ["gpt_oss", "inkling2_text"])
def test_a_layer_compiles_without_a_break_for_any_number_of_tokens(kind, device):
    if kind not in tiny_mixtures.classes():
        pytest.skip(f"this transformers has no {kind}")
    model, _ = built(kind, device)
    hf_optim.accelerate(model)
    module = next(iter(fused_experts(model).values()))
    compiled = torch.compile(module, backend="eager", fullgraph=True, dynamic=True)
    with torch.no_grad():
        for tokens in (9, 4):
            hidden = torch.randn(tokens, 32, device=device)
            index = torch.rand(tokens, 4, device=device).topk(2).indices
            given = hidden, index, torch.rand(tokens, 2, device=device)
            found, right = compiled(*given), module(*given)
            assert torch.allclose(found, right, rtol=1e-4, atol=1e-4 * float(right.abs().max()))


@pytest.mark.many(every=4)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_model_on_a_cpu_compiles_without_a_break_in_every_type(dtype):
    model, ids = built("mixtral", "cpu")
    hf_optim.accelerate(model.to(dtype))
    gradients = []
    for run in (torch.compile(model, backend="aot_eager", fullgraph=True), model):
        run(ids, use_cache=False, labels=ids).loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
        model.zero_grad()
    for found, right in zip(*gradients, strict=True):
        assert torch.allclose(found, right, rtol=1e-2, atol=1e-2 * float(right.abs().max()))


@pytest.mark.gpu
@hints_of_inductor
def test_a_whole_model_compiles_without_a_break():
    model, ids = built("qwen3_moe", "cuda")
    hf_optim.accelerate(model)
    compiled = torch.compile(model, fullgraph=True)
    with torch.no_grad():
        found, right = (m(ids, use_cache=False).logits for m in (compiled, model))
    assert torch.allclose(found, right, rtol=1e-3, atol=1e-3 * float(right.abs().max()))


@pytest.mark.gpu
def test_a_captured_step_of_a_model_follows_other_inputs():
    model, ids = built("qwen3_moe", "cuda")
    model.to(torch.bfloat16)
    hf_optim.accelerate(model)
    assert set(hf_optim.report(model).experts.values()) == {"hf_optim: kernels"}
    run = lambda: model(ids, use_cache=False).logits  # noqa: E731
    with torch.no_grad():
        run()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = run()
        ids.copy_(torch.randint(3, 100, ids.shape))
        graph.replay()
        assert torch.equal(out, run())
