"""Checkpoints with weights of 4-bit floats: what stock transformers and ``"auto"`` make of them, and saving them again.

NVFP4 and MXFP4 of compressed-tensors, and the experts of gpt-oss.
"""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny_models import tiny_llama
from transformers import AutoModelForCausalLM, Mxfp4Config

import hf_optim
from hf_optim import compressed, optimize
from hf_optim.compressed.float4 import decode_float4, recover_float4
from hf_optim.compressed.packed.layer_report import report
from hf_optim.compressed.weights import Codes
from hf_optim.errors import CheckpointError, ModelError

IDS = torch.randint(0, 64, (2, 12), generator=torch.Generator().manual_seed(0))
SCHEMES = pytest.mark.parametrize("scheme", ["NVFP4A16", "MXFP4A16"])


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Folders of tiny models with each scheme, and the logits of the models in memory."""
    found = {}
    dense = tmp_path_factory.mktemp("dense")
    llama().save_pretrained(dense)
    for scheme in ("NVFP4A16", "MXFP4A16"):
        recipe = [{"technique": "rtn", "scheme": scheme}]
        model = AutoModelForCausalLM.from_pretrained(dense, optim_config=recipe)
        folder = tmp_path_factory.mktemp(scheme)
        model.save_pretrained(folder)
        found[scheme] = folder, logits(model)
    return found


def llama():
    return tiny_llama(hidden_size=32, intermediate_size=96).to(torch.bfloat16)


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def same_files(a, b):
    a, b = load_file(a / "model.safetensors"), load_file(b / "model.safetensors")
    assert a.keys() == b.keys()
    for key, value in a.items():
        assert value.dtype == b[key].dtype
        assert torch.equal(value.view(torch.uint8), b[key].view(torch.uint8)), key


@SCHEMES
def test_stock_transformers_computes_the_same(written, scheme):
    folder, expected = written[scheme]
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(folder)), expected)
    stored = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert stored["format"] == f"{scheme[:5].lower()}-pack-quantized"
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.down_proj"
    packed, scale = tensors[f"{name}.weight_packed"], tensors[f"{name}.weight_scale"]
    assert packed.dtype == torch.uint8
    assert 2 * packed.shape[1] == 96
    assert (scale.dtype, scale.shape[1]) == ((torch.float8_e4m3fn, 6) if scheme == "NVFP4A16" else (torch.uint8, 3))


def test_a_process_without_hf_optim_computes_the_same(written, tmp_path, stock_python):
    folder, expected = written["NVFP4A16"]
    torch.save(IDS, tmp_path / "ids.pt")
    done = stock_python.copy(f"""
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(folder)!r})
torch.save(model(torch.load({str(tmp_path / "ids.pt")!r})).logits.detach(), {str(tmp_path / "out.pt")!r})
""")
    assert done.status == 0, done.err
    assert torch.equal(torch.load(tmp_path / "out.pt"), expected)


@SCHEMES
def test_auto_keeps_the_codes_packed(written, scheme, tmp_path):
    folder, expected = written[scheme]
    model = AutoModelForCausalLM.from_pretrained(folder, optim_config="auto")
    assert torch.equal(logits(model), expected)
    rows = [row for row in report(model) if "proj" in row.name]
    assert len(rows) == 14
    assert all(scheme[:5] in (row.kernel or "") for row in rows)
    layer = model.model.layers[0].mlp.down_proj
    assert not any(value.is_floating_point() and value.numel() >= 96 * 32 for value in layer.buffers())
    model.save_pretrained(tmp_path / "again")
    same_files(folder, tmp_path / "again")
    hf_optim.restore(model)
    assert torch.equal(logits(model), expected)
    model.save_pretrained(tmp_path / "restored")
    same_files(folder, tmp_path / "restored")
    hf_optim.accelerate(model)
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_auto_runs_other_dtypes_on_the_weights_that_stock_decodes(written, dtype):
    folder, _ = written["NVFP4A16"]
    stock = AutoModelForCausalLM.from_pretrained(folder)
    logits(stock)  # decompresses
    dense = AutoModelForCausalLM.from_config(llama().config, dtype=dtype)
    values = {name: value.to(dtype) for name, value in stock.state_dict().items() if "scale" not in name}
    dense.load_state_dict(values)
    model = AutoModelForCausalLM.from_pretrained(folder, optim_config="auto", dtype=dtype)
    assert torch.equal(logits(model), logits(dense))
    hf_optim.restore(model)
    assert torch.equal(model.model.layers[1].mlp.up_proj.weight, dense.model.layers[1].mlp.up_proj.weight)


def test_the_checkpoint_of_another_tool(shared_checkpoints, tmp_path):
    folder = shared_checkpoints / "llmcompressor-nvfp4a16"
    stock = logits(AutoModelForCausalLM.from_pretrained(folder))
    model = AutoModelForCausalLM.from_pretrained(folder, optim_config="auto")
    assert torch.equal(logits(model), stock)
    assert sum("NVFP4" in (row.kernel or "") for row in report(model)) == 35
    model.save_pretrained(tmp_path / "again")
    same_files(folder, tmp_path / "again")


def test_a_weight_that_left_its_grid_is_saved_dense(written, tmp_path, caplog):
    folder, _ = written["NVFP4A16"]
    model = hf_optim.restore(AutoModelForCausalLM.from_pretrained(folder, optim_config="auto"))
    layer = model.model.layers[0].self_attn.q_proj
    layer.weight.data[0, 0] += 1
    changed = layer.weight.detach().clone()
    model.save_pretrained(tmp_path / "changed")
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "changed")
    logits(back)
    assert torch.equal(back.model.layers[0].self_attn.q_proj.weight, changed)


@SCHEMES
def test_codes_are_recovered_from_every_number(scheme):
    """All patterns and scales but those that decode to infinity; -0.0 keeps its sign."""
    args = compressed.scheme_of(spec(scheme)).weights
    count = 127 if scheme == "NVFP4A16" else 250
    kind = torch.float8_e4m3fn if scheme == "NVFP4A16" else torch.float8_e8m0fnu
    first = 1 if scheme == "NVFP4A16" else 0  # a scale of 0 keeps no numbers
    scale = torch.arange(first, count, dtype=torch.uint8)[:, None]
    patterns = torch.arange(16, dtype=torch.uint8).repeat(len(scale), args.group_size // 16)
    shared = torch.full((len(scale), 1), 3.3) if scheme == "NVFP4A16" else None
    codes = Codes(patterns, scale.view(kind), None, global_scale=shared)
    weight = decode_float4(codes, torch.bfloat16)
    own = None if shared is None else shared[0]
    found = recover_float4(weight, codes.scale.to(torch.bfloat16), own, args)
    assert torch.equal(found.codes, patterns)
    assert torch.equal(found.scale.view(torch.uint8), scale)


def spec(scheme):
    from hf_optim.toolkit.quantization import GridSpec

    kind, size = ("nvfp4", 16) if scheme == "NVFP4A16" else ("mxfp4", 32)
    return GridSpec(4, kind, "group", size)


def damaged(written, tmp_path, scheme, change):
    folder, _ = written[scheme]
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    return tmp_path


@pytest.mark.parametrize(("scheme", "byte"), [("NVFP4A16", 127), ("MXFP4A16", 255)])
def test_scales_that_are_nan_are_refused(written, tmp_path, scheme, byte):
    def change(tensors):
        key = "model.layers.1.mlp.up_proj.weight_scale"
        tensors[key].view(torch.uint8)[0, 0] = byte

    folder = damaged(written, tmp_path, scheme, change)
    with pytest.raises(CheckpointError, match=r"up_proj: a weight_scale is NaN"):
        AutoModelForCausalLM.from_pretrained(folder, optim_config="auto")


def test_a_global_scale_that_is_not_positive_is_refused(written, tmp_path):
    def change(tensors):
        tensors["model.layers.1.mlp.up_proj.weight_global_scale"].zero_()

    folder = damaged(written, tmp_path, "NVFP4A16", change)
    with pytest.raises(CheckpointError, match="weight_global_scale is not a positive number"):
        AutoModelForCausalLM.from_pretrained(folder, optim_config="auto")


def test_models_that_stock_transformers_could_not_run_are_refused():
    with pytest.raises(ModelError, match=r"float32, and stock transformers decodes nvfp4 to bfloat16 only"):
        optimize(llama().float(), [{"technique": "rtn", "scheme": "NVFP4A16"}])


# gpt-oss: experts in MXFP4, with biases, a clamped gate, gate and up interleaved.


@pytest.fixture(scope="module")
def gpt_oss(tmp_path_factory):
    torch.manual_seed(0)
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    config = transformers.GptOssConfig(
        vocab_size=64, hidden_size=256, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, num_local_experts=4, num_experts_per_tok=2, rope_parameters=rope,
        layer_types=["sliding_attention", "full_attention"], max_position_embeddings=64, dtype="bfloat16",
        architectures=["GptOssForCausalLM"],
    )  # fmt: skip
    model = transformers.GptOssForCausalLM(config).to(torch.bfloat16)
    g = torch.Generator().manual_seed(1)
    tensors = {}
    for name, value in model.state_dict().items():
        if name.endswith(("gate_up_proj", "down_proj")):
            count, columns, rows = value.shape
            shape = (count, rows, columns // 32)
            tensors[f"{name}_blocks"] = torch.randint(0, 256, (*shape, 16), generator=g, dtype=torch.uint8)
            tensors[f"{name}_scales"] = torch.randint(120, 127, shape, generator=g, dtype=torch.uint8)
        else:
            tensors[name] = torch.randn(value.shape, generator=g).to(value.dtype) if "bias" in name else value
    folder = tmp_path_factory.mktemp("gpt_oss")
    config.save_pretrained(folder)
    stored = json.loads((folder / "config.json").read_text())
    stored["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    (folder / "config.json").write_text(json.dumps(stored))
    save_file(
        {name: value.contiguous() for name, value in tensors.items()}, folder / "model.safetensors", {"format": "pt"}
    )
    return folder


def decoded_by_stock(folder, **given):
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=Mxfp4Config(dequantize=True), **given)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_experts_of_gpt_oss_run_on_their_codes(gpt_oss, dtype):
    # Stock transformers 5.17 decodes experts to bfloat16 (exactly) and leaves them in it, whatever the model's dtype.
    stock = decoded_by_stock(gpt_oss, dtype=dtype).to(dtype)
    model = AutoModelForCausalLM.from_pretrained(gpt_oss, optim_config="auto", dtype=dtype)
    expected = logits(stock)
    difference = (logits(model) - expected).norm() / expected.norm()
    assert float(difference) <= (1e-2 if dtype == torch.bfloat16 else 1e-5)
    experts = model.model.layers[0].mlp.experts
    assert torch.equal(experts.gate_up_proj, stock.model.layers[0].mlp.experts.gate_up_proj)
    held = sum(value.nbytes for value in experts.buffers())
    weights = sum(
        stock.model.layers[0].mlp.experts.get_parameter(name).numel() for name in ("gate_up_proj", "down_proj")
    )
    assert held < weights  # bytes: 4.25 bits a weight
    rows = [row for row in report(model) if "experts" in row.name]
    assert len(rows) == 4
    assert all("MXFP4" in (row.kernel or "") for row in rows)


def test_experts_of_gpt_oss_are_saved_as_they_were_loaded(gpt_oss, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(gpt_oss, optim_config="auto")
    model.save_pretrained(tmp_path / "again")
    same_files(gpt_oss, tmp_path / "again")
    stored = json.loads((tmp_path / "again" / "config.json").read_text())["quantization_config"]
    assert stored == {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    expected = logits(decoded_by_stock(gpt_oss))
    hf_optim.restore(model)
    assert torch.equal(logits(model), expected)
    model.save_pretrained(tmp_path / "dense")
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "dense")), expected)


def test_experts_computed_by_none_have_no_bias(gpt_oss):
    """Pairs beyond the experts of a layer add nothing, whatever their weight."""
    experts = (
        AutoModelForCausalLM.from_pretrained(gpt_oss, optim_config="auto", dtype=torch.float32)
        .model.layers[0]
        .mlp.experts
    )
    hidden, weights = torch.randn(3, 256), torch.rand(3, 2)
    chosen = torch.tensor([[0, 4], [1, 2], [4, 9]])
    for product in (experts.mixture_product, experts.decoded_product):
        found = product(hidden, chosen, weights)
        assert not found[2].any()
        alone = product(hidden[:1], chosen[:1, :1], weights[:1, :1])
        assert torch.allclose(found[:1], alone, atol=1e-5)


@pytest.mark.parametrize("change", ["missing", "shape", "nan"])
def test_damaged_blocks_are_refused(gpt_oss, tmp_path, change):
    tensors = load_file(gpt_oss / "model.safetensors")
    key = "model.layers.1.mlp.experts.down_proj_scales"
    if change == "missing":
        del tensors[key]
    elif change == "shape":
        tensors[key] = tensors[key][..., :1].contiguous()
    else:
        tensors[key][2, 1, 0] = 255
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text((gpt_oss / "config.json").read_text())
    with pytest.raises(CheckpointError, match="down_proj_scales"):
        AutoModelForCausalLM.from_pretrained(tmp_path, optim_config="auto")
