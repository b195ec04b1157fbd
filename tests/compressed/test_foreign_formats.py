"""``optim_config="auto"`` on the formats of AutoRound and GPTQModel, and on parts of compressed-tensors that few use.

Files are written from the formats' public facts (``reference_packers``), and compared with the weights that the codes
stand for; what is not read is refused by name.
"""

from __future__ import annotations

import json
import warnings

import numpy as np
import pytest
import torch
import transformers
from mixture_checkpoints import write_mixture
from naive_kernel import NAIVE
from reference_packers import Grid, awq, compressed_tensors, gptq, pack_bits, write
from safetensors.torch import load_file, save_file
from tiny_models import tiny_llama, tiny_mixtral, tiny_qwen2
from torch import nn
from transformers import AutoModelForCausalLM

import hf_optim
from hf_optim.compressed.packed.layouts import GPTQLayout
from hf_optim.compressed.packed.packed_experts import PackedExperts
from hf_optim.compressed.packed.packed_linear import KernelWarning, PackedLinear
from hf_optim.errors import CheckpointError, ModelError, OptimError
from hf_optim.toolkit.compat import VERSION

TOKENS = torch.arange(5, 17)[None]
AUTO_ROUND = {"quant_method": "auto-round", "bits": 4, "group_size": 32, "sym": True, "data_type": "int"}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": False}
LESS_ONE, RAW, AWQ = "auto_round:auto_gptq", "auto_round", "auto_round:auto_awq"


@pytest.fixture(autouse=True)
def served(monkeypatch):
    """The naive kernel of the tests is installed, which supports every linear layer."""
    monkeypatch.setattr("hf_optim.compressed.packed.accelerate.installed_kernels", lambda: (NAIVE,))


def build(folder, layout, config, widths=lambda name: (4, 32), symmetric=True, model=None, skip=("lm_head",)):
    """Write a random model in a layout; return it with the weights of its codes. ``widths``: name -> bits, group."""
    rng = np.random.default_rng(7)
    dense = model or tiny_llama(hidden_size=64, intermediate_size=96)
    layers = {}
    for name, module in dense.named_modules():
        if isinstance(module, nn.Linear) and name not in skip and widths(name) is not None:
            grid = Grid(rng, module.out_features, module.in_features, *widths(name), symmetric)
            layers[name] = layout(grid)
            with torch.no_grad():
                module.weight.copy_(torch.from_numpy(grid.dense))
    write(dense, folder, layers, config)
    return dense.eval()


def load(folder):
    with warnings.catch_warnings():
        warnings.simplefilter("error", KernelWarning)
        return AutoModelForCausalLM.from_pretrained(folder, optim_config="auto", dtype=torch.float32)


def packed(model):
    return sum(isinstance(module, PackedLinear) for module in model.modules())


@torch.no_grad()
def close(model, dense):
    a, b = model(TOKENS).logits.double(), dense.double()(TOKENS).logits
    return float((a - b).norm() / b.norm()) <= 1e-5


def partial(grid, size):
    """Merge neighbouring groups of a grid into groups of ``size``, of which the last is smaller."""
    per = size // grid.size
    grid.scale, grid.zero = grid.scale[:, ::per], grid.zero[:, ::per]
    grid.g_idx = np.arange(grid.columns) // size
    grid.dense = (grid.codes - grid.zero[:, grid.g_idx]) * grid.scale.astype(np.float64)[:, grid.g_idx]
    return grid


# -- AutoRound --------------------------------------------------------------------------------------------------------
AUTO_ROUND_CASES = {
    "4 bits": (LESS_ONE, 4, 32, True),
    "4 bits, zero points": (LESS_ONE, 4, 32, False),
    "3 bits, zero points as they are": (RAW, 3, 32, False),
    "2 bits, one group": (RAW, 2, None, False),
    "5 bits": (RAW, 5, 32, True),
    "8 bits": ("auto_round:gptqmodel", 8, 32, True),
    "AWQ's layout": (AWQ, 4, 32, False),
    "an old name": ("autoround:exllamav2", 4, 32, False),
}


