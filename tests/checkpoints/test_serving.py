"""What vLLM, SGLang and TGI read: verdicts on the checkpoints of every format, and on what cannot be judged."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file, save_file
from tiny_models import tiny_llama, tiny_mixtral
from transformers import AutoModelForCausalLM

from hf_optim import OptimError
from hf_optim.checkpoints.serving import check_serving, serving_support
from hf_optim.checkpoints.serving_rules import SERVERS
from hf_optim.cli import main
from hf_optim.errors import CheckpointError

SHAPE = {
    "hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 2, "num_hidden_layers": 1, "dtype": "bfloat16"
}  # fmt: skip
RTN = {"technique": "rtn"}
# recipe -> whether vLLM, SGLang and TGI read what it writes, and a word of the reason or the note
CASES = {
    "w4": ([{**RTN, "bits": 4, "group_size": 32}], (True, True, True), ""),
    "w4 per channel": ([{**RTN, "bits": 4}], (True, True, True), ""),
    "w4 groups of 16": ([{**RTN, "bits": 4, "group_size": 16}], (True, False, False), "groups of 32, 64 or 128"),
    "w3": ([{**RTN, "bits": 3, "group_size": 32}], (True, False, False), "4 or 8 bits"),
    "w8": ([{**RTN, "bits": 8}], (True, True, True), ""),
    "zero points": ([{**RTN, "bits": 4, "group_size": 32, "symmetric": False}], (False,) * 3, "symmetric: true"),
    "w8a8": ("w8a8", (True, True, True), "per token"),
    "w4a8": ([{**RTN, "bits": 4, "activations": "int8"}], (True, False, False), "CPUs only"),
    "fp8": ("fp8", (True, True, True), "8.9"),
    "one of three left out": (
        [{**RTN, "bits": 4, "group_size": 32, "skip": ["lm_head", "*v_proj"]}],
        (False, False, False),
        "q_proj, k_proj, v_proj",
    ),
    "pruned": ("magnitude50", (True, True, True), ""),
    "own code": ("w3-gobo", (False, False, False), "needs the code"),
}  # fmt: skip


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    home = tmp_path_factory.mktemp("dense") / "llama"
    tiny_llama(**SHAPE).to(torch.bfloat16).save_pretrained(home)
    return home


def written(dense, home, recipe):
    AutoModelForCausalLM.from_pretrained(dense, optim_config=recipe).save_pretrained(home)
    return home


@pytest.fixture(scope="module")
def w4(dense, tmp_path_factory):
    return written(dense, tmp_path_factory.mktemp("w4") / "llama", CASES["w4"][0])


@pytest.fixture
def mine(w4, tmp_path):
    return shutil.copytree(w4, tmp_path / "model")


def read(home):
    return [verdict.reads for verdict in check_serving(home).verdicts]


def change(home, **fields):
    """Change fields of the only group's weights, or of the configuration, and return the folder."""
    path = home / "config.json"
    config = json.loads(path.read_text())
    stored = config["quantization_config"]
    weights = stored["config_groups"]["group_0"]["weights"]
    for name, value in fields.items():
        (weights if name in ("num_bits", "strategy", "group_size", "actorder") else stored)[name] = value
    path.write_text(json.dumps(config))
    return home


def rewritten(home, changes):
    path = home / "model.safetensors"
    tensors = load_file(path)
    save_file({key: tensor for key, tensor in changes(tensors).items() if tensor is not None}, path)
    return home


@pytest.mark.many
@pytest.mark.parametrize("name", CASES)
def test_the_formats_that_recipes_write(name, dense, tmp_path):
    recipe, expected, word = CASES[name]
    report = check_serving(written(dense, tmp_path / "model", recipe))
    assert tuple(verdict.reads for verdict in report.verdicts) == expected
    said = " ".join(line for verdict in report.verdicts for line in (*verdict.reasons, *verdict.notes))
    assert word in said
    assert bool(said) == bool(word)  # nothing else is said
    for verdict in report.verdicts:
        assert verdict.reads == (not verdict.reasons)


def test_an_expert_that_is_not_quantized_is_ignored_in_the_configuration(tmp_path):
    tiny_mixtral(**SHAPE).to(torch.bfloat16).save_pretrained(tmp_path / "moe")
    home = written(tmp_path / "moe", tmp_path / "fp8", "fp8")
    assert read(home)[:2] == [True, True]
    path = home / "config.json"
    config = json.loads(path.read_text())
    stored = config["quantization_config"]
    assert sum("experts" in pattern for pattern in stored["ignore"]) == 3
    stored["ignore"] = [pattern for pattern in stored["ignore"] if "experts" not in pattern]
    path.write_text(json.dumps(config))
    assert read(home)[:2] == [False, False]
    assert "experts.0.w1 (and 11 more) is stored dense" in check_serving(home).verdicts[0].reasons[0]
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "moe")
    back = AutoModelForCausalLM.from_pretrained(home)
    assert torch.equal(stock.model.layers[0].mlp.experts.down_proj, back.model.layers[0].mlp.experts.down_proj)


