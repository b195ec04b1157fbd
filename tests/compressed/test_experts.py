"""Fused experts: the inputs of each, their quantized state, and reloading it with stock transformers."""

from __future__ import annotations

import copy
import json
import logging
from typing import Any

import pytest
import torch
import transformers
from real_stories import perplexity, windows
from safetensors.torch import load_file, save_file
from tiny_models import DECODER, tiny_mixtral
from torch import nn
from transformers import AutoModelForCausalLM

from hf_optim import Scope, compressed, optimize
from hf_optim.checkpoints.dense import convert_to_dense
from hf_optim.compressed.experts import checkpoint_rows, store_expert
from hf_optim.compressed.state_dict import packed_state_dict
from hf_optim.errors import ModelError, NumericalError
from hf_optim.runs.run import run_of
from hf_optim.testing.models import _build
from hf_optim.toolkit import topology
from hf_optim.toolkit.distributed import collectives
from hf_optim.toolkit.quantization.grids import GridSpec, fit_group_size, make_grid
from hf_optim.toolkit.statistics.expert_tokens import TokenSample, augment_undersampled
from hf_optim.toolkit.statistics.second_moment import SecondMoment
from hf_optim.toolkit.topology.experts import down_proj_inputs, expert_linears, fused_experts, matrix_names

IDS = torch.randint(0, 64, (6, 24), generator=torch.Generator().manual_seed(0))
MOE: dict[str, Any] = {**DECODER, "moe_intermediate_size": 24, "num_experts_per_tok": 2}


def qwen2_moe(**changes: Any) -> nn.Module:
    """With a shared expert for all tokens, which consists of three linear layers."""
    config = {**MOE, "num_experts": 4, "shared_expert_intermediate_size": 40, **changes}
    return _build(transformers.Qwen2MoeForCausalLM, transformers.Qwen2MoeConfig(**config), 0)


def qwen3_moe(**changes: Any) -> nn.Module:
    """The first block is dense."""
    config = {**MOE, "num_experts": 5, "head_dim": 8, "mlp_only_layers": [0], **changes}
    return _build(transformers.Qwen3MoeForCausalLM, transformers.Qwen3MoeConfig(**config), 0)


def olmoe() -> nn.Module:
    config = transformers.OlmoeConfig(**DECODER, num_experts=4, num_experts_per_tok=2)
    return _build(transformers.OlmoeForCausalLM, config, 0)