@pytest.mark.parametrize("case", AUTO_ROUND_CASES)
def test_auto_round_layouts(case, tmp_path):
    packing, bits, size, symmetric = AUTO_ROUND_CASES[case]
    config = {**AUTO_ROUND, "bits": bits, "group_size": size or -1, "packing_format": packing, "sym": symmetric}

    def layout(grid):
        parts = awq(grid) if packing == AWQ else gptq(grid, less_one=packing == LESS_ONE)
        return {key: value for key, value in parts.items() if key != "g_idx"}

    dense = build(tmp_path / "a", layout, config, lambda name: (bits, size), symmetric)
    model = load(tmp_path / "a")
    assert packed(model) == 14
    assert close(model, dense)
    model.save_pretrained(tmp_path / "b")  # as compressed-tensors, which stock transformers reads
    assert close(AutoModelForCausalLM.from_pretrained(tmp_path / "b", dtype=torch.float32), dense)


def test_auto_round_mixes_widths_by_name_and_by_pattern(tmp_path):
    named = "model.layers.1.self_attn.v_proj"
    extra = {
        ".*down_proj.*": {"bits": 8, "group_size": -1},
        named: {"bits": 2, "group_size": 16},
        ".*v_proj.*": {"bits": 3},  # the name goes first
        "model.layers.0.mlp.up_proj": {"bits": 16},
        "lm_head": {"bits": 8},
    }

    def widths(name):
        if "up_proj" in name and ".0." in name:
            return None
        if "down_proj" in name:
            return 8, None
        if name == "lm_head":
            return 8, 32
        return (2, 16) if name == named else (3, 32) if "v_proj" in name else (4, 32)

    config = {**AUTO_ROUND, "packing_format": LESS_ONE, "extra_config": extra}
    dense = build(tmp_path, gptq, config, widths, skip=())
    model = load(tmp_path)
    assert packed(model) == 14  # 13 of the blocks, and the head
    assert model.get_submodule(named).packing.description.bits == 2
    assert close(model, dense)


def test_a_last_group_may_be_smaller(tmp_path):
    """96 columns in groups of 64: 64 and 32."""
    config = {**AUTO_ROUND, "group_size": 64, "packing_format": LESS_ONE}

    def layout(grid):
        parts = gptq(partial(grid, 64))
        return {key: value for key, value in parts.items() if key != "g_idx"}

    dense = build(tmp_path, layout, config)
    model = load(tmp_path)
    down = model.model.layers[0].mlp.down_proj
    assert (down.packing.description.group_size, down.packing.description.shape) == (32, (64, 96))
    assert close(model, dense)


def test_biases_are_kept(tmp_path):
    model = tiny_qwen2(hidden_size=64, intermediate_size=96, tie_word_embeddings=False)
    dense = build(tmp_path, gptq, {**AUTO_ROUND, "packing_format": LESS_ONE}, model=model)
    assert dense.model.layers[0].self_attn.q_proj.bias is not None
    assert close(load(tmp_path), dense)


def float8(static):
    def layout(grid):
        values = torch.from_numpy(grid.codes - 8.0).float().to(torch.float8_e4m3fn)
        scale = torch.from_numpy(grid.scale[:, 0].astype(np.float32))
        grid.dense = values.double().numpy() * scale.double().numpy()[:, None]
        return {"weight": values, "weight_scale": scale, **({"input_scale": torch.tensor([0.05])} if static else {})}

    return layout


FLOAT8 = {**AUTO_ROUND, "bits": 8, "data_type": "fp", "group_size": -1}
STATIC = {"act_bits": 8, "act_data_type": "fp", "act_dynamic": False, "act_group_size": 0}