@pytest.mark.parametrize(
    ("name", "expected", "word"),
    [
        ("llmcompressor-mixed", (True, False, False), "352 inputs"),
        ("llmcompressor-w4a16_asym_g32", (True, False, False), "zero points"),
        ("llmcompressor-w8a8_smooth", (True, True, False), "actorder static"),
        ("llmcompressor-nvfp4a16", (True, True, False), "no scheme"),
        ("auto_gptq", (True, True, True), ""),
        ("auto_awq", (True, True, True), ""),
    ],
)
def test_checkpoints_of_other_tools(name, expected, word, shared_checkpoints):
    verdicts = check_serving(shared_checkpoints / name).verdicts
    assert tuple(verdict.reads for verdict in verdicts) == expected
    assert word in " ".join(reason for verdict in verdicts for reason in verdict.reasons)


def reasons(home):
    return [" ".join(verdict.reasons) for verdict in check_serving(home).verdicts]


def test_projections_with_different_bits_are_not_fused(mine):
    path = mine / "config.json"
    config = json.loads(path.read_text())
    groups = config["quantization_config"]["config_groups"]
    other = json.loads(json.dumps(groups["group_0"]))
    other["targets"] = ["re:.*gate_proj$"]
    other["weights"]["group_size"] = 64
    config["quantization_config"]["config_groups"] = {"group_1": other, **groups}
    path.write_text(json.dumps(config))
    assert all("gate_proj, up_proj" in reason for reason in reasons(mine))


def test_codes_of_another_packing_are_noticed(mine):
    """Three bits in ten codes a word, as compressed-tensors before 0.18 packed them."""
    change(mine, num_bits=3)
    vllm, *_ = reasons(mine)
    assert "has 16 words of codes a row, where 128 inputs of 3 bits take 12" in vllm


def test_a_layer_with_codes_that_no_target_names(mine):
    assert all("no target" in reason for reason in reasons(change(mine, ignore=["lm_head", "re:.*down_proj"])))


def test_a_dense_layer_that_the_configuration_takes_for_codes(mine):
    def decoded(tensors):
        name = "model.layers.0.mlp.down_proj"
        return {
            **{key: tensor for key, tensor in tensors.items() if not key.startswith(name)},
            f"{name}.weight": torch.zeros(128, 256, dtype=torch.bfloat16),
        }

    assert all("down_proj is stored dense" in reason for reason in reasons(rewritten(mine, decoded)))
    change(mine, ignore=["lm_head", "re:.*down_proj"])
    assert read(mine) == [True, True, True]


def test_an_output_head_is_quantized_by_its_name_only(mine):
    rewritten(
        mine,
        lambda tensors: {
            **tensors,
            "lm_head.weight": None,
            "lm_head.weight_packed": torch.zeros(64, 16, dtype=torch.int32),
            "lm_head.weight_scale": torch.ones(64, 4, dtype=torch.bfloat16),
            "lm_head.weight_shape": torch.tensor([64, 128]),
        },
    )
    change(mine, ignore=[])
    vllm, sglang, _ = reasons(mine)
    assert "lm_head is quantized by the target Linear" in vllm
    assert "lm_head is quantized by the target Linear" in sglang
    path = mine / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["config_groups"]["group_0"]["targets"] = ["Linear", "lm_head"]
    path.write_text(json.dumps(config))
    assert read(mine)[:2] == [True, True]


def test_layers_outside_targets_and_ignore(dense, mine):
    """With targets by name, vLLM leaves other layers dense; SGLang and TGI want each of them in ``ignore``."""
    config = json.loads((mine / "config.json").read_text())
    config["quantization_config"]["config_groups"]["group_0"]["targets"] = ["re:.*self_attn.*"]
    dense_mlp = {key: value for key, value in load_file(dense / "model.safetensors").items() if ".mlp." in key}
    rewritten(mine, lambda tensors: {**{k: v for k, v in tensors.items() if ".mlp." not in k}, **dense_mlp})
    (mine / "config.json").write_text(json.dumps(config))
    assert read(mine) == [True, False, False]
    assert "neither a target nor in ignore" in reasons(mine)[1]


@pytest.mark.parametrize(
    ("fields", "server", "word"),
    [
        ({"sparsity_config": {"format": "dense", "targets": ["Linear"]}}, 0, "sparsity_config"),
        ({"sparsity_config": {"format": "dense", "targets": ["Linear"]}}, 1, "2:4"),
        ({"format": "mixed-precision"}, 2, "one format for all groups"),
    ],
)
def test_fields_that_a_server_refuses(fields, server, word, mine):
    assert word in reasons(change(mine, **fields))[server]


def test_an_order_of_activations_that_needs_an_index_of_groups(mine):
    """compressed-tensors 0.20 has removed it from its schema; with an older one, vLLM and TGI refuse it."""
    change(mine, actorder="group")
    try:
        found = reasons(mine)
    except CheckpointError as error:
        found = [str(error)] * 3
    assert "actorder" in found[0]
    assert "actorder" in found[2]