def gpt_oss() -> nn.Module:
    """Transposed, interleaved, with biases."""
    layers = ["full_attention"] * 2
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    config = {**DECODER, "num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8, "rope_parameters": rope}
    return _build(transformers.GptOssForCausalLM, transformers.GptOssConfig(**config, layer_types=layers), 0)


def granite_moe() -> nn.Module:
    config = transformers.GraniteMoeConfig(**DECODER, num_local_experts=4, num_experts_per_tok=2)
    return _build(transformers.GraniteMoeForCausalLM, config, 0)


def whole(model: nn.Module) -> Scope:
    return Scope("", model, model)


def quantized(model: nn.Module, technique: str = "rtn", **fields: Any) -> nn.Module:
    return optimize(model, [{"technique": technique, **fields}], calibration=IDS)


def in_bfloat16(model: nn.Module) -> nn.Module:
    """Parameters only, as after ``from_pretrained``."""
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
    return model


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


class NeverTo(nn.Module):
    """A router that never sends a token to one expert."""

    def __init__(self, router: nn.Module, expert: int) -> None:
        super().__init__()
        self.router, self.expert = router, expert

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        found = list(self.router(*args, **kwargs))
        index = found[-1]
        others = (index + 1) % 4
        free = torch.where((others == index.flip(-1)) | (others == self.expert), (index + 2) % 4, others)
        free = torch.where((free == index.flip(-1)) | (free == self.expert), (index + 3) % 4, free)
        found[-1] = torch.where(index == self.expert, free, index)
        return tuple(found)


def seen_by(model: nn.Module, stack: nn.Module) -> list[torch.Tensor]:
    """Collect the tokens of each expert, one by one, from the arguments of the module."""
    calls = []
    handle = stack.register_forward_pre_hook(lambda module, args: calls.append(args[:2]))
    logits(model)
    handle.remove()
    rows: list[list[torch.Tensor]] = [[] for _ in range(len(stack.get_parameter("down_proj")))]
    for tokens, chosen in calls:
        for token, experts in zip(tokens, chosen, strict=True):
            for expert in experts.tolist():
                rows[expert].append(token)
    return [torch.stack(own) if own else torch.empty(0, tokens.shape[-1]) for own in rows]


# -- what an expert reads ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", [tiny_mixtral, qwen3_moe, gpt_oss])
def test_the_views_compute_what_the_fused_module_computes(build):
    stack = next(iter(fused_experts(build()).values()))
    views = expert_linears(stack)
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randn(7, 32, generator=generator)
    count = len(stack.get_parameter("down_proj"))
    chosen = torch.stack([torch.randperm(count, generator=generator)[:2] for _ in range(7)])
    weights = torch.rand(7, 2, generator=generator)
    expected = torch.zeros(7, 32)
    for token in range(7):
        for expert, weight in zip(chosen[token].tolist(), weights[token], strict=True):
            down = views[f"{expert}.down_proj"]
            expected[token] += weight * down(down.inputs_for(tokens[token][None]))[0]
    with torch.no_grad():
        found = stack(tokens, chosen, weights)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_second_moments_are_those_of_the_tokens_an_expert_sees(implementation):
    model = tiny_mixtral(intermediate_size=40)
    model.config._experts_implementation = implementation
    views = expert_linears(model)
    with SecondMoment(views, dtype=torch.float64) as moments:
        for ids in IDS.split(2):
            with torch.no_grad():
                model(ids)
    assert moments.keys() == views.keys()
    for name, stack in fused_experts(model).items():
        for expert, rows in enumerate(seen_by(model, stack)):
            gate, up = (rows @ stack.gate_up_proj[expert].T).detach().chunk(2, -1)
            for parameter, inputs in (("gate_up_proj", rows), ("down_proj", nn.functional.silu(gate) * up)):
                moment = moments[f"{name}.{expert}.{parameter}"]
                assert moment.count == len(rows)
                expected = inputs.double().T @ inputs.double()
                torch.testing.assert_close(moment.total, expected, rtol=1e-4, atol=1e-5)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_non_finite_token_names_the_expert():
    model = tiny_mixtral()
    model.model.layers[1].post_attention_layernorm.weight.data[0] = float("inf")
    with pytest.raises(NumericalError, match=r"model\.layers\.1\.mlp\.experts"), SecondMoment(expert_linears(model)):
        logits(model)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_the_sample_is_evenly_spread():
    model = tiny_mixtral()
    views = expert_linears(model)
    name, stack = next(iter(fused_experts(model).items()))
    everything = []
    stack.register_forward_pre_hook(lambda module, args: everything.append(args[0].detach().clone()))
    with TokenSample(views, size=9) as sample:
        for ids in IDS.split(1):
            with torch.no_grad():
                model(ids)
    tokens = torch.cat(everything)
    assert len(tokens) == 144
    assert torch.equal(sample[name], tokens[::8])
    with TokenSample(views) as sample:
        logits(model)
    assert 48 <= len(sample[name]) <= 96  # the widest matrix has 48 inputs


def test_experts_with_few_tokens_are_augmented_to_as_many_as_they_have_inputs():
    model = tiny_mixtral()
    block = model.model.layers[0].mlp
    block.gate = NeverTo(block.gate, 2)
    views = {name: view for name, view in expert_linears(model).items() if ".layers.0." in name}
    with TokenSample(views) as sample, SecondMoment(views, dtype=torch.float64) as moments, torch.no_grad():
        model(IDS[:, :11])
    before = copy.deepcopy(moments)
    rows = seen_by(model, block.experts)  # of other data
    assert not len(rows[2])
    scarce = augment_undersampled(views, moments, sample)
    tokens = sample["model.layers.0.mlp.experts"]
    counts = {name: before[name].count if name in before else 0 for name in views}
    assert scarce == {name: count for name, count in counts.items() if count < views[name].in_features}
    assert {"model.layers.0.mlp.experts.2.gate_up_proj", "model.layers.0.mlp.experts.2.down_proj"} <= scarce.keys()
    assert 0 < len(scarce) < len(views)
    for name, view in views.items():
        inputs = tokens if view.parameter == "gate_up_proj" else down_proj_inputs(view.experts, view.index, tokens)
        expected = before[name].total if name in before else torch.zeros(view.in_features, view.in_features).double()
        if name in scarce:
            share = (view.in_features - counts[name]) / len(tokens)
            expected = expected + share * inputs.double().T @ inputs.double()
            assert moments[name].count == view.in_features
        torch.testing.assert_close(moments[name].total, expected)


def test_the_sample_of_two_ranks_is_that_of_both(monkeypatch):
    """The other rank is simulated by what it adds to each sum."""
    model = tiny_mixtral()
    views = {name: view for name, view in expert_linears(model).items() if ".layers.0." in name}
    watcher = TokenSample(views, size=8)
    with watcher as sample, torch.no_grad():
        model(IDS[:1, :6])
    (name,) = sample
    mine, others = sample[name].clone(), torch.randn(14, 32)
    padded = torch.cat([others, torch.zeros(6, 32)])
    monkeypatch.setattr(collectives, "world_size", lambda: 2)
    monkeypatch.setattr(collectives, "rank", lambda: 1)
    monkeypatch.setattr(
        collectives, "all_reduce_", lambda t, how: t.add_(torch.tensor([14, 0]) if t.dim() == 1 else padded)
    )
    watcher.reduce()
    assert torch.equal(sample[name], torch.cat([others, mine])[::2])


# -- the quantized state, and stock transformers ----------------------------------------------------------------------


def one_by_one(model: nn.Module, spec_of: Any) -> nn.Module:
    """Store every storable layer on the grid that ``spec_of(name, in_features)`` returns."""
    for name, layer in compressed.storable(whole(model), ("Linear",), experts=True)[0].items():
        weight = layer.weight.detach()
        grid = make_grid(weight, spec_of(name, weight.shape[1]))
        compressed.store(layer, compressed.scheme_of(grid.spec), grid.quantize(weight), grid.scale)
    compressed.attach_quantizer(model)
    return model


def several_bits(name: str, width: int) -> GridSpec:
    if ".layers.0." in name:
        return GridSpec(3, "int", "group", fit_group_size(width, 20))
    return GridSpec(8) if "gate_up" in name else GridSpec(4, "int", "group", 8)


CASES: dict[str, Any] = {
    "mixtral w4 groups": lambda: quantized(tiny_mixtral(), bits=4, group_size=16),
    "mixtral w4 groups, bf16": lambda: quantized(in_bfloat16(tiny_mixtral()), bits=4, group_size=32),
    "mixtral w8": lambda: quantized(tiny_mixtral(), bits=8),
    "mixtral w3 tensor": lambda: quantized(tiny_mixtral(), bits=3, strategy="tensor"),
    "mixtral w8a8 static": lambda: quantized(tiny_mixtral(), bits=8, activations="int8", dynamic=False),
    "mixtral gptq": lambda: quantized(tiny_mixtral(), "gptq", bits=4, group_size=16),
    "mixtral, several bits": lambda: one_by_one(tiny_mixtral(intermediate_size=40), several_bits),
    "mixtral, experts only": lambda: quantized(tiny_mixtral(), bits=4, targets=["*.experts.*"]),
    "qwen2, the shared expert in int8": lambda: quantized(qwen2_moe(), bits=8, activations="int8"),
    "qwen3 gptq": lambda: quantized(qwen3_moe(), "gptq", bits=3, group_size=8, true_sequential=True),
    "olmoe": lambda: quantized(olmoe(), bits=4, group_size=16),
}


@pytest.fixture(scope="module")
def round_trip(tmp_path_factory, stock):
    """name -> (directory, logits in memory, logits of stock transformers)."""
    root = tmp_path_factory.mktemp("checkpoints")
    found = {}
    for name, make in CASES.items():
        model = make()
        model.save_pretrained(root / name)
        theirs = stock.logits(root / name, "AutoModelForCausalLM", {"input_ids": IDS})
        found[name] = (root / name, model, logits(model), theirs)
    return found


@pytest.mark.many
@pytest.mark.parametrize("name", CASES)
def test_stock_reloads_with_identical_logits(round_trip, name):
    _, model, mine, (cls, stock) = round_trip[name]
    assert cls == type(model).__name__
    assert torch.equal(mine, stock)


@pytest.mark.parametrize("name", CASES)
def test_stock_has_the_same_weights(round_trip, name):
    directory, model, _, _ = round_trip[name]
    stock = AutoModelForCausalLM.from_pretrained(directory)
    for path, stack in fused_experts(stock).items():
        for parameter in matrix_names(stack):
            mine = model.get_parameter(f"{path}.{parameter}")
            assert torch.equal(mine.to(stack.get_parameter(parameter).dtype), stack.get_parameter(parameter))


def test_experts_are_packed_one_by_one_and_routers_are_not(round_trip):
    tensors = load_file(round_trip["mixtral w4 groups"][0] / "model.safetensors")
    key = "model.layers.1.block_sparse_moe.experts.3"
    assert tensors[f"{key}.w1.weight_packed"].shape == tensors[f"{key}.w3.weight_packed"].shape == (48, 32 * 4 // 32)
    assert tensors[f"{key}.w2.weight_scale"].shape == (32, 3)
    assert tensors["model.layers.1.block_sparse_moe.gate.weight"].dtype == torch.float32
    assert not any("gate_up_proj" in name for name in tensors)
    config = json.loads((round_trip["mixtral w4 groups"][0] / "config.json").read_text())["quantization_config"]
    assert [group["targets"] for group in config["config_groups"].values()] == [["Linear"]]
    # Readers that build routers as linear layers find them here, under the names of the model and of the checkpoint.
    gates = [rf"re:(?:.*\.)?layers\.{i}\.{mixture}\.gate$" for i in range(2) for mixture in ("block_sparse_moe", "mlp")]
    assert sorted(config["ignore"]) == sorted(["lm_head", *gates])


def test_one_scheme_for_all_experts_and_it_comes_first(round_trip):
    directory = round_trip["mixtral, several bits"][0]
    groups = json.loads((directory / "config.json").read_text())["quantization_config"]["config_groups"]
    assert all("experts" in target for target in groups["group_0"]["targets"])
    weights = groups["group_0"]["weights"]
    assert (weights["num_bits"], weights["group_size"]) == (8, 4)  # 8 bits; groups of 16, 20, 8 and 32
    tensors = load_file(directory / "model.safetensors")
    assert tensors["model.layers.0.block_sparse_moe.experts.0.w1.weight_scale"].shape == (40, 8)


def test_experts_differ_and_so_do_their_codes(round_trip):
    model = round_trip["mixtral w4 groups"][1]
    weights = model.model.layers[0].mlp.experts.gate_up_proj
    reference = tiny_mixtral().model.layers[0].mlp.experts.gate_up_proj
    for expert in range(4):
        grid = make_grid(reference[expert].detach(), GridSpec(4, "int", "group", 16))
        assert torch.equal(weights[expert], grid.nearest(reference[expert].detach()))


def test_coverage_counts_experts(round_trip):
    model = round_trip["mixtral gptq"][1]
    (found,) = run_of(model).record.coverage.values()
    reference = tiny_mixtral()
    blocks = [p.numel() for n, p in reference.named_parameters() if "proj" in n]
    assert found["weights_touched"] == sum(blocks)
    assert found["weights_total"] == sum(p.numel() for p in reference.parameters())
    assert found["skipped"] == {
        "output head": ["lm_head"],
        "router": ["model.layers.0.mlp.gate", "model.layers.1.mlp.gate"],
    }
    one = topology.coverage(reference, ["model.layers.0.mlp.experts.1.down_proj"])
    assert one.covered == 32 * 48


def test_rows_of_fused_parameters_in_a_checkpoint():
    model = tiny_mixtral()
    stack = model.model.layers[0].mlp.experts
    found = checkpoint_rows(model, "model.layers.0.mlp.experts.gate_up_proj", stack)
    assert found["model.layers.0.mlp.experts.2.w1.weight"] == (2, 0, 48)
    assert found["model.layers.0.mlp.experts.2.w3.weight"] == (2, 48, 96)
    assert len(found) == 8


# -- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", [gpt_oss, granite_moe])
@pytest.mark.parametrize("technique", ["rtn", "gptq"])
def test_experts_that_stock_cannot_read_are_rejected_before_any_work(build, technique):
    model = build()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ModelError, match=r"experts\).*could not read their codes.*no conversion.*Use fp8"):
        quantized(model, technique, bits=4)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("technique", ["rtn", "gptq"])
def test_zero_points_are_rejected(technique):
    with pytest.raises(ModelError, match=r"without zero points only\. Use symmetric: true"):
        quantized(tiny_mixtral(), technique, bits=4, symmetric=False)


@pytest.mark.parametrize(
    "fields", [{"skip": ["*.experts.*"]}, {"skip": ["*.1.mlp.experts.2.down_proj"]}, {"targets": ["*.q_proj"]}]
)
def test_experts_are_quantized_all_or_none(fields):
    with pytest.raises(ModelError, match=r"leave out .*only if all its experts are packed"):
        quantized(tiny_mixtral(), bits=4, **fields)


def test_a_technique_without_experts_is_rejected():
    with pytest.raises(ModelError, match=r"step 1 cannot store integer weights .*which this technique leaves"):
        compressed.storable(whole(tiny_mixtral()), ("Linear",), label="step 1")


def test_store_rejects_schemes_that_stock_does_not_read():
    view = expert_linears(tiny_mixtral())["model.layers.0.mlp.experts.0.down_proj"]
    grid = make_grid(view.weight, GridSpec(4, "int", "group", 16, False))
    with pytest.raises(ModelError, match=r"experts\.0\.down_proj: .*symmetric"):
        store_expert(view, compressed.scheme_of(grid.spec), grid.quantize(view.weight), grid.scale, grid.zero_point)
    with pytest.raises(ModelError, match="without quantized inputs"):
        store_expert(view, compressed.scheme_of(GridSpec(8), "int8"), None, None, None)


# -- calibration ------------------------------------------------------------------------------------------------------


def moments_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the second moment of the inputs in the dense model, per matrix of the first block's experts."""
    views = {name: view for name, view in expert_linears(model).items() if ".layers.0." in name}
    with SecondMoment(views, dtype=torch.float64) as moments:
        logits(model)
    return {name: moment.total for name, moment in moments.items()}


def test_gptq_beats_rounding_on_what_each_expert_reads():
    reference = tiny_mixtral()
    moments = moments_of(reference)
    errors = {}
    for technique in ("rtn", "gptq"):
        model = quantized(tiny_mixtral(), technique, bits=3, group_size=16)
        before, after = expert_linears(reference), expert_linears(model)
        errors[technique] = {
            name: float((((d := (after[name].weight - before[name].weight).double()) @ total) * d).sum())
            for name, total in moments.items()
        }
    better = [errors["gptq"][name] < errors["rtn"][name] for name in moments]
    assert len(better) == 8
    assert sum(better) >= 7
    assert sum(errors["gptq"].values()) < 0.7 * sum(errors["rtn"].values())


def test_an_expert_that_never_fires_is_named_and_calibrated(caplog):
    model = tiny_mixtral()
    block = model.model.layers[0].mlp
    block.gate = NeverTo(block.gate, 2)
    dense = {name: view.weight.clone() for name, view in expert_linears(model).items()}
    with caplog.at_level(logging.WARNING):
        model = quantized(model, "gptq", bits=3, group_size=16)
    few = run_of(model).record.steps["0"]["experts_with_few_tokens"]
    assert few["model.layers.0.mlp.experts.2.gate_up_proj"] == 0
    assert few["model.layers.0.mlp.experts.2.down_proj"] == 0
    assert "model.layers.0.mlp.experts.2.gate_up_proj (0)" in caplog.text
    # On the tokens of its layer, it is better than rounding.
    views = expert_linears(model)
    with TokenSample(views) as sample:
        logits(model)
    tokens = sample["model.layers.0.mlp.experts"]
    name = "model.layers.0.mlp.experts.2.gate_up_proj"
    rounded = make_grid(dense[name], GridSpec(3, "int", "group", 16)).nearest(dense[name])
    error = {key: ((w - dense[name]) @ tokens.T).norm() for key, w in (("gptq", views[name].weight), ("rtn", rounded))}
    assert error["gptq"] < 0.9 * error["rtn"]


# -- the state in memory ----------------------------------------------------------------------------------------------


def test_dense_leaves_no_trace():
    reference, model = tiny_mixtral(), quantized(tiny_mixtral(), bits=4, group_size=16)
    expected = logits(model)
    assert len(compressed.quantized_modules(model)) == 10
    assert convert_to_dense(model) == []
    assert torch.equal(logits(model), expected)
    assert model.state_dict().keys() == reference.state_dict().keys()
    attributes = {name: set(vars(module)) for name, module in reference.named_modules() if name}
    assert {name: set(vars(module)) for name, module in model.named_modules() if name} == attributes
    assert all(p.requires_grad for p in model.parameters())


def test_block_state_survives_a_file(tmp_path):
    model, other = quantized(tiny_mixtral(), bits=4, group_size=16), tiny_mixtral(seed=1)
    other.load_state_dict(tiny_mixtral().state_dict())
    for block, blank in zip(model.model.layers, other.model.layers, strict=True):
        tensors, meta = compressed.dump_module_state(block)
        save_file(tensors, tmp_path / "block.safetensors")
        compressed.load_module_state(blank, load_file(tmp_path / "block.safetensors"), json.loads(json.dumps(meta)))
    assert torch.equal(logits(other), logits(model))
    compressed.attach_quantizer(other)
    mine, theirs = packed_state_dict(model)[0], packed_state_dict(other)[0]
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[key], theirs[key]) for key in mine)
    compressed.load_module_state(other.model.layers[0], *compressed.dump_module_state(tiny_mixtral().model.layers[0]))
    assert not any(".layers.0." in name for name in compressed.quantized_modules(other))