@pytest.mark.parametrize("static", [False, True])
def test_auto_round_float8(static, tmp_path):
    config = {**FLOAT8, **(STATIC if static else {})}
    dense = build(tmp_path, float8(static), config, lambda name: (4, None))
    model = load(tmp_path)
    up = model.model.layers[0].mlp.up_proj
    assert packed(model) == 14
    assert torch.equal(up.weight, dense.model.layers[0].mlp.up_proj.weight)
    assert (up.packing.description.inputs is not None) == static
    if static:
        assert float(up.input_scale) == float(torch.tensor(0.05))
    else:
        assert close(model, dense)


def test_experts_under_auto_rounds_names(tmp_path, monkeypatch):
    """It writes gate_proj, up_proj and down_proj where Mixtral's own checkpoints have w1, w3 and w2."""
    monkeypatch.undo()
    model = tiny_mixtral(intermediate_size=64)
    config = {**AUTO_ROUND, "group_size": 16, "packing_format": LESS_ONE}
    write_mixture(model, tmp_path, gptq, config, 4, 16, True, False)
    state = load_file(tmp_path / "model.safetensors")
    usual = {".w1.": ".gate_proj.", ".w3.": ".up_proj.", ".w2.": ".down_proj."}
    renamed = {}
    for key, value in state.items():
        for own, other in usual.items():
            key = key.replace(own, other)
        renamed[key] = value
    assert renamed.keys() != state.keys()
    save_file(renamed, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", KernelWarning)
        found = AutoModelForCausalLM.from_pretrained(tmp_path, optim_config="auto", dtype=torch.float32)
    assert sum(isinstance(module, PackedExperts) for module in found.modules()) == 2
    exact = model.eval().double()
    exact.set_experts_implementation("eager")
    with torch.no_grad():
        a, b = found(TOKENS).logits.double(), exact(TOKENS).logits
    assert float((a - b).norm() / b.norm()) <= 1e-5


# -- GPTQModel --------------------------------------------------------------------------------------------------------
def test_dynamic_takes_the_first_pattern_from_the_beginning_of_a_name(tmp_path):
    dynamic = {
        r"-:.*\.1\.mlp\.up_proj": {},
        r"+:.*down_proj": {"bits": 8, "group_size": -1},
        r".*\.(?:q|k)_proj": {"bits": 3},
        r"v_proj": {"bits": 2},  # not at the beginning
        r"model\.layers": {"group_size": 16},
    }

    def widths(name):
        if name == "model.layers.1.mlp.up_proj":
            return None
        if "down_proj" in name:
            return 8, None
        return (3, 32) if name.endswith(("q_proj", "k_proj")) else (4, 16)

    dense = build(tmp_path, gptq, {**GPTQ, "dynamic": dynamic}, widths)
    model = load(tmp_path)
    assert packed(model) == 13
    assert close(model, dense)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_gptqmodel_subtracts_one_from_whole_words(bits, tmp_path):
    """A zero point of 0 then borrows from its neighbour."""
    ones = sum(1 << bit for bit in range(0, 32, bits))

    def layout(grid):
        grid.zero[:, 0] = np.arange(len(grid.zero)) % 3  # zeros among them
        grid.dense = (grid.codes - grid.zero[:, grid.g_idx]) * grid.scale.astype(np.float64)[:, grid.g_idx]
        words = pack_bits(grid.zero.T.copy(), bits).numpy().view(np.uint32) - np.uint32(ones)
        return {**gptq(grid), "qzeros": torch.from_numpy(words.view(np.int32).copy())}

    meta = {"meta": {"quantizer": ["gptqmodel:7.7.0"]}}
    dense = build(tmp_path, layout, {**GPTQ, "bits": bits, **meta}, lambda name: (bits, 32), symmetric=False)
    assert close(load(tmp_path), dense)
    spec = GPTQLayout(bits, 32, "codes")  # what the same words are without that
    key = "model.layers.0.mlp.up_proj"
    tensors = {k: v for k, v in load_file(tmp_path / "model.safetensors").items() if k.startswith(key)}
    local = {k.rpartition(".")[2]: v for k, v in tensors.items()}
    codes, _ = spec.read(local, (96, 64))
    exact, _ = GPTQLayout(bits, 32, "words").read(local, (96, 64))
    assert codes.zero is not None
    assert exact.zero is not None
    assert not torch.equal(codes.zero, exact.zero)


# -- compressed-tensors -----------------------------------------------------------------------------------------------
def ct(bits=4, size=32, inputs=None, targets=("Linear",), form="pack-quantized", **more):
    weights = {"num_bits": bits, "type": "int", "symmetric": True}
    weights |= {"strategy": "group", "group_size": size} if size else {"strategy": "channel"}
    group = {"targets": list(targets), "weights": weights, "input_activations": inputs, "format": form}
    return {
        "quant_method": "compressed-tensors", "config_groups": {"group_0": group}, "format": form,
        "quantization_status": "compressed", "ignore": ["lm_head"], **more,
    }  # fmt: skip


def symmetric(form="pack-quantized"):
    return lambda grid: compressed_tensors(grid, form, True)


KV = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "tensor", "dynamic": False}