def test_rotary_settings_that_an_old_transformers_does_not_read(mine):
    path = mine / "config.json"
    config = json.loads(path.read_text())
    config["rope_parameters"] = {"rope_theta": 500000.0, "rope_type": "default"}
    path.write_text(json.dumps(config))
    assert read(mine) == [True, True, False]
    path.write_text(json.dumps({**config, "rope_theta": 500000.0}))
    assert read(mine) == [True, True, True]


@pytest.mark.parametrize(
    "fields",
    [
        {"num_bits": "four"},
        {"num_bits": None},
        {"strategy": "diagonal"},
        {"group_size": -7},
        {"group_size": 0},
        {"config_groups": "Linear"},
        {"config_groups": {"group_0": {"targets": 7}}},
        {"format": ["pack-quantized"]},
        {"ignore": [["lm_head"]]},
        {"ignore": ["re:(a+)+$"]},
        {"ignore": ["re:("]},
        {"ignore": ["lm_head"] * 30_000},
        {"quantization_status": "nearly"},
    ],
    ids=lambda fields: str(fields)[:40],
)
def test_a_configuration_outside_the_schema(fields, mine):
    with pytest.raises(CheckpointError, match="quantization_config"):
        check_serving(change(mine, **fields))


@pytest.mark.parametrize("stored", ["pack-quantized", ["compressed-tensors"], 7])
def test_a_configuration_that_is_not_a_mapping(stored):
    with pytest.raises(CheckpointError, match="quantization_config"):
        serving_support({"quantization_config": stored})


@pytest.mark.parametrize("stored", [{"quant_method": "gptq"}, {"quant_method": "awq", "bits": 4, "group_size": "x"}])
def test_a_layout_without_its_numbers(stored):
    with pytest.raises(CheckpointError, match="whole numbers"):
        serving_support({"quantization_config": stored})


@pytest.mark.parametrize(
    ("stored", "expected"),
    [
        ({"quant_method": "gptq", "bits": 3, "group_size": 128, "sym": True}, [False, False, True]),
        ({"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": False}, [False, False, True]),
        ({"quant_method": "awq", "bits": 8, "group_size": 128}, [False, False, False]),
        ({"quant_method": "bitsandbytes"}, [None, None, None]),
        ({"quant_method": {"a": 1}}, [None, None, None]),
        ({}, [None, None, None]),
    ],
)
def test_other_layouts(stored, expected):
    assert [verdict.reads for verdict in serving_support({"quantization_config": stored})] == expected


def test_model_types_and_names_of_any_kind():
    for kind in ({"a": 1}, [1], None, 7):
        (verdict, *_) = serving_support({"model_type": kind, "auto_map": {}, "architectures": kind})
        assert verdict.reads is False


def test_what_is_not_a_checkpoint(tmp_path):
    for source in (tmp_path / "nothing", tmp_path, __file__, "./here"):
        with pytest.raises(OptimError):
            check_serving(source)


@pytest.mark.parametrize(
    ("row", "name"),
    [
        ("4-bit weights per channel or in groups of 32, 64, 128 (W4A16)", "w4"),
        ("4-bit weights per channel or in groups of 32, 64, 128 (W4A16)", "w4 per channel"),
        ("4-bit weights in other groups", "w4 groups of 16"),
        ("weights of 2, 3, 5, 6 or 7 bits", "w3"),
        ("8-bit weights, 16-bit inputs (W8A16)", "w8"),
        ("weights with zero points", "zero points"),
        ("8-bit weights and inputs, dynamic (W8A8)", "w8a8"),
        ("4-bit weights, 8-bit inputs (W4A8)", "w4a8"),
        ("8-bit floats (FP8)", "fp8"),
        ("q, k and v, or gate and up, with different bits", "one of three left out"),
        ("pruned, also 2:4, 16-bit", "pruned"),
        ("a model with its own code", "own code"),
    ],
)
def test_the_table_of_the_documentation(row, name):
    """The cases above are tried on checkpoints; the page says the same of them."""
    lines = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8").splitlines()
    (found,) = [line for line in lines if line.startswith(f"| {row} |")]
    assert [cell.strip() for cell in found.strip("|").split("|")][2:] == ["yes" if e else "no" for e in CASES[name][1]]


def test_the_page_names_the_versions_that_were_read():
    page = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    for server in SERVERS:
        assert server.name in page
        assert server.version in page
        assert server.command.format(path="my-w4a16") in page


def test_the_command(w4, dense, tmp_path, capsys):
    assert main(["serving", str(w4)]) == 0
    printed = capsys.readouterr().out
    assert "4-bit int weights in groups of 32 (pack-quantized)" in printed
    assert f"vllm serve {w4}" in " ".join(printed.split())  # wrapped to the width of the terminal
    assert "no server was run" in printed
    assert main(["serving", str(w4), "--json", "--server", "vllm"]) == 0
    (verdict,) = json.loads(capsys.readouterr().out)["verdicts"]
    assert verdict["reads"] is True
    home = written(dense, tmp_path / "asym", CASES["zero points"][0])
    assert main(["serving", str(home), "--server", "tgi"]) == 1
    assert main(["serving", str(home)]) == 0
    assert main(["serving", str(tmp_path / "nothing")]) == 2
