"""Checkpoints of compressed-tensors: stock transformers reloads every format with identical logits."""

from __future__ import annotations

import copy
import json
import logging
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import tiny_bert, tiny_gpt2, tiny_llama, tiny_mixtral, tiny_qwen2
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

import hf_optim
from hf_optim import Scope, compressed
from hf_optim.checkpoints.dense import convert_to_dense
from hf_optim.compressed.quantization_config import target_patterns
from hf_optim.compressed.state_dict import packed_state_dict
from hf_optim.errors import CheckpointError, ModelError
from hf_optim.toolkit.quantization.grids import GridSpec, fit_group_size, make_grid

STOCK = """
import torch, transformers
from safetensors.torch import save_file
from transformers.utils import logging
logging.disable_progress_bar()
ids = torch.arange(18).view(2, 9) % 64
for d in directories:
    config = transformers.AutoConfig.from_pretrained(d)
    model = getattr(transformers, config.architectures[0]).from_pretrained(d).eval()
    with torch.no_grad():
        save_file({"logits": model(ids).logits}, d + "/logits.safetensors")
"""
IDS = torch.arange(18).view(2, 9) % 64

# name -> dtype, weights' grid (None: as they are), activations, static, symmetric activations, format
CASES: dict[str, tuple[torch.dtype, GridSpec | None, Any, bool, bool, str]] = {
    "w4-group": (torch.float32, GridSpec(4, "int", "group", 16), None, False, True, "pack-quantized"),
    "w4-group-bf16": (torch.bfloat16, GridSpec(4, "int", "group", 16), None, False, True, "pack-quantized"),
    "w3-group-fp16": (torch.float16, GridSpec(3, "int", "group", 16), None, False, True, "pack-quantized"),
    "w8": (torch.float32, GridSpec(8), None, False, True, "pack-quantized"),
    "w2-tensor": (torch.float32, GridSpec(2, "int", "tensor"), None, False, True, "pack-quantized"),
    "w4-asymmetric": (torch.float32, GridSpec(4, "int", "group", 16, False), None, False, True, "naive-quantized"),
    "w8-asymmetric-bf16": (torch.bfloat16, GridSpec(8, symmetric=False), None, False, True, "naive-quantized"),
    "w8a8": (torch.float32, GridSpec(8), "int8", False, True, "int-quantized"),
    "w8a8-static": (torch.float32, GridSpec(8), "int8", True, True, "int-quantized"),
    "w8a8-static-asymmetric": (torch.float32, GridSpec(8), "int8", True, False, "int-quantized"),
    "fp8": (torch.float32, GridSpec(8, "float"), "fp8", False, True, "float-quantized"),
    "fp8-static-bf16": (torch.bfloat16, GridSpec(8, "float", "tensor"), "fp8", True, True, "float-quantized"),
    "fp8-weights": (torch.float32, GridSpec(8, "float"), None, False, True, "naive-quantized"),
    "a8-static": (torch.float32, None, "int8", True, True, "dense"),
}


def inner(model: nn.Module) -> dict[str, nn.Linear]:
    head = model.get_output_embeddings()
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head and "classif" not in n}


def quantize(model: nn.Module, spec, activations=None, static=False, symmetric=True, only=lambda name: True) -> None:
    for name, module in inner(model).items():
        if not only(name):
            continue
        scheme = compressed.scheme_of(spec, activations, static, symmetric)
        inputs = {}
        if static:
            inputs["input_scale"] = torch.tensor([0.03]).to(module.weight.dtype).float()
            if not symmetric:
                inputs["input_zero_point"] = torch.tensor([5], dtype=torch.int8)
        if spec is None:
            compressed.store(module, scheme, **inputs)
            continue
        weight = module.weight.detach()
        grid = make_grid(weight, spec)
        compressed.store(module, scheme, grid.quantize(weight), grid.scale, grid.zero_point, **inputs)


