"""``optim_config="auto"`` on checkpoints written by other packers."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from conftest import HELPERS
from naive_kernel import NAIVE
from reference_packers import Grid, awq, compressed_tensors, gptq, write
from tiny_models import tiny_llama
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaForCausalLM

import hf_optim
from hf_optim.compressed.packed.packed_linear import KernelWarning, PackedLinear
from hf_optim.errors import CheckpointError

TOKENS = torch.arange(5, 17)[None]
INSTALLED = "hf_optim.compressed.packed.accelerate.installed_kernels"


@pytest.fixture
def served(monkeypatch):
    """The naive kernel of the tests is installed, which supports every layer."""
    monkeypatch.setattr(INSTALLED, lambda: (NAIVE,))


@pytest.fixture
def unserved(monkeypatch):
    """No kernel is installed."""
    monkeypatch.setattr(INSTALLED, lambda: ())


def build(folder, bits, size, symmetric, layout, config, scattered=False, shards=1, **sizes):
    """Write a random Llama in a layout; return it with the dense weights that the reference decodes."""
    rng = np.random.default_rng(bits * 100 + (size or 7))
    dense = tiny_llama(hidden_size=64, intermediate_size=96, **sizes)
    layers = {}
    for name, module in dense.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            grid = Grid(rng, module.out_features, module.in_features, bits, size, symmetric, scattered)
            layers[name] = layout(grid)
            with torch.no_grad():
                module.weight.copy_(torch.from_numpy(grid.dense))
    write(dense, folder, layers, config, shards)
    return dense.eval()


def ct_config(bits, size, symmetric, form, actorder=None, inputs=None, kind="int"):
    weights = {"num_bits": bits, "type": kind, "symmetric": symmetric, "actorder": actorder}
    weights |= {"strategy": "group", "group_size": size} if size else {"strategy": "channel"}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs, "output_activations": None}
    group |= {"format": form}
    return {
        "quant_method": "compressed-tensors",
        "config_groups": {"group_0": group},
        "format": form,
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
    }


def packed(model):
    return [name for name, module in model.named_modules() if isinstance(module, PackedLinear)]


@torch.no_grad()
def close(model, dense):
    a, b = model(TOKENS).logits.double(), dense.double()(TOKENS).logits
    return float((a - b).norm() / b.norm()) <= 1e-5


def gptq_config(bits, size, **more):
    return {"quant_method": "gptq", "bits": bits, "group_size": size or -1, "sym": True, "desc_act": False, **more}


GPTQ_CASES = [
    (bits, size, symmetric, scattered, version)
    for bits, size, symmetric, scattered, version in [
        (4, 32, True, False, "gptq"),
        (4, 32, False, True, "gptq"),
        (4, None, False, False, "gptq_v2"),
        (3, 32, False, False, "gptq"),
        (2, 32, True, True, "gptq_v2"),
        (8, 32, True, False, "gptq"),
        (8, 32, False, True, "gptq"),
    ]
]


@pytest.mark.many
@pytest.mark.parametrize(("bits", "size", "symmetric", "scattered", "version"), GPTQ_CASES)
@pytest.mark.parametrize("kernels", ["served", "unserved"])
def test_gptq(bits, size, symmetric, scattered, version, kernels, tmp_path, request):
    request.getfixturevalue(kernels)
    config = gptq_config(bits, size, desc_act=scattered, checkpoint_format=version)
    dense = build(tmp_path / "a", bits, size, symmetric, lambda g: gptq(g, version == "gptq"), config, scattered)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore" if kernels == "unserved" else "error", KernelWarning)
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "a", optim_config="auto", dtype=torch.float32)
    assert len(packed(model)) == (14 if kernels == "served" else 0)
    assert close(model, dense)
    up = model.model.layers[1].mlp.up_proj
    assert torch.equal(up.weight.double(), dense.model.layers[1].mlp.up_proj.weight.float().double())
    # Saved as compressed-tensors, which stock transformers reads.
    model.save_pretrained(tmp_path / "b")
    stored = json.loads((tmp_path / "b" / "config.json").read_text())
    assert stored.get("quantization_config", {}).get("quant_method") == (None if scattered else "compressed-tensors")
    assert close(AutoModelForCausalLM.from_pretrained(tmp_path / "b", dtype=torch.float32), dense)


@pytest.mark.parametrize("kernels", ["served", "unserved"])
@pytest.mark.parametrize("size", [32, None])
def test_awq(size, kernels, tmp_path, request):
    request.getfixturevalue(kernels)
    config = {"quant_method": "awq", "bits": 4, "group_size": size or -1, "version": "gemm", "zero_point": True}
    config |= {"modules_to_not_convert": ["lm_head"]}
    dense = build(tmp_path / "a", 4, size, False, awq, config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", KernelWarning)
        model = LlamaForCausalLM.from_pretrained(tmp_path / "a", optim_config="auto", dtype=torch.float32)
    assert len(packed(model)) == (14 if kernels == "served" else 0)
    assert close(model, dense)
    model.save_pretrained(tmp_path / "b")
    assert close(AutoModelForCausalLM.from_pretrained(tmp_path / "b", dtype=torch.float32), dense)


CT_CASES = [
    (4, 32, True, "pack-quantized", False),
    (4, 32, False, "pack-quantized", False),
    (4, None, True, "pack-quantized", False),
    (3, 32, True, "pack-quantized", False),
    (3, None, False, "pack-quantized", False),
    (8, 32, True, "pack-quantized", False),
    (8, None, False, "int-quantized", False),
    (8, 32, True, "naive-quantized", False),
    (4, 32, False, "naive-quantized", False),
    (4, 32, True, "pack-quantized", True),
]


@pytest.mark.many
@pytest.mark.parametrize(("bits", "size", "symmetric", "form", "scattered"), CT_CASES)
@pytest.mark.parametrize("kernels", ["served", "unserved"])
def test_compressed_tensors(bits, size, symmetric, form, scattered, kernels, tmp_path, request):
    request.getfixturevalue(kernels)
    config = ct_config(bits, size, symmetric, form, "group" if scattered else None)
    dense = build(
        tmp_path / "a",
        bits,
        size,
        symmetric,
        lambda g: compressed_tensors(g, form, symmetric, scattered),
        config,
        scattered,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", KernelWarning)
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "a", optim_config="auto", dtype=torch.float32)
    assert len(packed(model)) == (14 if kernels == "served" else 0)
    assert close(model, dense)
    if not scattered and (symmetric or form != "pack-quantized"):
        stock = AutoModelForCausalLM.from_pretrained(tmp_path / "a", dtype=torch.float32)
        with torch.no_grad():
            ours, theirs = model(TOKENS).logits, stock(TOKENS).logits
        assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-6)
        if kernels == "unserved":
            assert torch.equal(ours, theirs)
            assert list(model.state_dict()) == list(hf_optim.restore(model).state_dict())
    model.save_pretrained(tmp_path / "b")
    assert close(AutoModelForCausalLM.from_pretrained(tmp_path / "b", dtype=torch.float32), dense)


INPUTS = {
    "dynamic": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True},
    "asymmetric": {"num_bits": 8, "type": "int", "symmetric": False, "strategy": "token", "dynamic": True},
    "static": {"num_bits": 8, "type": "int", "symmetric": False, "strategy": "tensor", "dynamic": False},
    "fp8": {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "token", "dynamic": True},
}


def eight_bits(grid, inputs):
    parts = compressed_tensors(grid, "int-quantized", True)
    if inputs == "static":
        parts |= {"input_scale": torch.tensor([0.03]), "input_zero_point": torch.tensor([5], dtype=torch.int8)}
    if inputs == "fp8":
        parts["weight"] = parts["weight"].float().to(torch.float8_e4m3fn)
    return parts


@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize("kernels", ["served", "unserved"])
def test_quantized_inputs(inputs, kernels, tmp_path, request):
    request.getfixturevalue(kernels)
    kind, form = ("float", "float-quantized") if inputs == "fp8" else ("int", "int-quantized")
    config = ct_config(8, None, True, form, inputs=INPUTS[inputs], kind=kind)
    build(tmp_path, 8, None, True, lambda grid: eight_bits(grid, inputs), config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", KernelWarning)
        model = AutoModelForCausalLM.from_pretrained(tmp_path, optim_config="auto", dtype=torch.float32)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert len(packed(model)) == (14 if kernels == "served" else 0)
    with torch.no_grad():
        ours, theirs = model(TOKENS).logits, stock(TOKENS).logits
        up, x = model.model.layers[0].mlp.up_proj, torch.randn(1, 3, 64, generator=torch.Generator().manual_seed(0))
        wanted = stock.model.layers[0].mlp.up_proj(x)
        assert torch.allclose(up(x), wanted, rtol=1e-5, atol=1e-5)
        if kernels == "unserved":
            assert torch.equal(ours, theirs)
        else:
            assert torch.allclose(up.dense(x), wanted, rtol=1e-6, atol=1e-6)


PEAK = """
import json, sys, torch
sys.path.insert(0, sys.argv[2])
from naive_kernel import NAIVE
import hf_optim
from hf_optim.compressed.packed import accelerate
from transformers import AutoModelForCausalLM
bundled = accelerate.installed_kernels()
accelerate.installed_kernels = lambda: (NAIVE, *bundled)
from hf_optim.runs.memory import PeakMemory
def peak():
    with PeakMemory(torch.device("cpu")) as memory:
        pass
    return memory.bytes
