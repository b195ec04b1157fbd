"""Native mixtures on hf_optim's experts function without a capacity: kernels, switching, copies, and the report."""

from __future__ import annotations

import copy
import gc
import math
import pickle
from types import SimpleNamespace

import pytest
import tiny_mixtures
import torch
from capped_oracle import is_registered, without_other_users

import hf_optim
from hf_optim.toolkit.experts import Routing, attach_experts, attach_routing, expert_product, kernels
from hf_optim.toolkit.experts.gates import recognize
from hf_optim.toolkit.experts.product import padded_product
from hf_optim.toolkit.topology import dummy_inputs
from hf_optim.toolkit.topology.experts import fused_experts

KINDS = (
    "gpt_oss", "openai_privacy_filter", "aria_text", "nemotron_h", "muse_spark", "gemma4_text", "inkling2_text",
)  # fmt: skip
KINDS = tuple(kind for kind in KINDS if kind in tiny_mixtures.classes())
GATES = {  # layout, activation, alpha, offset, limit
    "mixtral": (1, 0, 1.0, 0.0, math.inf), "gpt_oss": (2, 0, 1.702, 1.0, 7.0), "nemotron_h": (0, 4, 1.0, 0.0, math.inf),
    "openai_privacy_filter": (1, 0, 1.702, 1.0, 7.0), "gemma4_text": (1, 2, 1.0, 0.0, math.inf),
    "deepseek_v4": (1, 0, 1.0, 0.0, 10.0), "inkling2_text": None, "lfm2_moe": (1, 0, 1.0, 0.0, math.inf),
}  # fmt: skip


@pytest.fixture(autouse=True)
def alone():
    with without_other_users():
        yield


def output(model):
    with torch.no_grad():
        found = model(**dummy_inputs(model), use_cache=False)
    return found.logits if "logits" in found else found[0]


def chosen(model):
    return {module.config._experts_implementation for module in fused_experts(model).values()}


def module_of(kind, **changes):
    return next(iter(fused_experts(tiny_mixtures.build(kind, **changes)).values()))


@pytest.mark.parametrize("kind", [kind for kind in GATES if kind in tiny_mixtures.classes()])
def test_a_gate_is_recognized_by_what_it_computes(kind):
    assert recognize(module_of(kind)) == GATES[kind]


def test_what_is_not_the_known_formula_is_not_recognized():
    module = module_of("mixtral")
    module.act_fn = torch.nn.PReLU()  # has a weight
    assert recognize(module) is None
    module.act_fn = torch.nn.Hardswish()
    assert recognize(module) is None
    module = module_of("gpt_oss")
    module.limit = 3.5
    assert recognize(module)[-1] == 3.5
    module._apply_gate = lambda rows: rows
    assert recognize(module) is None

    class Own(type(module_of("mixtral"))):
        def _apply_gate(self, rows):
            return super()._apply_gate(rows)

    module = module_of("mixtral")
    module.__class__ = Own
    assert recognize(module) is None