def w4(model: nn.Module) -> nn.Module:
    quantize(model, GridSpec(4, "int", "group", 16))
    compressed.attach_quantizer(model)
    return model


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def stock_logits(stock_python, *directories) -> list[torch.Tensor]:
    """Reload in a process that cannot import hf_optim."""
    done = stock_python.copy(f"directories = {[str(d) for d in directories]}\n{STOCK}")
    assert done.status == 0, done.err[-3000:]
    assert "were not used" not in done.err + done.out
    return [load_file(d / "logits.safetensors")["logits"] for d in directories]


def extra_models() -> dict[str, nn.Module]:
    """Models quantized in ways that need other patterns than ``Linear`` and an ignore list."""
    two = tiny_llama(intermediate_size=40)
    for name, module in inner(two).items():
        size = fit_group_size(module.in_features, 16)  # 16 for width 32, 10 for width 40
        quantize(two, GridSpec(4, "int", "group", size), only=lambda n, name=name: n == name)
    partly = tiny_llama()
    quantize(partly, GridSpec(8), "int8", only=lambda n: "k_proj" not in n and n != "model.layers.1.mlp.up_proj")
    mixed = tiny_llama()
    quantize(mixed, GridSpec(8), "int8", only=lambda n: ".layers.0." in n)
    quantize(mixed, GridSpec(4, "int", "group", 16), only=lambda n: ".layers.1." in n)
    return {
        "mixed group sizes": two,
        "partly": partly,
        "mixed formats": mixed,
        "tied": tiny_qwen2(),
        "bert": tiny_bert(),
    }


@pytest.fixture(scope="module")
def round_trip(tmp_path_factory, stock_python):
    """name -> (config.json, stored tensors, logits in memory, logits of stock transformers)."""
    root = tmp_path_factory.mktemp("checkpoints")
    tiny_llama().save_pretrained(root / "base")
    models: dict[str, nn.Module] = {}
    for name, (dtype, spec, activations, static, symmetric, _) in CASES.items():
        model = AutoModelForCausalLM.from_pretrained(root / "base", dtype=dtype).eval()
        quantize(model, spec, activations, static, symmetric)
        models[name] = model
    for name, model in extra_models().items():
        if not compressed.quantized_modules(model):
            quantize(model, GridSpec(8), "int8")
        models[name] = model
    found = {}
    for name, model in models.items():
        compressed.attach_quantizer(model)
        before = copy.deepcopy(model.state_dict())
        model.save_pretrained(root / name)
        after = model.state_dict()
        assert before.keys() == after.keys()
        assert all(torch.equal(before[key].float(), after[key].float()) for key in before)
        config = json.loads((root / name / "config.json").read_text())
        found[name] = [config, load_file(root / name / "model.safetensors"), logits(model)]
    for name, stock in zip(models, stock_logits(stock_python, *[root / name for name in models]), strict=True):
        found[name].append(stock)
    return found


@pytest.mark.many
@pytest.mark.parametrize("name", CASES)
def test_stock_reloads_with_identical_logits(round_trip, name):
    config, _, mine, stock = round_trip[name]
    assert mine.dtype == stock.dtype == CASES[name][0]
    assert torch.equal(mine, stock)
    quantization = config["quantization_config"]
    assert quantization["format"] == CASES[name][-1]
    assert quantization["config_groups"]["group_0"]["targets"] == ["Linear"]
    assert quantization["ignore"] == ["lm_head"]


@pytest.mark.parametrize("name", ["mixed group sizes", "partly", "mixed formats", "tied", "bert"])
def test_stock_reloads_where_modules_differ(round_trip, name):
    _, _, mine, stock = round_trip[name]
    assert torch.equal(mine, stock)


