"""``optim_config="auto"`` on mixtures: experts of every layout stay packed, and are what their codes stand for."""

from __future__ import annotations

import copy
import json
import weakref

import pytest
import torch
import transformers
from mixture_checkpoints import write_mixture
from reference_packers import awq, compressed_tensors, gptq
from safetensors.torch import load_file, save_file
from tiny_models import DECODER, tiny_mixtral
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

import hf_optim
from hf_optim.compressed.packed.packed_experts import PackedExperts
from hf_optim.errors import CheckpointError, ModelError
from hf_optim.testing.models import _build

IDS = torch.randint(0, 64, (3, 12), generator=torch.Generator().manual_seed(0))


def qwen2_moe():
    """With a shared expert, whose layers are ordinary linears."""
    sizes = {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 32,
    }
    return _build(transformers.Qwen2MoeForCausalLM, transformers.Qwen2MoeConfig(**DECODER, **sizes), 0)


def mixtral():
    return tiny_mixtral(intermediate_size=64)


def ct_config(bits, size, symmetric, form, inputs=None, kind="int", targets=("Linear",)):
    weights = {"num_bits": bits, "type": kind, "symmetric": symmetric}
    weights |= {"strategy": "group", "group_size": size} if size else {"strategy": "channel"}
    group = {"targets": list(targets), "weights": weights, "input_activations": inputs, "format": form}
    ignore = ["lm_head", "re:.*mlp.gate$", "re:.*block_sparse_moe.gate$", "re:.*shared_expert_gate$"]
    return {
        "quant_method": "compressed-tensors", "config_groups": {"group_0": group}, "format": form, "ignore": ignore,
        "quantization_status": "compressed",
    }  # fmt: skip


def gptq_config(bits, size, **more):
    return {"quant_method": "gptq", "bits": bits, "group_size": size or -1, "desc_act": True, **more}


def packer(form, symmetric=True):
    return lambda grid: compressed_tensors(grid, form, symmetric)


PACK, INT = "pack-quantized", "int-quantized"
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 16, "version": "gemm"}
LAYOUTS = {  # layout, configuration, bits, group, symmetric, columns in any order
    "int4": (packer(PACK), ct_config(4, 16, True, PACK), 4, 16, True, False),
    "int3": (packer(PACK), ct_config(3, 32, True, PACK), 3, 32, True, False),
    "int8": (packer(INT), ct_config(8, 0, True, INT), 8, 0, True, False),
    "zeros": (packer(PACK, False), ct_config(4, 16, False, PACK), 4, 16, False, False),
    "gptq": (gptq, gptq_config(4, 16), 4, 16, False, False),
    "gptq-symmetric": (gptq, gptq_config(4, 16), 4, 16, True, False),
    "gptq-reordered": (gptq, gptq_config(4, 16), 4, 16, True, True),
    "awq": (awq, AWQ, 4, 16, False, False),
}
READABLE = ("int4", "int3", "gptq-symmetric")


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """(layout, model) -> folder and the dense model, written once."""
    made = {}

    def write(name, build=mixtral):
        if (name, build) not in made:
            layout, config, bits, size, symmetric, scattered = LAYOUTS[name]
            model, folder = build(), tmp_path_factory.mktemp("mixture") / name
            write_mixture(model, folder, layout, config, bits, size, symmetric, scattered)
            made[name, build] = folder, model.eval()
        return made[name, build]

    return write


def experts_of(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, PackedExperts)}


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.filterwarnings("ignore::hf_optim.KernelWarning")
@pytest.mark.parametrize("name", LAYOUTS)
def test_experts_of_every_layout_stay_packed(name, written):
    folder, dense = written(name)
    model = AutoModelForCausalLM.from_pretrained(folder, optim_config="auto", dtype="float32")
    assert len(experts_of(model)) == 2
    assert not any("gate_up_proj" in key or key.endswith("down_proj") for key, _ in model.named_parameters())
    exact = copy.deepcopy(dense).double()
    exact.set_experts_implementation("eager")  # PyTorch's grouped product takes no float64
    a, b = logits(model).double(), logits(exact)
    assert float((a - b).norm() / b.norm()) <= 1e-5