@pytest.mark.interpreted
@pytest.mark.parametrize("kind", KINDS)
def test_kernels_compute_every_native_class(kind):
    module = module_of(kind)
    random = torch.Generator().manual_seed(0)
    width = module.down_proj.shape[1] if not module.is_transposed else module.down_proj.shape[2]
    hidden = torch.randn(5, width, generator=random)
    index = torch.rand(5, 4, generator=random).topk(2).indices
    weights = torch.rand(5, 2, generator=random)
    with torch.no_grad():
        ours = expert_product(module, hidden, index, weights, True)
        dropped = expert_product(module, hidden, torch.where(index == 3, 9, index), weights, False)
        module.config._experts_implementation = "eager"
        eager = module(hidden, index, weights)
        kept = module(hidden, index.clamp(max=3), weights * (index != 3))
    assert torch.allclose(ours, eager, rtol=1e-4, atol=1e-5 * float(eager.abs().max()))
    assert torch.allclose(dropped, kept, rtol=1e-4, atol=1e-5 * float(eager.abs().max()))
    hidden.requires_grad_()
    assert expert_product(module, hidden, index, weights, True).requires_grad


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss", "nemotron_h", "qwen3_vl_moe"])
def test_accelerate_switches_and_restore_switches_back(kind):
    model = tiny_mixtures.build(kind)
    before, expected = chosen(model), output(model)
    assert not is_registered()
    assert hf_optim.accelerate(model) is model
    assert chosen(model) == {"hf_optim"}
    report = hf_optim.report(model)
    assert set(report.experts.values()) == {"hf_optim: grouped_mm (on a CPU)"}
    assert f"experts of {len(report.experts)} layers on hf_optim" in report.summary
    assert report.to_json()["experts"] == report.experts
    assert torch.allclose(output(model), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
    assert "hf_optim" not in model.config.to_json_string()
    hf_optim.restore(model)
    assert chosen(model) == before
    assert torch.equal(output(model), expected)
    assert not is_registered()


def test_copies_and_pickles_compute_after_the_original_is_gone():
    model = tiny_mixtures.build("mixtral")
    hf_optim.accelerate(model)
    expected = output(model)
    others = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    del model
    gc.collect()
    assert is_registered()
    for other in others:
        assert torch.equal(output(other), expected)
        hf_optim.restore(other)
    assert not is_registered()


def test_an_implementation_that_the_user_chose_is_kept():
    model = tiny_mixtures.build("mixtral")
    model.set_experts_implementation("batched_mm")
    hf_optim.accelerate(model)
    hf_optim.restore(model)
    assert chosen(model) == {"batched_mm"}
    model.config._experts_implementation = "sonicmoe"
    assert attach_experts(model) == []
    assert model.config._experts_implementation == "sonicmoe"


def test_a_capacity_comes_and_goes_on_an_accelerated_model():
    model = tiny_mixtures.build("mixtral")
    expected = output(model)
    hf_optim.accelerate(model)
    attach_routing(model, Routing(capacity=0.25))
    assert not torch.allclose(output(model), expected)
    hf_optim.restore(model)
    assert chosen(model) != {"hf_optim"}
    assert torch.equal(output(model), expected)


def test_auto_switches_the_experts_of_a_checkpoint(tmp_path):
    from transformers import AutoModelForCausalLM

    tiny_mixtures.build("qwen3_moe").save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, optim_config="auto")
    assert chosen(model) == {"hf_optim"}
    assert "hf_optim" not in (tmp_path / "config.json").read_text()
    model = AutoModelForCausalLM.from_pretrained(tmp_path, optim_config="auto", experts_implementation="eager")
    assert chosen(model) == {"eager"}
    stock = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert "hf_optim" not in chosen(stock)


@pytest.mark.parametrize("given", ["eager", None])
def test_a_recipe_keeps_an_implementation_that_the_caller_gave(given, tmp_path):
    from transformers import AutoModelForCausalLM

    tiny_mixtures.build("qwen3_moe").save_pretrained(tmp_path)
    named = {} if given is None else {"experts_implementation": given}
    model = AutoModelForCausalLM.from_pretrained(tmp_path, optim_config=["magnitude"], **named)
    assert chosen(model) == {given or "hf_optim"}


def test_gradients_of_an_accelerated_layer_are_those_of_the_eager_one():
    module = module_of("gpt_oss").double()
    random = torch.Generator().manual_seed(0)
    hidden = torch.randn(7, 32, generator=random, dtype=torch.float64, requires_grad=True)
    index = torch.rand(7, 4, generator=random).topk(2).indices
    weights = torch.rand(7, 2, generator=random, dtype=torch.float64, requires_grad=True)
    seed = torch.randn(7, 32, generator=random, dtype=torch.float64)
    given = (hidden, weights, *module.parameters())
    ours = torch.autograd.grad((expert_product(module, hidden, index, weights, True) * seed).sum(), given)
    module.config._experts_implementation = "eager"
    eager = torch.autograd.grad((module(hidden, index, weights) * seed).sum(), given)
    for one, other in zip(ours, eager, strict=True):
        assert torch.allclose(one, other, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_experts_per_tok": 5}, r"mlp\.experts choose 5 of only 4 experts"),
        ({"num_experts_per_tok": 0}, r"mlp\.experts choose 0 of 4 experts"),
        ({"rows": 2}, r"the router of .*mlp\.experts has 2 outputs for 4 experts"),
        ({"rows": 6}, r"the router of .*mlp\.experts has 6 outputs for 4 experts"),
    ],
)
def test_a_router_that_does_not_fit_its_experts_is_refused_by_accelerate_and_auto(tmp_path, change, message):
    model = tiny_mixtures.build("mixtral", num_local_experts=4)
    rows = change.get("rows")
    if rows is not None:
        gate = model.model.layers[0].mlp.gate
        gate.weight = torch.nn.Parameter(gate.weight.detach().repeat(2, 1)[:rows].clone())
    else:
        model.config.update(change)
        model.save_pretrained(tmp_path)
        with pytest.raises(hf_optim.ModelError, match=message):
            type(model).from_pretrained(tmp_path, optim_config="auto")
        model = type(model).from_pretrained(tmp_path)
    with pytest.raises(hf_optim.ModelError, match=message):
        hf_optim.accelerate(model)
    assert chosen(model) != {"hf_optim"}