def add_scales(folder):
    state = load_file(folder / "model.safetensors")
    state |= {f"model.layers.{i}.self_attn.{each}_scale": torch.tensor([0.1]) for i in range(2) for each in "kv"}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(("kind", "shown"), [("int", "int8"), ("float", "float8")])
def test_scales_of_keys_and_values_are_left_out_with_a_warning(kind, shown, tmp_path):
    dense = build(tmp_path, symmetric(), ct(kv_cache_scheme={**KV, "type": kind}))
    add_scales(tmp_path)
    message = rf"keys and values stay in full precision: .* kv_cache_scheme \({shown}, .*KeyValueScheme\(bits=8\)"
    with pytest.warns(KernelWarning, match=message):
        model = AutoModelForCausalLM.from_pretrained(tmp_path, optim_config="auto", dtype=torch.float32)
    assert packed(model) == 14
    assert close(model, dense)
    report = hf_optim.report(model)
    assert report.summary.endswith(f"keys and values in full precision (kv_cache_scheme {shown} not applied)")
    assert report.to_json()["cache"] == shown
    model.save_pretrained(tmp_path / "saved")
    assert "not applied" not in hf_optim.report(AutoModelForCausalLM.from_pretrained(tmp_path / "saved")).summary


def test_a_checkpoint_with_nothing_but_scales_of_keys_and_values(tmp_path):
    dense = build(tmp_path, symmetric(), {**ct(kv_cache_scheme=KV), "config_groups": {}}, lambda name: None)
    add_scales(tmp_path)
    if VERSION >= (5, 24):  # whose attention compressed-tensors does not find, so that nothing applies the scales
        with pytest.warns(KernelWarning, match="keys and values stay in full precision"):
            model = AutoModelForCausalLM.from_pretrained(tmp_path, optim_config="auto", dtype=torch.float32)
        assert close(model, dense)
        return
    model = AutoModelForCausalLM.from_pretrained(tmp_path, optim_config="auto", dtype=torch.float32)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert [layer.self_attn.k_scale.tolist() for layer in model.model.layers] == [pytest.approx([0.1])] * 2
    with torch.no_grad():
        assert torch.equal(model(TOKENS).logits, stock(TOKENS).logits)
        assert not close(model, dense)  # keys and values are rounded