def test_codes_are_packed(round_trip):
    tensors = round_trip["w4-group"][1]
    key = "model.layers.0.mlp.down_proj."
    assert tensors[key + "weight_packed"].shape == (32, 48 * 4 // 32)
    assert tensors[key + "weight_packed"].dtype == torch.int32
    assert tensors[key + "weight_scale"].shape == (32, 3)
    assert key + "weight" not in tensors
    assert round_trip["w8a8"][1][key + "weight"].dtype == torch.int8
    assert round_trip["fp8"][1][key + "weight"].dtype == torch.float8_e4m3fn
    assert round_trip["w8a8-static"][1][key + "input_scale"].shape == (1,)


def test_groups_of_mixed_sizes_have_patterns_without_layer_numbers(round_trip):
    groups = round_trip["mixed group sizes"][0]["quantization_config"]["config_groups"]
    targets = {g["weights"]["group_size"]: g["targets"] for g in groups.values()}
    assert targets[10] == [r"re:(?:.*\.)?layers\.\d+\.mlp\.down_proj$"]
    assert len(targets[16]) == 6


def test_patterns_fall_back_to_names():
    model = tiny_llama()
    groups = [["model.layers.0.mlp.up_proj"], ["model.layers.1.mlp.up_proj"]]
    expected = [[rf"re:(?:.*\.)?layers\.{i}\.mlp\.up_proj$"] for i in range(2)]
    assert target_patterns(model, groups) == (expected, [])


def test_the_base_model_of_a_partly_quantized_checkpoint_has_its_weights(tmp_path):
    """The patterns exclude an unquantized layer in the base model too, whose names have no prefix."""
    model = hf_optim.optimize(tiny_llama(), [{"technique": "rtn", "skip": ["*.1.mlp.up_proj"]}])
    model.save_pretrained(tmp_path)
    base, info = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    ids = torch.arange(8)[None]
    with torch.no_grad():
        assert torch.equal(base(ids).last_hidden_state, model.model(ids).last_hidden_state)


def test_store_matches_stock_transformers_and_its_forward():
    model = w4(tiny_llama())
    module = model.model.layers[0].mlp.up_proj
    assert module.quantization_status == "decompressed"
    assert module.weight_scale.shape == (48, 2)
    assert not module.weight.requires_grad
    steps = module.weight.view(48, 2, 16) / module.weight_scale[..., None]
    torch.testing.assert_close(steps, steps.round(), atol=1e-4, rtol=0)
    assert set(compressed.quantized_modules(model)) == set(inner(model))


def test_activations_are_quantized_per_token():
    layer = nn.Linear(8, 3)
    compressed.store(layer, compressed.scheme_of(None, "int8"))
    x = torch.randn(1, 4, 8, generator=torch.Generator().manual_seed(0))
    steps = make_grid(x, GridSpec(8, "int", "token"))
    torch.testing.assert_close(layer(x), nn.functional.linear(steps.nearest(x), layer.weight, layer.bias))


def test_gradients_pass_through_quantized_activations():
    layer = nn.Linear(8, 3)
    compressed.store(layer, compressed.scheme_of(None, "int8"))
    x = torch.randn(2, 8, generator=torch.Generator().manual_seed(0), requires_grad=True)
    y = layer(x)
    y.sum().backward()
    torch.testing.assert_close(x.grad, layer.weight.detach().sum(0).expand(2, 8))
    with torch.no_grad():
        assert torch.equal(layer(x), y)


@pytest.mark.parametrize("wrong", ["shape", "scale", "zero", "codes", "inexact"])
def test_store_rejects_tensors_that_do_not_fit(wrong):
    layer = nn.Linear(32, 8).bfloat16()
    grid = make_grid(layer.weight.detach(), GridSpec(4, "int", "group", 16))
    codes, scale, zero = grid.quantize(layer.weight.detach()), grid.scale, None
    before = layer.weight.detach().clone()
    if wrong == "shape":
        codes = codes[:, :16]
    elif wrong == "scale":
        scale = scale[:, :1]
    elif wrong == "zero":
        zero = torch.zeros_like(scale, dtype=torch.int8)
    elif wrong == "codes":
        codes = None
    else:
        scale = scale * 1.001
    with pytest.raises(ModelError):
        compressed.store(layer, compressed.scheme_of(grid.spec), codes, scale, zero)
    assert torch.equal(layer.weight, before)
    assert not hasattr(layer, "quantization_scheme")


def test_store_rejects_other_layers():
    layer = tiny_gpt2().transformer.h[0].attn.c_attn
    with pytest.raises(ModelError, match="Conv1D"):
        compressed.store(layer, compressed.scheme_of(None, "int8"))


def test_storing_twice_leaves_one_state():
    layer = nn.Linear(32, 8)
    compressed.store(layer, compressed.scheme_of(None, "int8", static=True), input_scale=torch.tensor([0.5]))
    compressed.store(layer, compressed.scheme_of(None, "int8"))
    assert "input_scale" not in layer._parameters
    assert layer.forward.__wrapped__ is nn.Linear.forward


def test_storable_names_the_layers_it_skips():
    model = tiny_gpt2()
    layers, skipped = compressed.storable(Scope("", model, model), ("Linear",))
    assert layers == {}
    (reason,) = skipped
    assert reason.startswith("Conv1D: compressed-tensors stores nn.Linear only; pruning, distillation, gobo and peg")
    assert len(skipped[reason]) == 8

    model = tiny_mixtral()
    layers, skipped = compressed.storable(Scope("", model, model), ("Linear",), integer=False)
    assert "model.layers.0.self_attn.q_proj" in layers
    stacked = skipped["stacked matrices: compressed-tensors stores nn.Linear only"]
    assert stacked == ["model.layers.0.mlp.experts", "model.layers.1.mlp.experts"]

    with pytest.raises(ModelError, match="step 1 cannot store integer weights of MixtralForCausalLM"):
        compressed.storable(Scope("", model, model), ("Linear",), label="step 1")

    model = tiny_qwen2()
    layers, skipped = compressed.storable(Scope("", model, model), ("lm_head",))
    assert layers == {}
    assert skipped == {"its weight is tied to model.embed_tokens.weight": ["lm_head"]}


def test_dense_leaves_no_trace():
    reference = tiny_llama()
    model = tiny_llama()
    attributes = set(vars(model))
    w4(model)
    expected = logits(model)
    assert convert_to_dense(model) == []
    assert torch.equal(logits(model), expected)
    assert model.state_dict().keys() == reference.state_dict().keys()
    assert set(vars(model)) == attributes
    assert not hasattr(model.config, "quantization_config")
    for module in model.modules():
        assert "forward" not in vars(module)
        assert not any(key.startswith("quantization") for key in vars(module))
    assert all(p.requires_grad for p in model.parameters())


def test_dense_names_layers_whose_activations_are_no_longer_quantized():
    model = tiny_llama()
    quantize(model, GridSpec(8), "int8", only=lambda n: "mlp" in n)
    compressed.attach_quantizer(model)
    assert convert_to_dense(model) == [n for n in inner(model) if "mlp" in n]


def test_attaching_to_a_model_without_quantization_raises():
    with pytest.raises(ModelError, match="no module"):
        compressed.attach_quantizer(tiny_llama())


def test_the_trainer_trains_adapters_only():
    quantizer = w4(tiny_llama()).hf_quantizer
    assert quantizer.is_trainable
    assert quantizer.is_serializable()
    assert not quantizer.is_qat_trainable


@pytest.mark.parametrize("activations", [None, "int8"])
def test_a_changed_weight_is_saved_dense(tmp_path, caplog, activations):
    """As after merging an adapter: it is never silently packed wrong."""
    model = tiny_llama()
    quantize(model, GridSpec(8), activations)
    compressed.attach_quantizer(model)
    changed = "model.layers.0.mlp.up_proj"
    model.get_submodule(changed).weight.data += 1e-4
    with caplog.at_level(logging.WARNING, "hf_optim.compressed.state_dict"):
        model.save_pretrained(tmp_path)
    assert "1 of 14" in caplog.text
    assert changed in caplog.text
    stored = load_file(tmp_path / "model.safetensors")
    assert torch.equal(stored[changed + ".weight"], model.get_submodule(changed).weight)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(logits(reloaded), logits(model))
    assert len(compressed.quantized_modules(reloaded)) == (13 if activations is None else 14)


def test_when_all_weights_changed_the_checkpoint_is_an_ordinary_one(tmp_path):
    model = w4(tiny_llama())
    for module in inner(model).values():
        module.weight.data += 1e-4
    model.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(logits(reloaded), logits(model))


def test_a_copy_saves_the_same(tmp_path):
    model = w4(tiny_llama())
    copied = copy.deepcopy(model)
    first, second = packed_state_dict(model)[0], packed_state_dict(copied)[0]
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("activations", [None, "int8"])
def test_block_state_survives_a_file(tmp_path, activations):
    model, other = tiny_llama(), tiny_llama(seed=1)
    other.load_state_dict(model.state_dict())
    quantize(model, GridSpec(4, "int", "group", 16, symmetric=False), activations)
    for block, blank in zip(model.model.layers, other.model.layers, strict=True):
        tensors, meta = compressed.dump_module_state(block)
        save_file(tensors, tmp_path / "block.safetensors")
        compressed.load_module_state(blank, load_file(tmp_path / "block.safetensors"), json.loads(json.dumps(meta)))
    mine, theirs = model.state_dict(), other.state_dict()
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[key], theirs[key]) and mine[key].dtype == theirs[key].dtype for key in mine)
    assert torch.equal(logits(model), logits(other))
    assert compressed.quantized_modules(other).keys() == compressed.quantized_modules(model).keys()
    for name, module in compressed.quantized_modules(other).items():
        assert module.quantization_scheme == model.get_submodule(name).quantization_scheme
        assert not module.weight.requires_grad