@pytest.mark.parametrize("columns", [12, 16])
@pytest.mark.parametrize("out", [5, 16])
def test_the_grouped_product_of_matrices_of_any_size_is_that_of_each_expert(columns, out):
    torch.manual_seed(0)
    rows = torch.randn(7, columns).bfloat16().requires_grad_()
    weight = torch.randn(3, out, columns).bfloat16().requires_grad_()
    ends = torch.tensor([2, 2, 7], dtype=torch.int32)
    found = padded_product(rows, weight.transpose(1, 2), ends)
    expected = torch.cat([rows[:2] @ weight[0].T, rows[2:] @ weight[2].T])
    assert found.shape == (7, out)
    torch.testing.assert_close(found, expected)
    grads = torch.autograd.grad(found.float().square().sum(), (rows, weight))
    for own, wanted in zip(grads, torch.autograd.grad(expected.float().square().sum(), (rows, weight)), strict=True):
        torch.testing.assert_close(own, wanted, rtol=2e-2, atol=2e-1)


@pytest.mark.interpreted
@pytest.mark.parametrize(("kind", "on_kernels"), [*((kind, True) for kind in KINDS), (KINDS[0], False)])
def test_training_of_every_native_class_has_the_gradients_of_eager_experts(kind, on_kernels, monkeypatch):
    monkeypatch.setattr(kernels, "TRAINS", on_kernels)
    module = module_of(kind)
    random = torch.Generator().manual_seed(0)
    width = module.down_proj.shape[1] if not module.is_transposed else module.down_proj.shape[2]
    hidden = torch.randn(7, width, generator=random).requires_grad_()
    index = torch.rand(7, 4, generator=random).topk(2).indices
    weights = torch.rand(7, 2, generator=random).requires_grad_()
    seed = torch.randn(7, width, generator=random)
    given = (hidden, weights, *module.parameters())
    out = expert_product(module, hidden, index, weights, True)
    has_kernels = on_kernels and recognize(module) is not None and not getattr(module, "has_post_expert_norm", False)
    assert ("experts_training" in type(out.grad_fn).__name__) == has_kernels
    ours = torch.autograd.grad((out * seed).sum(), given)
    module.config._experts_implementation = "eager"
    eager = torch.autograd.grad((module(hidden, index, weights) * seed).sum(), given)
    for one, other in zip(ours, eager, strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-5 * float(other.abs().max()))


@pytest.mark.interpreted
def test_a_compiled_training_step_of_a_model_is_one_graph(monkeypatch):
    monkeypatch.setattr(kernels, "TRAINS", True)
    model = tiny_mixtures.build("mixtral", num_hidden_layers=1).train()
    inputs = dummy_inputs(model)
    inputs["labels"] = inputs["input_ids"]
    expected = {}
    model(**inputs, use_cache=False).loss.backward()
    for name, parameter in model.named_parameters():
        expected[name], parameter.grad = parameter.grad, None
    hf_optim.accelerate(model)
    torch.compile(model, fullgraph=True, backend="aot_eager")(**inputs, use_cache=False).loss.backward()
    for name, parameter in model.named_parameters():
        own, right = parameter.grad, expected[name]
        assert torch.allclose(own, right, rtol=1e-3, atol=1e-4 * float(right.abs().max())), name


def test_gradients_are_pytorchs_for_float32_matrices_on_a_gpu_and_where_kernels_do_not_train(monkeypatch):
    module = module_of("mixtral")
    matrix = lambda dtype, on_gpu: SimpleNamespace(dtype=dtype, is_cuda=on_gpu)  # noqa: E731
    assert kernels._trains(module, matrix(torch.bfloat16, True))
    assert not kernels._trains(module, matrix(torch.float32, True))
    assert kernels._trains(module, matrix(torch.float32, False))
    monkeypatch.setattr(kernels, "TRAINS", False)
    assert not kernels._trains(module, matrix(torch.bfloat16, True))