def test_a_part_is_packed_like_the_whole_model():
    model = quantized(tiny_mixtral(), bits=4, group_size=16)
    everything = packed_state_dict(model)[0]
    name = "model.layers.1"
    part, loose = packed_state_dict(model.get_submodule(name), model, name)
    assert loose == []
    assert {f"{name}.{key}" for key in part} == {key for key in everything if key.startswith(name)}
    assert all(torch.equal(everything[f"{name}.{key}"], value) for key, value in part.items())


def test_when_an_expert_changed_the_checkpoint_is_an_ordinary_one(tmp_path, caplog):
    model = quantized(tiny_mixtral(), bits=4, group_size=16)
    model.model.layers[1].mlp.experts.down_proj.data[3] += 1e-3
    with caplog.at_level(logging.WARNING, "hf_optim.compressed.state_dict"):
        model.save_pretrained(tmp_path)
    assert "10 of 10" in caplog.text
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(logits(reloaded), logits(model))


@pytest.mark.parametrize("how", ["auto", "dense"])
def test_a_reloaded_model_can_be_saved(round_trip, tmp_path, how):
    """Experts that transformers has decoded are saved as an ordinary checkpoint, packed ones as they were."""
    directory, _, mine, _ = round_trip["mixtral w4 groups"]
    if how == "auto":
        model = AutoModelForCausalLM.from_pretrained(directory, optim_config="auto")
    else:
        model = AutoModelForCausalLM.from_pretrained(directory)
        logits(model)
        convert_to_dense(model)
    model.save_pretrained(tmp_path)
    assert ("quantization_config" in json.loads((tmp_path / "config.json").read_text())) == (how == "auto")
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(logits(reloaded), mine)