def test_block_state_of_a_dense_block_removes_the_quantization():
    model, other = tiny_llama(), w4(tiny_llama(seed=1))
    compressed.load_module_state(other.model.layers[0], *compressed.dump_module_state(model.model.layers[0]))
    assert not any(".layers.0." in name for name in compressed.quantized_modules(other))


def test_block_state_of_another_block_raises():
    tensors, meta = compressed.dump_module_state(tiny_llama().model.layers[0])
    with pytest.raises(CheckpointError, match="saved as"):
        compressed.load_module_state(tiny_llama(intermediate_size=40).model.layers[0], tensors, meta)
    tensors.pop("mlp.up_proj.weight")
    with pytest.raises(CheckpointError, match="only one has"):
        compressed.load_module_state(tiny_llama().model.layers[0], tensors, meta)


def test_a_classifier_reloads_through_the_auto_class(tmp_path):
    model = tiny_bert()
    quantize(model, GridSpec(8))
    compressed.attach_quantizer(model)
    model.save_pretrained(tmp_path)
    reloaded = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    assert torch.equal(logits(reloaded), logits(model))


# peft asks a quantized model for a property that transformers renamed.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("activations", [None, "int8"])
def test_an_adapter_trains_on_top_and_merges(tmp_path, activations):
    peft = pytest.importorskip("peft")
    base = tiny_llama()
    quantize(base, GridSpec(8), activations)
    compressed.attach_quantizer(base)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "up_proj"], init_lora_weights="gaussian")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = peft.get_peft_model(base, config).train()
    before = logits(base)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    for _ in range(2):
        optimizer.zero_grad()
        model(IDS, labels=IDS).loss.backward()
        optimizer.step()
    # The adapter of the first block learns: the gradient passed through all later layers.
    first = model.base_model.model.model.layers[0].self_attn.q_proj
    assert first.lora_B["default"].weight.abs().max() > 0
    assert first.base_layer.weight.grad is None
    model.eval().save_pretrained(tmp_path / "adapter")
    assert all("lora" in key for key in load_file(tmp_path / "adapter" / "adapter_model.safetensors"))
    merged = model.merge_and_unload()
    assert merged is base
    assert not torch.equal(logits(merged), before)
    merged.save_pretrained(tmp_path / "merged")
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert torch.equal(logits(reloaded), logits(merged))
    assert "weight_packed" in "".join(load_file(tmp_path / "merged" / "model.safetensors")) or activations
