"""Every door gives each tensor of the model its values from the checkpoint, or refuses it and names the tensors."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import tiny_llama
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaForCausalLM

import hf_optim
from hf_optim.checkpoints import meta_model
from hf_optim.checkpoints.source import ModelSource, load_model
from hf_optim.errors import CheckpointError
from hf_optim.toolkit.distillation import teachers

W4 = [{"technique": "rtn", "bits": 4, "group_size": 16}]
W8A8 = [{"technique": "rtn", "bits": 8, "activations": "int8"}]
FP8 = [{"technique": "rtn", "bits": 8, "format": "fp8"}]
TOKENS = torch.arange(5, 17)[None]
Q = "model.layers.1.self_attn.q_proj"

DOORS = {
    "auto": lambda home: AutoModelForCausalLM.from_pretrained(home, optim_config="auto"),
    "recipe": lambda home: AutoModelForCausalLM.from_pretrained(home, optim_config=W4),
    "command": lambda home: load_model(ModelSource(str(home))),
    "teacher": lambda home: teachers.load(str(home), "step 1"),
    "streamed": lambda home: meta_model.build(ModelSource(str(home))),
}
QUANTIZED = {name: DOORS[name] for name in ("auto", "command", "teacher")}


@pytest.fixture(scope="module")
def homes(tmp_path_factory):
    """The same model: dense, and in three compressed formats."""
    folder = tmp_path_factory.mktemp("homes")
    tiny_llama().save_pretrained(folder / "dense")
    for name, recipe in {"w4": W4, "w8a8": W8A8, "fp8": FP8}.items():
        hf_optim.optimize(tiny_llama(), recipe, calibration=[{"input_ids": TOKENS}]).save_pretrained(folder / name)
    return folder


@pytest.fixture
def broken(homes, tmp_path):
    """Return a function that copies a checkpoint, and changes its tensors or its configuration."""

    def change(name, tensors=None, config=None):
        home = shutil.copytree(homes / name, tmp_path / name)
        if tensors is not None:
            state = load_file(home / "model.safetensors")
            tensors(state)
            save_file({k: t.contiguous() for k, t in state.items()}, home / "model.safetensors", {"format": "pt"})
        if config is not None:
            content = json.loads((home / "config.json").read_text())
            config(content)
            (home / "config.json").write_text(json.dumps(content))
        return home

    return change


def rename(old, new):
    return lambda state: state.update({new: state.pop(old)})


DENSE = {
    "renamed": (rename(f"{Q}.weight", "model.layers.1.self_attn.query.weight"), None, r"q_proj"),
    "transposed": (
        lambda s: s.update({"model.layers.1.mlp.up_proj.weight": s["model.layers.1.mlp.up_proj.weight"].T}),
        None,
        r"up_proj\.weight is \[",
    ),
    "no embedding": (lambda s: s.pop("model.embed_tokens.weight"), None, r"embed_tokens"),
    "no norm": (lambda s: s.pop("model.norm.weight"), None, r"model\.norm"),
    "no head": (lambda s: s.pop("lm_head.weight"), None, r"lm_head"),
    "extra bias": (lambda s: s.update({f"{Q}.bias": torch.ones(64)}), None, r"q_proj\.bias"),
    "fewer layers": (None, lambda c: c.update(num_hidden_layers=1), r"layers\.1\."),
    "more layers": (None, lambda c: c.update(num_hidden_layers=3), r"layers\.2\."),
    "int8 weight": (lambda s: s.update({f"{Q}.weight": s[f"{Q}.weight"].to(torch.int8)}), None, r"q_proj\.weight .*I8"),
    "int64 norm": (
        lambda s: s.update({"model.norm.weight": s["model.norm.weight"].long()}),
        None,
        r"model\.norm\.weight .*I64",
    ),
    "fp8 weight": (
        lambda s: s.update({f"{Q}.weight": s[f"{Q}.weight"].to(torch.float8_e4m3fn)}),
        None,
        r"q_proj\.weight .*F8_E4M3",
    ),
}
# The streamed driver itself refuses a missing head (``preflight.check_shards``), and so does its test.
CASES = [(case, door) for case in DENSE for door in DOORS if (case, door) != ("no head", "streamed")]


@pytest.mark.many
@pytest.mark.parametrize(("case", "door"), CASES)
def test_weights_of_another_model_are_refused_at_every_door(case, door, broken):
    tensors, config, message = DENSE[case]
    with pytest.raises(CheckpointError, match=message):
        DOORS[door](broken("dense", tensors, config))


UP = "model.layers.0.mlp.up_proj"
CODES = {
    "w4: no codes": ("w4", lambda s: s.pop(f"{UP}.weight_packed"), None, r"up_proj"),
    "w4: no scale": ("w4", lambda s: s.pop(f"{UP}.weight_scale"), None, r"up_proj\.weight_scale"),
    "w4: float codes": (
        "w4",
        lambda s: s.update({f"{UP}.weight_packed": s[f"{UP}.weight_packed"].float()}),
        None,
        r"weight_packed is stored as F32",
    ),
    "w4: renamed layer": (
        "w4",
        lambda s: [rename(f"{UP}.{k}", f"model.layers.0.mlp.upward.{k}")(s) for k in ("weight_packed", "weight_scale")],
        None,
        r"up",
    ),
    "w8: float codes": (
        "w8a8",
        lambda s: s.update({f"{UP}.weight": s[f"{UP}.weight"].float()}),
        None,
        r"up_proj\.weight is stored as F32",
    ),
    "w8: no scale": ("w8a8", lambda s: s.pop(f"{UP}.weight_scale"), None, r"up_proj\.weight_scale"),
    "fp8: no scale": ("fp8", lambda s: s.pop(f"{UP}.weight_scale"), None, r"up_proj\.weight_scale"),
    "unknown method": ("w4", None, lambda c: c["quantization_config"].update(quant_method="x"), r"quant_method 'x'"),
    "no groups": ("w4", None, lambda c: c["quantization_config"].update(config_groups={}), r"config_groups"),
    "w8: no configuration": ("w8a8", None, lambda c: c.pop("quantization_config"), r"quantization_config"),
    "w4: no configuration": ("w4", None, lambda c: c.pop("quantization_config"), r"quantization_config"),
    "fp8: no configuration": ("fp8", None, lambda c: c.pop("quantization_config"), r"quantization_config"),
    "w4: no norm": ("w4", lambda s: s.pop("model.norm.weight"), None, r"model\.norm"),
    "w4: integer norm": (
        "w4",
        lambda s: s.update({"model.norm.weight": s["model.norm.weight"].to(torch.int8)}),
        None,
        r"model\.norm",
    ),
}


@pytest.mark.parametrize("door", QUANTIZED)
@pytest.mark.parametrize("case", CODES)
def test_codes_that_do_not_fit_are_refused(case, door, broken):
    name, tensors, config, message = CODES[case]
    with pytest.raises(CheckpointError, match=message):
        QUANTIZED[door](broken(name, tensors, config))


@pytest.mark.parametrize("case", ["w8: no configuration", "w4: no configuration", "fp8: no configuration"])
@pytest.mark.parametrize("door", ["recipe", "streamed"])
def test_codes_are_not_compressed_again_as_weights(case, door, broken):
    name, _, config, message = CODES[case]
    with pytest.raises(CheckpointError, match=message):
        DOORS[door](broken(name, None, config))


# -- what is allowed --------------------------------------------------------------------------------------------------
@torch.no_grad()
def logits(model):
    return model.eval()(TOKENS)[0].float()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_floats_of_any_width_are_loaded(dtype, broken):
    home = broken("dense", lambda s: s.update({k: t.to(dtype) for k, t in s.items()}))
    model = AutoModelForCausalLM.from_pretrained(home, optim_config=W4, dtype=torch.float32)
    assert model.lm_head.weight.dtype == torch.float32


@pytest.mark.parametrize("name", ["dense", "w4"])
@pytest.mark.parametrize("stored", ["without prefix", "base model"])
def test_the_prefix_of_the_base_model_may_be_absent(name, stored, homes, broken):
    def strip(state):
        for key in [key for key in state if key.startswith("model.")]:
            state[key.removeprefix("model.")] = state.pop(key)

    home = broken(name, strip)
    if stored == "base model":
        model, reference = (AutoModel.from_pretrained(h, optim_config="auto") for h in (home, homes / name))
    else:
        model, reference = (DOORS["auto"](h) for h in (home, homes / name))
    assert torch.equal(logits(model), logits(reference))


def test_a_headless_model_leaves_out_the_head(homes):
    model, info = AutoModel.from_pretrained(homes / "w4", optim_config="auto", output_loading_info=True)
    assert info["unexpected_keys"] == {"lm_head.weight"}
    assert not info["missing_keys"]
    assert sum(bool(row.kernel) for row in hf_optim.report(model)) == 14


def test_tied_weights_may_be_stored_under_either_name(broken):
    def swap(state):
        del state["model.embed_tokens.weight"]

    home = broken("dense", swap, lambda c: c.update(tie_word_embeddings=True))
    model = DOORS["recipe"](home)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    home = broken("w4", lambda s: [s.pop("lm_head.weight"), swap(s)], lambda c: c.update(tie_word_embeddings=True))
    with pytest.raises(CheckpointError, match="embed_tokens"):
        DOORS["auto"](home)


def test_a_new_classification_head_is_named_in_a_warning(homes, caplog):
    AutoModelForSequenceClassification.from_pretrained(homes / "dense", optim_config=W4)
    assert any("score.weight" in record.getMessage() for record in caplog.records if record.name.startswith("hf_optim"))
    with pytest.raises(CheckpointError, match=r"score\.weight"):
        AutoModelForSequenceClassification.from_pretrained(homes / "w4", optim_config="auto")


def test_ignore_mismatched_sizes_applies_to_heads_alone(homes, broken):
    kwargs = {"optim_config": W4, "ignore_mismatched_sizes": True}
    AutoModelForCausalLM.from_pretrained(
        broken("dense", lambda s: s.update({"lm_head.weight": torch.ones(7, 64)})), **kwargs
    )
    bad = homes.parent / "bad"
    shutil.copytree(homes / "dense", bad)
    state = load_file(bad / "model.safetensors")
    state[f"{UP}.weight"] = state[f"{UP}.weight"][:-1].contiguous()
    save_file(state, bad / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"up_proj\.weight is \["):
        AutoModelForCausalLM.from_pretrained(bad, **kwargs)


def test_fewer_layers_on_request_are_allowed(homes):
    model = AutoModelForCausalLM.from_pretrained(homes / "dense", optim_config=W4, num_hidden_layers=1)
    assert len(model.model.layers) == 1
    packed = AutoModelForCausalLM.from_pretrained(homes / "w4", optim_config="auto", num_hidden_layers=1)
    assert len(packed.model.layers) == 1


@pytest.mark.parametrize("name", ["dense", "w4"])
def test_renamings_of_the_caller(name, homes, broken):
    home = broken(name, lambda s: [rename(k, k.replace("self_attn", "attention"))(s) for k in list(s)])
    model = AutoModelForCausalLM.from_pretrained(home, optim_config="auto", key_mapping={"attention": "self_attn"})
    assert torch.equal(logits(model), logits(DOORS["auto"](homes / name)))
    if name == "w4":
        assert sum(bool(row.kernel) for row in hf_optim.report(model)) == 14
    with pytest.raises(CheckpointError):
        DOORS["auto"](home)


@pytest.mark.filterwarnings("ignore::hf_optim.compressed.packed.packed_linear.KernelWarning")
def test_subfolder_variant_dtype_and_device_map(homes, tmp_path):
    shutil.copytree(homes / "w4", tmp_path / "repo" / "inner")
    inner = tmp_path / "repo" / "inner"
    (inner / "model.safetensors").rename(inner / "model.fp16.safetensors")
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "repo",
        subfolder="inner",
        variant="fp16",
        device_map="cpu",
        torch_dtype=torch.bfloat16,
        optim_config="auto",
    )
    assert model.dtype == torch.bfloat16
    assert sum(bool(row.kernel) for row in hf_optim.report(model)) >= 0
    want = LlamaForCausalLM.from_pretrained(homes / "w4", dtype=torch.bfloat16)
    assert (logits(model) - logits(want)).norm() < 0.02 * logits(want).norm()


@pytest.mark.parametrize("config", ["auto", "recipe"])
def test_weights_in_memory(config, homes):
    dense = LlamaForCausalLM.from_pretrained(homes / "dense")
    state, optim = dense.state_dict(), "auto" if config == "auto" else W4
    model = LlamaForCausalLM.from_pretrained(None, config=dense.config, state_dict=state, optim_config=optim)
    assert (logits(model) - logits(dense)).norm() < 0.5 * logits(dense).norm()
    state = {key: value for key, value in state.items() if "layers.1.mlp.up_proj" not in key}
    with pytest.raises(CheckpointError, match="up_proj"):
        LlamaForCausalLM.from_pretrained(None, config=dense.config, state_dict=state, optim_config=optim)
    codes = dense.state_dict()
    codes[f"{UP}.weight"] = codes[f"{UP}.weight"].to(torch.int8)
    with pytest.raises(CheckpointError, match="stored as I8"):
        LlamaForCausalLM.from_pretrained(None, config=dense.config, state_dict=codes, optim_config=optim)


# -- the configuration ------------------------------------------------------------------------------------------------
def test_a_configuration_object_of_the_caller_stays_as_it_is(homes):
    config = tiny_llama().config
    before = config.to_dict()
    first = hf_optim.optimize(LlamaForCausalLM(config), W4)
    second = hf_optim.optimize(LlamaForCausalLM(config), W8A8, calibration=[{"input_ids": TOKENS}])
    third = LlamaForCausalLM.from_pretrained(homes / "dense", config=config, optim_config=W4)
    assert config.to_dict() == before
    assert not hasattr(config, "quantization_config")
    assert len({id(config), id(first.config), id(second.config), id(third.config)}) == 4
    for model in (first, second):
        assert {id(m.config) for m in model.modules() if hasattr(m, "config")} == {id(model.config)}