@pytest.mark.filterwarnings("ignore::hf_optim.KernelWarning")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32])
def test_a_router_has_the_dtype_of_the_model_or_the_one_its_class_keeps(stored, dtype, written, tmp_path, monkeypatch):
    folder, dense = written("int4")
    state = load_file(folder / "model.safetensors")
    state = {key: value.to(stored) if value.dtype == torch.float32 else value for key, value in state.items()}
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    tmp_path.joinpath("config.json").write_text((folder / "config.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(tmp_path, optim_config="auto", dtype=dtype)
    assert {each.dtype for each in model.parameters()} == {dtype}  # the file calls the router otherwise than the model
    a, b = logits(model).double(), logits(dense).double()
    assert float((a - b).norm() / b.norm()) <= (1e-5 if (stored, dtype) == (torch.float32, torch.float32) else 0.05)
    monkeypatch.setattr(transformers.MixtralForCausalLM, "_keep_in_fp32_modules_strict", {"mlp.gate"})
    kept = AutoModelForCausalLM.from_pretrained(tmp_path, optim_config="auto", dtype=dtype)
    assert {name for name, each in kept.named_parameters() if each.dtype != dtype} == {
        name for name, _ in kept.named_parameters() if name.endswith("mlp.gate.weight") and dtype != torch.float32
    }
    assert kept.model.layers[0].mlp.gate.weight.dtype == torch.float32


@pytest.mark.filterwarnings("ignore::hf_optim.KernelWarning")
def test_a_shared_expert_is_made_of_layers_and_the_others_are_packed(written):
    folder, dense = written("int4", qwen2_moe)
    model = AutoModelForCausalLM.from_pretrained(folder, optim_config="auto")
    assert len(experts_of(model)) == 2
    torch.testing.assert_close(logits(model), logits(dense), rtol=1e-4, atol=1e-4)
    rows = [row for row in hf_optim.report(model) if row.experts]
    assert [(row.name, row.shape, row.experts) for row in rows[:2]] == [
        ("model.layers.0.mlp.experts.gate_up_proj", (64, 32), 4),
        ("model.layers.0.mlp.experts.down_proj", (32, 32), 4),
    ]
    assert all("4-bit, groups of 16" in row.kernel for row in rows)
    assert "4 of 4 matrices of experts on dense float32 experts" in hf_optim.report(model).summary
    assert "4 x 64 x 32" in str(hf_optim.report(model))


@pytest.mark.many(every=4)
@pytest.mark.filterwarnings("ignore::hf_optim.KernelWarning")
@pytest.mark.parametrize("name", LAYOUTS)
def test_saved_again_they_are_the_same_or_refused(name, written, tmp_path):
    folder, dense = written(name)
    model = AutoModelForCausalLM.from_pretrained(folder, optim_config="auto", dtype="float32")
    if name not in READABLE:
        with pytest.raises(ModelError, match="experts cannot be saved compressed: stock transformers reads only"):
            model.save_pretrained(tmp_path / "again")
        hf_optim.restore(model)
        model.save_pretrained(tmp_path / "again")
    else:
        model.save_pretrained(tmp_path / "again")
        if not name.startswith("gptq"):
            before, after = (load_file(home / "model.safetensors") for home in (folder, tmp_path / "again"))
            own = [key for key in before if "experts" in key]
            assert own
            assert all(torch.equal(before[key], after[key].to(before[key].dtype)) for key in own)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype="float32")
    torch.testing.assert_close(logits(stock), logits(dense.float()), rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore::hf_optim.KernelWarning")
@pytest.mark.parametrize("kind", ["int", "float"])
def test_inputs_of_experts_are_quantized_as_the_checkpoint_says(kind, tmp_path):
    dense = mixtral()
    inputs = {"num_bits": 8, "type": kind, "symmetric": True, "strategy": "token", "dynamic": True}
    form = "int-quantized" if kind == "int" else "float-quantized"
    config = ct_config(8, 0, True, form, inputs, kind, targets=[r"re:.*experts\.\d+\.w[123]$"])

    def layout(grid):
        if kind == "float":
            grid.codes = torch.from_numpy(grid.codes - 128).float().to(torch.float8_e4m3fn)
            grid.dense = grid.codes.double().numpy() * grid.scale.astype("float64")
            return {"weight": grid.codes, "weight_scale": torch.from_numpy(grid.scale.copy())}
        return compressed_tensors(grid, form, True)

    write_mixture(dense, tmp_path, layout, config, 8, 0, True, only_experts=True)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, optim_config="auto", dtype="float32")
    assert len(experts_of(model)) == 2

    def rounded(x):
        scale = x.abs().amax(-1, keepdim=True) / (127.5 if kind == "int" else 448)
        steps = x / scale
        return scale * (steps.round().clamp(-128, 127) if kind == "int" else steps.to(torch.float8_e4m3fn).to(x.dtype))

    def forward(self, hidden, index, weights):
        out = torch.zeros_like(hidden)
        for expert in range(self.num_experts):
            tokens, places = (index == expert).nonzero(as_tuple=True)
            inner = self._apply_gate(rounded(hidden[tokens]) @ self.gate_up_proj[expert].T)
            out.index_add_(0, tokens, rounded(inner) @ self.down_proj[expert].T * weights[tokens, places, None])
        return out

    wrong = logits(dense)
    for module in dense.modules():
        if type(module).__name__ == "MixtralExperts":
            module.forward = forward.__get__(module)
    a, b = logits(model), logits(dense)
    assert float((a - b).norm() / b.norm()) <= 1e-3 < float((wrong - b).norm() / b.norm())
    assert all(f"{kind}8 inputs" in row.kernel for row in hf_optim.report(model) if row.experts)


class LiveBytes(TorchDispatchMode):
    """The bytes of the storages that operations made and that still exist, at their highest."""

    def __init__(self):
        super().__init__()
        self.live = self.peak = 0
        self.known = weakref.WeakSet()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if not isinstance(tensor, torch.Tensor) or tensor.is_meta:
                continue
            storage = tensor.untyped_storage()
            if storage not in self.known:
                self.known.add(storage)
                self.live += storage.nbytes()
                weakref.finalize(storage, self._freed, storage.nbytes())
                self.peak = max(self.peak, self.live)
        return out

    def _freed(self, size):
        self.live -= size


@pytest.mark.filterwarnings("ignore::hf_optim.KernelWarning")
def test_there_is_never_a_dense_copy_of_all_experts(tmp_path):
    sizes = {**DECODER, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 1}
    config = transformers.MixtralConfig(**sizes, num_local_experts=24, num_experts_per_tok=2)
    dense = _build(transformers.MixtralForCausalLM, config, 0)
    layout, settings, *rest = LAYOUTS["int4"]
    write_mixture(dense, tmp_path, layout, settings, *rest)
    experts = sum(p.numel() * 2 for name, p in dense.named_parameters() if "experts" in name)
    others = sum(p.numel() * 2 for name, p in dense.named_parameters() if "experts" not in name)
    with LiveBytes() as live:
        model = AutoModelForCausalLM.from_pretrained(tmp_path, optim_config="auto", dtype="bfloat16")
        loading = live.peak
        live.peak = live.live
        logits(model)
        running = live.peak
    assert len(experts_of(model)) == 1
    # All experts take 2 bytes a weight; codes and scales a third of it, twice while they are packed.
    assert loading < others + experts * 0.9, (loading, others, experts)
    assert running < others + experts * 0.9, (running, others, experts)


@pytest.mark.filterwarnings("ignore::hf_optim.KernelWarning")
@pytest.mark.parametrize("name", ["int4", "gptq"])
def test_a_checkpoint_without_one_of_the_tensors_is_refused(name, written, tmp_path):
    folder, _ = written(name)
    state = load_file(folder / "model.safetensors")
    lost = next(key for key in sorted(state) if ".experts.2." in key and key.endswith(("weight_scale", "scales")))
    tmp_path.joinpath("config.json").write_text((folder / "config.json").read_text())
    del state[lost]
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"experts\.2"):
        AutoModelForCausalLM.from_pretrained(tmp_path, optim_config="auto")


def test_experts_of_another_shape_are_refused(written, tmp_path):
    folder, _ = written("int4")
    config = json.loads((folder / "config.json").read_text())
    tmp_path.joinpath("config.json").write_text(json.dumps(config | {"intermediate_size": 48}))
    save_file(load_file(folder / "model.safetensors"), tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"experts\.0\.w1.* is .* expected .* for a layer of 48 x 32"):
        AutoModelForCausalLM.from_pretrained(tmp_path, optim_config="auto")