def test_a_packed_embedding_is_decoded(tmp_path):
    model = tiny_llama(hidden_size=64, intermediate_size=96)
    folder = tmp_path / "a"
    config = ct(8, None, targets=("Linear", "Embedding"))
    dense = build(folder, symmetric(), config, lambda name: (8, None), model=model)
    grid = Grid(np.random.default_rng(1), *dense.model.embed_tokens.weight.shape, 8, None, True)
    state = load_file(folder / "model.safetensors")
    del state["model.embed_tokens.weight"]
    state |= {f"model.embed_tokens.{key}": value for key, value in symmetric()(grid).items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with torch.no_grad():
        dense.model.embed_tokens.weight.copy_(torch.from_numpy(grid.dense))
    with pytest.warns(KernelWarning, match=r"model\.embed_tokens \(an embedding is read row by row\)"):
        found = AutoModelForCausalLM.from_pretrained(folder, optim_config="auto", dtype=torch.float32)
    assert close(found, dense)
    found.save_pretrained(tmp_path / "b")
    assert close(AutoModelForCausalLM.from_pretrained(tmp_path / "b", dtype=torch.float32), dense)
    text = json.loads((folder / "config.json").read_text()) | {"tie_word_embeddings": True}
    (folder / "config.json").write_text(json.dumps(text))
    with pytest.raises(OptimError, match="the head is tied to it"):
        AutoModelForCausalLM.from_pretrained(folder, optim_config="auto", dtype=torch.float32)


def test_rotations_of_weights_are_in_the_weights_already(tmp_path):
    offline = {
        "config_groups": {"R1": {"type": "hadamard", "apply": [{"targets": ["Linear"], "location": "weight_input"}]}}
    }
    dense = build(tmp_path, symmetric(), ct(transform_config=offline))
    assert close(load(tmp_path), dense)


# -- refused by name --------------------------------------------------------------------------------------------------
ONLINE = {"config_groups": {"R4": {"type": "hadamard", "apply": [{"targets": ["Linear"], "location": "input"}]}}}
GROUPED = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "group", "group_size": 128, "dynamic": True}
REFUSED = {
    "online rotations": (ct(transform_config=ONLINE), r"rotates activations while the model runs \(R4: input\)"),
    "sparse": (ct(sparsity_config={"format": "sparse-24-bitmask"}), "'sparse-24-bitmask': save it uncompressed"),
    "marlin": ({**GPTQ, "checkpoint_format": "marlin"}, "checkpoint_format 'marlin': only gptq and gptq_v2 are read"),
    "old marlin": ({**GPTQ, "is_marlin_format": True}, "convert it to gptq_v2"),
    "planes": ({**GPTQ, "bits": 5}, "GPTQ with bits 5: 2, 3, 4, 8 are read"),
    "words of 16 bits": ({**GPTQ, "pack_dtype": "int16"}, "GPTQ with pack_dtype 'int16'"),
    "an adapter": ({**GPTQ, "adapter": {"name": "lora", "rank": 8}}, "GPTQ with adapter"),
    "mixed formats": ({**GPTQ, "dynamic": {".*up_proj": {"format": "marlin"}}}, "dynamic changes format"),
    "gemv": ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "AWQ with version 'gemv': only gemm is read"),
    "AWQ of 3 bits": ({"quant_method": "awq", "bits": 3}, "AWQ with bits 3: 4 are read"),
    "fake": ({**AUTO_ROUND, "packing_format": "auto_round:fake"}, "export it in one of these, or for llm_compressor"),
    "float4": ({**AUTO_ROUND, "data_type": "mx_fp", "packing_format": "auto_round:llm_compressor"}, "llm_compressor'"),
    "MXINT4": ({**AUTO_ROUND, "data_type": "mx_int", "packing_format": RAW}, "data_type 'mx_int'"),
    "inputs": ({**AUTO_ROUND, "act_bits": 8, "packing_format": RAW}, "act_bits 8"),
    "rotated": ({**AUTO_ROUND, "packing_format": RAW, "rotation_config": {"a": 1}}, "a rotation_config"),
    "blocks": ({**FLOAT8, "weight_block_size": [128, 128]}, "float8 weights in blocks: export it for llm_compressor"),
    "float8 inputs": ({**FLOAT8, **STATIC, "act_bits": 4}, "inputs of 4 bits"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("case", REFUSED)
def test_refused_by_name(case, tmp_path):
    config, message = REFUSED[case]
    layout = symmetric() if config["quant_method"] == "compressed-tensors" else gptq
    build(tmp_path, layout, config)
    if case == "sparse":
        state = load_file(tmp_path / "model.safetensors")
        state = {key.replace("weight_packed", "bitmask"): value for key, value in state.items()}
        save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(OptimError, match=message):
        AutoModelForCausalLM.from_pretrained(tmp_path, optim_config="auto", dtype=torch.float32)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("config", [GPTQ, {**AUTO_ROUND, "packing_format": LESS_ONE}], ids=["gptq", "auto-round"])
def test_experts_with_biases_are_refused_by_name(config, tmp_path, monkeypatch):
    monkeypatch.undo()
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
    kinds = {"layer_types": ["full_attention"], "num_hidden_layers": 1, "head_dim": 16, "vocab_size": 64}
    own = transformers.GptOssConfig(**sizes, **kinds, num_local_experts=2, num_experts_per_tok=1)
    model = transformers.GptOssForCausalLM(own)
    model.save_pretrained(tmp_path)
    state = {key: value for key, value in model.state_dict().items() if ".experts." not in key}
    for name, rows in (("gate_up_proj", 64), ("down_proj", 32)):
        for expert in range(2):
            grid = Grid(np.random.default_rng(expert), rows, 32, 4, 32, True)
            state |= {f"model.layers.0.mlp.experts.{expert}.{name}.{key}": value for key, value in gptq(grid).items()}
    save_file(
        {key: value.contiguous() for key, value in state.items()},
        tmp_path / "model.safetensors",
        metadata={"format": "pt"},
    )
    text = json.loads((tmp_path / "config.json").read_text()) | {"quantization_config": config}
    (tmp_path / "config.json").write_text(json.dumps(text))
    with pytest.raises(
        OptimError, match=r"the experts of model\.layers\.0\.mlp\.experts have biases.*dense checkpoint"
    ):
        AutoModelForCausalLM.from_pretrained(tmp_path, optim_config="auto", dtype=torch.float32)


def test_an_unknown_override_of_one_layer_names_the_layer(tmp_path):
    extra = {"model.layers.1.mlp.up_proj": {"data_type": "mx_fp"}}
    build(tmp_path, gptq, {**AUTO_ROUND, "packing_format": LESS_ONE, "extra_config": extra})
    with pytest.raises(OptimError, match=r"data_type 'mx_fp' \(layer model\.layers\.1\.mlp\.up_proj\)"):
        AutoModelForCausalLM.from_pretrained(tmp_path, optim_config="auto", dtype=torch.float32)


def test_a_configuration_that_its_tensors_contradict(tmp_path):
    config = {**AUTO_ROUND, "packing_format": LESS_ONE, "extra_config": {".*q_proj": {"bits": 8}}}
    build(tmp_path, gptq, config)
    with pytest.raises(CheckpointError, match=r"q_proj\.qweight is I32 .* expected"):
        AutoModelForCausalLM.from_pretrained(tmp_path, optim_config="auto", dtype=torch.float32)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_inputs_in_groups_that_do_not_divide_are_refused_at_load(tmp_path):
    form = "float-quantized"
    config = ct(inputs=GROUPED, form=form)
    weights = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "block", "block_structure": [128, 128]}
    config["config_groups"]["group_0"]["weights"] = weights

    def layout(grid):
        scale = torch.ones(-(-grid.codes.shape[0] // 128), -(-grid.codes.shape[1] // 128))
        return {"weight": torch.from_numpy(grid.codes).float().to(torch.float8_e4m3fn), "weight_scale": scale}

    build(tmp_path, layout, config)
    with pytest.raises(ModelError, match="quantized in groups of 128, and 64 columns are not a multiple"):
        AutoModelForCausalLM.from_pretrained(tmp_path, optim_config="auto", dtype=torch.float32)