def test_a_copy_saves_the_same():
    model = quantized(tiny_mixtral(), bits=4, group_size=16)
    first, second = packed_state_dict(model)[0], packed_state_dict(copy.deepcopy(model))[0]
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


# -- a real model -----------------------------------------------------------------------------------------------------


@pytest.mark.real_model
def test_an_upcycled_model_is_as_good_as_the_dense_one(shared_models, shared_data):
    """Compare babyllama-1m at 3 bits with the mixture of copies of its feed-forward layers at 3 bits."""
    home = shared_models / "babyllama-1m"
    held_out = windows(home, shared_data, "eval", 12)
    calibration = windows(home, shared_data, "calibration", 16)
    dense = AutoModelForCausalLM.from_pretrained(home, dtype=torch.float32).eval()
    upcycle = {"technique": "upcycle", "experts": 4, "top_k": 2}
    loss = {}
    for technique in ("rtn", "gptq"):
        step = {"technique": technique, "bits": 3, "group_size": 32}
        loss[technique] = perplexity(optimize(copy.deepcopy(dense), [step], calibration=calibration), held_out)
        mixture = optimize(copy.deepcopy(dense), [upcycle, step], calibration=calibration)
        assert fused_experts(mixture)
        loss[f"{technique}, mixture"] = perplexity(mixture, held_out)
    # Copies round to the same weights.
    assert loss["rtn, mixture"] == pytest.approx(loss["rtn"], rel=1e-4)
    assert loss["gptq, mixture"] < 1.01 * loss["gptq"] < loss["rtn, mixture"]
