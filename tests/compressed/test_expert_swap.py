"""Experts that a recipe quantized: packed, restored, saved, reported, and composed with what routes to them."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
import transformers
from naive_kernel import NAIVE
from safetensors.torch import load_file
from tiny_models import DECODER, tiny_mixtral
from transformers import AutoModelForCausalLM

import hf_optim
from hf_optim.compressed.packed.packed_experts import PackedExperts
from hf_optim.compressed.packed.packed_linear import KernelWarning
from hf_optim.errors import ModelError
from hf_optim.testing.models import _build
from hf_optim.toolkit.topology import expert_linears

pytestmark = pytest.mark.filterwarnings("ignore::hf_optim.KernelWarning")

IDS = torch.randint(0, 64, (3, 12), generator=torch.Generator().manual_seed(0))
RTN = {"technique": "rtn", "bits": 4, "group_size": 16}
MOE = {**DECODER, "moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2}


def mixtral(**changes):
    return tiny_mixtral(**{"intermediate_size": 64, **changes})


def qwen2_moe():
    config = transformers.Qwen2MoeConfig(**MOE, shared_expert_intermediate_size=32)
    return _build(transformers.Qwen2MoeForCausalLM, config, 0)


def qwen3_moe():
    """The first block is dense."""
    return _build(
        transformers.Qwen3MoeForCausalLM, transformers.Qwen3MoeConfig(**MOE, head_dim=8, mlp_only_layers=[0]), 0
    )


def olmoe():
    config = transformers.OlmoeConfig(**{**DECODER, "intermediate_size": 64}, num_experts=4, num_experts_per_tok=2)
    return _build(transformers.OlmoeForCausalLM, config, 0)


def deepseek_v3():
    """Sigmoid gates with a correction, groups, a shared expert."""
    sizes = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1}
    sizes |= {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16}
    config = transformers.DeepseekV3Config(
        **{**DECODER, "moe_intermediate_size": 32, "num_key_value_heads": 4, **sizes}
    )
    return _build(transformers.DeepseekV3ForCausalLM, config, 0)


BUILDS = [mixtral, qwen2_moe, qwen3_moe, olmoe, deepseek_v3]


def experts_of(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, PackedExperts)}


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def quantized(build=mixtral, **fields):
    model = build()
    return hf_optim.optimize(model, [{**RTN, **fields}], calibration=IDS)


@pytest.mark.many(every=4)
@pytest.mark.parametrize("build", BUILDS)
def test_a_packed_model_computes_what_the_recipe_made(build):
    model = quantized(build)
    before, names = logits(model), {name for name, _ in model.named_parameters()}
    hf_optim.accelerate(model)
    packed = experts_of(model)
    assert packed
    assert not any(name.startswith(tuple(packed)) for name, _ in model.named_parameters())
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-5)
    hf_optim.restore(model)
    assert not experts_of(model)
    assert {name for name, _ in model.named_parameters()} == names
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("fields", [{"bits": 3}, {"bits": 8, "group_size": None}, {"technique": "gptq"}], ids=str)
def test_other_codes_are_packed_too(fields):
    model = quantized(**fields)
    before = logits(model)
    hf_optim.accelerate(model)
    assert len(experts_of(model)) == 2
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-5)


def test_from_pretrained_with_a_recipe_ends_packed(tmp_path):
    mixtral().save_pretrained(tmp_path / "dense")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", optim_config=[RTN])
    assert len(experts_of(model)) == 2
    model.save_pretrained(tmp_path / "packed")
    plain = quantized()
    plain.save_pretrained(tmp_path / "plain")
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("packed", "plain"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    torch.testing.assert_close(logits(stock), logits(model), rtol=1e-4, atol=1e-5)


LABEL = "dense float32 experts (PyTorch's packed operators round to bfloat16), 4-bit, groups of 16"


def test_the_report_has_experts_and_says_what_accelerate_would_do():
    model = quantized()
    rows = [row for row in hf_optim.report(model) if row.experts]
    assert len(rows) == 4
    assert all(row.reason.endswith(f"it would run these experts on {LABEL}") for row in rows)
    hf_optim.accelerate(model)
    rows = [row for row in hf_optim.report(model) if row.experts]
    assert {row.kernel for row in rows} == {LABEL}
    assert {(row.experts, row.shape) for row in rows} == {(4, (128, 32)), (4, (32, 64))}
    (entry,) = [one for one in hf_optim.report(model).to_json()["layers"] if one["name"] == rows[0].name]
    assert entry["experts"] == 4
    assert not any(row.experts for row in hf_optim.report(mixtral()))  # dense experts are as they were


def test_a_weight_that_left_its_grid_stays_dense():
    model = quantized()
    view = expert_linears(model)["model.layers.1.mlp.experts.2.down_proj"]
    view.weight[0, 0] += 0.01
    with pytest.warns(KernelWarning, match=r"layers\.1\.mlp\.experts .*not on the grid"):
        hf_optim.accelerate(model)
    assert list(experts_of(model)) == ["model.layers.0.mlp.experts"]


def test_without_a_kernel_for_experts_they_stay_dense():
    model = quantized()
    with pytest.warns(KernelWarning, match="no kernel handles this kind of weight"):
        hf_optim.accelerate(model, kernels=[NAIVE])
    assert not experts_of(model)


def test_an_expert_without_a_single_token_is_not_read():
    model = hf_optim.accelerate(quantized())
    experts = model.model.layers[0].mlp.experts
    hidden = torch.randn(5, 32, generator=torch.Generator().manual_seed(1))
    index, weights = torch.tensor([[1, 3]]).expand(5, 2), torch.full((5, 2), 0.5)
    experts.get_submodule("packed_experts").up_scale[[0, 2]] = float("nan")
    with torch.no_grad():
        assert experts(hidden, index, weights).isfinite().all()


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
def test_copies_are_packed(copied):
    model = hf_optim.accelerate(quantized())
    other = copied(model)
    assert experts_of(other).keys() == experts_of(model).keys()
    assert torch.equal(logits(other), logits(model))
    hf_optim.restore(other)
    assert experts_of(model)


def test_another_dtype_packs_the_experts_again():
    block = hf_optim.accelerate(quantized(bits=4, group_size=32)).model.layers[0].mlp
    hidden = torch.randn(1, 6, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        before = block(hidden)
        block.to(torch.bfloat16)
        after = block(hidden.bfloat16())
    assert block.experts.packing.description.up.dtype == torch.bfloat16
    assert float((after.float() - before).norm() / before.norm()) < 2e-2


def test_a_capacity_limits_packed_experts():
    routing = {"technique": "capacity_routing", "capacity": 0.5, "measure": False}
    model = hf_optim.optimize(mixtral(), [RTN, routing], calibration=IDS)
    before = logits(model)
    dropped = {name: load.dropped for name, load in hf_optim.expert_load(model, reset=True).items()}
    hf_optim.accelerate(model)
    assert len(experts_of(model)) == 2
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-5)
    assert {name: load.dropped for name, load in hf_optim.expert_load(model).items()} == dropped
    assert sum(map(sum, dropped.values()))
    # The capacity first, the kernel after it, is the same.
    other = hf_optim.optimize(hf_optim.accelerate(quantized()), [routing], calibration=IDS)
    torch.testing.assert_close(logits(other), before, rtol=1e-4, atol=1e-5)


def test_generate_runs_packed_experts():
    model = quantized()
    settings = {"max_new_tokens": 8, "do_sample": False}
    expected = model.generate(IDS, **settings)
    hf_optim.accelerate(model)
    assert torch.equal(model.generate(IDS, **settings), expected)
    assert torch.equal(model.generate(IDS, custom_generate=hf_optim.generate, **settings), expected)


def test_a_mixture_compiles_without_a_break():
    block = hf_optim.accelerate(quantized()).model.layers[0].mlp
    hidden = torch.randn(1, 6, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(block, fullgraph=True, backend="eager")(hidden), block(hidden))


def test_adapters_before_packed_experts_get_their_gradient():
    model = quantized()
    packed = hf_optim.accelerate(copy.deepcopy(model))
    found = []
    for each in (model, packed):
        inputs = each.get_input_embeddings()(IDS).detach().requires_grad_()
        each(inputs_embeds=inputs).logits.square().sum().backward()
        found.append(inputs.grad)
    torch.testing.assert_close(found[1], found[0], rtol=1e-3, atol=1e-4)


def test_a_kernel_that_raises_is_replaced_by_decoding():
    model = hf_optim.accelerate(quantized())
    before = logits(model)
    experts = model.model.layers[0].mlp.experts

    def broken(*args, **kwargs):
        raise RuntimeError("no such luck")

    experts.get_submodule("packed_experts").forward = broken
    with pytest.warns(
        KernelWarning, match=r"layers\.0\.mlp\.experts falls back .*: wna16 raised RuntimeError: no such luck"
    ):
        torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-5)  # without another word
    assert "no such luck" in str(hf_optim.report(model))


def test_the_stacked_weight_can_be_read_but_not_written():
    model = quantized()
    dense = model.model.layers[0].mlp.experts.down_proj.detach().clone()
    experts = hf_optim.accelerate(model).model.layers[0].mlp.experts
    assert torch.equal(experts.down_proj.clone(), dense)
    with pytest.raises(ModelError, match="compressed weight"):
        experts.down_proj.data = dense
    with pytest.raises(AttributeError, match="up_proj"):
        _ = experts.up_proj


# Linear layers that are too small for kernels stay with compressed-tensors, which torch before 2.13 does not trace.
@pytest.mark.filterwarnings("ignore:the step is captured without torch.compile:hf_optim.GenerationWarning")
@pytest.mark.gpu
@pytest.mark.parametrize("fields", [{"group_size": 32}, {"bits": 8, "group_size": None}], ids=str)
def test_experts_of_a_model_on_a_gpu_run_on_triton(fields):
    model = quantized(lambda: mixtral().to(torch.bfloat16), **fields).to("cuda")
    ids = IDS.to("cuda")
    with torch.no_grad():
        before = model(ids).logits
        hf_optim.accelerate(model)
        after = model(ids).logits
    kernels = {row.kernel for row in hf_optim.report(model) if row.experts}
    assert all(kernel.startswith("packed experts (Triton), ") for kernel in kernels)
    assert float((after - before).float().norm() / before.float().norm()) < 5e-2
    settings = {"max_new_tokens": 8, "do_sample": False}
    expected = model.generate(ids, **settings)
    assert torch.equal(model.generate(ids, custom_generate=hf_optim.generate, **settings), expected)