def load(home):
    return AutoModelForCausalLM.from_pretrained(home, optim_config="auto", dtype=torch.float32)
load(sys.argv[3])  # imports what loading needs
before = peak()
model = load(sys.argv[1])
after = peak()
kernels = [row.kernel for row in hf_optim.report(hf_optim.accelerate(model))]
packed = sum(kernel == "naive int3" for kernel in kernels)
techniques = [name for name in sys.modules if name.startswith("hf_optim_plugins")]
names = [kernel.name for kernel in bundled]
print(json.dumps({"bytes": after - before, "packed": packed, "techniques": techniques, "bundled": names}))
"""


@pytest.mark.slow
def test_loading_makes_no_dense_copy_and_imports_no_technique(tmp_path):
    """Measure the peak memory of a process that loads 24 million 3-bit weights: 9 MB stored, 96 MB dense."""
    config = gptq_config(3, 128)
    sizes = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8}
    small = {"hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 1}
    homes = {"small": tmp_path / "small", "large": tmp_path / "large"}
    for home, changes in zip(homes.values(), (small, sizes), strict=True):
        rng, layers = np.random.default_rng(0), {}
        model = tiny_llama(**changes)
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear) and name != "lm_head":
                layers[name] = gptq(Grid(rng, module.out_features, module.in_features, 3, 128, True))
        home.mkdir()
        write(model, home, layers, config)
    weights = sum(m.weight.numel() for m in (model.get_submodule(name) for name in layers))
    command = [sys.executable, "-W", "ignore", "-c", PEAK, str(homes["large"]), str(HELPERS), str(homes["small"])]
    # Memory that the allocator keeps varies between processes by about as much as the codes, and only adds: the less
    # of two counts.
    runs = [subprocess.run(command, capture_output=True, text=True, check=True) for _ in range(2)]
    found = min((json.loads(done.stdout.splitlines()[-1]) for done in runs), key=lambda run: run["bytes"])
    assert found["packed"] == len(layers)
    assert found["techniques"] == []
    assert set(found["bundled"]) >= {"wna16", "w8a8", "llm_int8", "sparse24", "codebook"}
    # The naive packed weight has one byte per weight, the checkpoint 3 bits; a dense copy would add four bytes.
    assert weights < found["bytes"] < 4 * weights


def test_restoring_equals_loading_without_kernels(tmp_path, served, monkeypatch):
    build(
        tmp_path,
        4,
        32,
        True,
        lambda g: compressed_tensors(g, "pack-quantized", True),
        ct_config(4, 32, True, "pack-quantized"),
    )
    model = AutoModelForCausalLM.from_pretrained(tmp_path, optim_config="auto")
    hf_optim.restore(model)
    monkeypatch.setattr(INSTALLED, lambda: ())
    with pytest.warns(KernelWarning):
        plain = AutoModelForCausalLM.from_pretrained(tmp_path, optim_config="auto")
    a, b = model.state_dict(), plain.state_dict()
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) and a[key].dtype == b[key].dtype for key in a)
    assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtypes_shards_and_device_map(dtype, tmp_path, served):
    dense = build(tmp_path, 4, 32, False, gptq, gptq_config(4, 32), shards=3)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, optim_config="auto", dtype=dtype, device_map="cpu")
    up, wanted = model.model.layers[0].mlp.up_proj, dense.model.layers[0].mlp.up_proj.weight
    assert (up.weight.dtype, model.dtype) == (dtype, dtype)
    digits = {torch.float16: 2**-11, torch.bfloat16: 2**-7, torch.float32: 2**-24}[dtype]
    assert (((up.weight - wanted) / wanted.abs().clamp(min=1e-12)).abs() <= digits).all()
    with torch.no_grad():
        assert model(TOKENS).logits.isfinite().all()


def test_other_classes_and_tied_embeddings(tmp_path, served):
    dense = build(tmp_path, 4, 32, True, gptq, gptq_config(4, 32), tie_word_embeddings=True)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, optim_config="auto", dtype=torch.float32)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert close(model, dense)
    base = AutoModel.from_pretrained(tmp_path, optim_config="auto", dtype=torch.float32)
    assert len(packed(base)) == 14
    with torch.no_grad():
        wanted = dense.double().model(TOKENS).last_hidden_state
        assert torch.allclose(base(TOKENS).last_hidden_state.double(), wanted, rtol=1e-4, atol=1e-5)
    with pytest.raises(
        CheckpointError, match=r"score\.weight"
    ):  # a random head on top of codes, which cannot be trained
        AutoModelForSequenceClassification.from_pretrained(tmp_path, optim_config="auto", dtype=torch.float32)


# -- what cannot be read ----------------------------------------------------------------------------------------------
def rewrite(folder, change):
    from safetensors.torch import load_file, save_file

    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


UP = "model.layers.0.mlp.up_proj"


@pytest.mark.parametrize("key", ["scales", "qzeros"])
def test_a_missing_tensor_is_named(key, tmp_path, served):
    build(tmp_path, 4, 32, True, gptq, gptq_config(4, 32))
    rewrite(tmp_path, lambda state: state.pop(f"{UP}.{key}"))
    with pytest.raises(CheckpointError, match=rf"no {UP}\.{key}"):
        AutoModelForCausalLM.from_pretrained(tmp_path, optim_config="auto")


def test_missing_scales_of_compressed_tensors_are_named(tmp_path, served):
    form = "int-quantized"
    build(tmp_path, 8, None, True, lambda g: compressed_tensors(g, form, True), ct_config(8, None, True, form))
    rewrite(tmp_path, lambda state: state.pop(f"{UP}.weight_scale"))
    with pytest.raises(CheckpointError, match=rf"no {UP}\.weight_scale"):
        AutoModelForCausalLM.from_pretrained(tmp_path, optim_config="auto")


@pytest.mark.parametrize(
    ("key", "change"),
    [("qweight", lambda t: t[:-1].clone()), ("scales", lambda t: t.int()), ("qzeros", lambda t: t.T.contiguous())],
)
def test_an_impossible_tensor_is_named(key, change, tmp_path, served):
    build(tmp_path, 4, 32, True, gptq, gptq_config(4, 32))
    rewrite(tmp_path, lambda state: state.update({f"{UP}.{key}": change(state[f"{UP}.{key}"])}))
    with pytest.raises(CheckpointError, match=rf"{UP}\.{key} is .* expected"):
        AutoModelForCausalLM.from_pretrained(tmp_path, optim_config="auto")


def test_groups_that_do_not_fit_are_named(tmp_path, served):
    build(tmp_path, 4, 32, True, gptq, gptq_config(4, 48))
    with pytest.raises(CheckpointError, match=r"layers\.0\.\S*qzeros is I32 \[3, 8\], expected I32 \[2, 8\]"):
        AutoModelForCausalLM.from_pretrained(tmp_path, optim_config="auto")
    build(tmp_path, 4, 32, True, gptq, gptq_config(4, 32))
    rewrite(tmp_path, lambda state: state[f"{UP}.g_idx"].zero_())
    with pytest.raises(CheckpointError, match=rf"{UP}: its groups are not 2 of 32 columns"):
        AutoModelForCausalLM.from_pretrained(tmp_path, optim_config="auto")


@pytest.mark.parametrize("cut", [4, 200, -1000])
def test_a_truncated_file_is_named(cut, tmp_path, served):
    build(tmp_path, 4, 32, True, gptq, gptq_config(4, 32))
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        AutoModelForCausalLM.from_pretrained(tmp_path, optim_config="auto")


def test_a_header_of_absurd_length_raises_checkpoint_error(tmp_path, served):
    build(tmp_path, 4, 32, True, gptq, gptq_config(4, 32))
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", 2**60) + path.read_bytes()[8:])
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        AutoModelForCausalLM.from_pretrained(tmp_path, optim_config="auto")
