"""Every error that needs no weight is found before one is read, and names what is wrong."""

from __future__ import annotations

import json
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import tiny_mixtures
import torch
from renamed_families import build_family
from safetensors.torch import load_file, save_file
from tiny_models import tiny_gpt2, tiny_llama, tiny_mixtral, tiny_t5

import hf_optim
from hf_optim import CheckpointError, ModelError, OptimConfig
from hf_optim.checkpoints.source import ModelSource
from hf_optim.cli import main
from hf_optim.cli.check import check
from hf_optim.cli.jobs import preflight, room
from hf_optim.cli.jobs.plan import Plan
from hf_optim.errors import OptimError
from hf_optim.runs.memory import host_memory
from hf_optim.testing.tiny_runs import inputs_for

RTN = {"technique": "rtn", "bits": 4, "group_size": 16}
STREAMED = {"steps": [RTN], "driver": "streamed"}


def tiny_bfloat16(**sizes):
    return tiny_llama(**sizes).to(torch.bfloat16)


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    home = tmp_path_factory.mktemp("sound")
    tiny_llama().save_pretrained(home, max_shard_size="20KB")
    return home


@pytest.fixture
def model(sound, tmp_path):
    """A copy of a sound checkpoint in several shards, to spoil."""
    return Path(shutil.copytree(sound, tmp_path / "model"))


def look(home, recipe=None, output=None):
    recipe = OptimConfig.parse(STREAMED if recipe is None else recipe)
    return preflight.preflight(Plan(ModelSource(str(home)), recipe), output)


def shard_with(home, name):
    index = json.loads((home / "model.safetensors.index.json").read_text())
    return home / index["weight_map"][name]


def rewrite(path, change):
    """Change the tensors of a shard, a mapping that ``change`` edits in place."""
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def test_a_sound_checkpoint_passes_and_has_figures(model, tmp_path):
    found = look(model, output=tmp_path / "out")
    assert found.meta_model.files == tuple(sorted(model.glob("*.safetensors")))
    assert found.notes == []
    assert found.estimates["bytes_after"] < found.estimates["bytes_before"]
    assert found.estimates["host_bytes"] > 2 * found.estimates["block_bytes"]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("driver", ["streamed", "blockwise", "auto"])
def test_a_missing_tensor_of_a_block(model, driver):
    name = "model.layers.1.mlp.up_proj.weight"
    rewrite(shard_with(model, name), lambda tensors: tensors.pop(name))
    with pytest.raises(CheckpointError, match=rf"no weights for 1 tensors of LlamaForCausalLM \({name}\)"):
        look(model, {**STREAMED, "driver": driver})


def test_a_missing_head_is_refused_where_it_would_be_random(model):
    rewrite(shard_with(model, "lm_head.weight"), lambda tensors: tensors.pop("lm_head.weight"))
    with pytest.raises(CheckpointError, match=r"lm_head\.weight"):
        look(model)
    assert look(model, {**STREAMED, "driver": "blockwise"}).meta_model.missing == ("lm_head.weight",)


def test_a_missing_shard(model):
    path = shard_with(model, "model.norm.weight")
    path.unlink()
    with pytest.raises(OptimError, match=path.name):
        look(model)


@pytest.mark.parametrize("keep", [0.5, 0.02])
def test_a_truncated_shard(model, keep):
    path = shard_with(model, "model.layers.1.mlp.up_proj.weight")
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])
    with pytest.raises(CheckpointError, match=rf"{path.name} of .* is truncated or corrupt"):
        look(model)


def test_a_wrong_shape(model):
    name = "model.layers.0.self_attn.k_proj.weight"
    rewrite(shard_with(model, name), lambda tensors: tensors.update({name: torch.zeros(8, 32)}))
    with pytest.raises(CheckpointError, match=rf"{name} is \[8, 32\] .* has \[16, 32\]"):
        look(model)


def test_a_type_that_cannot_be_read(model):
    name = "model.layers.0.self_attn.k_proj.weight"
    path = shard_with(model, name)
    rewrite(path, lambda tensors: tensors.update({name: torch.zeros(16, 32, dtype=torch.complex64)}))
    with pytest.raises(CheckpointError, match=rf"{path.name}: {name} has the type C64"):
        look(model)


def test_tensors_without_a_place_are_told(model):
    rewrite(
        shard_with(model, "model.norm.weight"), lambda tensors: tensors.update({"model.stray.weight": torch.zeros(2)})
    )
    assert look(model).notes == ["1 tensors of the checkpoint do not belong to LlamaForCausalLM: model.stray.weight"]


def test_targets_that_match_nothing(model):
    steps = [RTN, {**RTN, "targets": ["re:.*up_prj"]}]
    with pytest.raises(ModelError, match=r"step 1 \(rtn\): nothing matches 're:\.\*up_prj'.*LlamaForCausalLM"):
        look(model, {**STREAMED, "steps": steps[1:]})
    with pytest.raises(ModelError, match=r"step 1 \(rtn\): nothing matches 'down_prj'.*down_proj"):
        look(model, {**STREAMED, "steps": [{**RTN, "skip": ["down_prj"]}]})


LOST = {"technique": "gptq", "targets": ["nope"]}


@pytest.mark.parametrize("copying", [{"technique": "logit_kd"}, {"technique": "lkd"}], ids=["logit_kd", "lkd"])
def test_a_step_that_only_looks_at_the_model_does_not_end_the_check(model, copying):
    """Both have ``transform_model``, to copy or to look at the model; neither changes it."""
    with pytest.raises(ModelError, match=r"step 3 \(gptq\): nothing matches 'nope'"):
        preflight.check_steps(OptimConfig.parse([{"technique": "nm"}, copying, LOST]), tiny_llama())
    figures = look(model, [{"technique": "nm"}, copying]).estimates
    assert figures["bytes_after"] is not None


@pytest.mark.parametrize("step", [{"technique": "structured", "neurons": 0.5}, {"technique": "distilbert"}])
def test_nothing_is_claimed_of_what_follows_a_step_that_changes_shapes(model, step):
    figures = look(model, [step]).estimates
    assert figures["bytes_after"] is None
    assert "depends on the new architecture" in figures["readable"]["weights on disk"]
    assert preflight.check_steps(OptimConfig.parse([step, LOST]), tiny_llama()) == []


def test_layers_that_cannot_be_stored(tmp_path):
    tiny_gpt2().save_pretrained(tmp_path / "model")
    refused = r"step 1 \(rtn\) has no layer to change in GPT2LMHeadModel: transformer\.h\.0.*\(Conv1D: "
    with pytest.raises(ModelError, match=refused):
        look(tmp_path / "model")


def test_groups_that_do_not_divide_are_told(model):
    notes = look(model, {**STREAMED, "steps": [{**RTN, "group_size": 20}]}).notes
    assert len(notes) == 2
    assert "group_size 20 does not divide the 32 inputs of model.layers.0.self_attn.q_proj" in notes[0]
    assert notes[0].endswith("groups of 16: 6.0 bits a weight with scales")
    assert "the 48 inputs of model.layers.0.mlp.down_proj" in notes[1]


def test_groups_that_take_more_than_a_byte_come_with_a_remedy(tmp_path):
    tiny_llama(intermediate_size=172).save_pretrained(tmp_path / "model")
    (note,) = look(tmp_path / "model", {**STREAMED, "steps": [{**RTN, "group_size": 32}]}).notes
    assert "172 inputs of model.layers.0.mlp.down_proj" in note
    assert "groups of 4: 12.1 bits a weight with scales, more than int8 takes: use group_size 43 or 86" in note
    assert "(group_size: null), or skip these layers" in note


def test_a_pattern_without_effect(model):
    with pytest.raises(ModelError, match=r"step 1 \(rtn\): in LlamaForCausalLM, '\*norm\*' in skip matches 5 Llama"):
        look(model, {**STREAMED, "steps": [{**RTN, "skip": ["*norm*"]}]})
    with pytest.raises(ModelError, match=r"'\*lm_h\*' in targets matches 1 layer with the role output head"):
        look(model, [{**RTN, "targets": ["Linear", "*lm_h*"]}])


def test_a_tower_that_stays_as_it_is_is_told():
    llava, recipe = build_family("llava")[0], {"technique": "rtn", "bits": 8}
    (note,) = preflight.check_steps(OptimConfig.parse(recipe), llava)
    assert note.startswith("step 1 (rtn) leaves the vision tower alone (model.vision_tower.encoder.layers.0")
    for fields in ({"targets": ["Linear", "*vision_tower*"]}, {"skip": ["*vision_tower*"]}):
        assert preflight.check_steps(OptimConfig.parse({**recipe, **fields}), llava) == []


def test_tables_count_in_the_bytes_after(model):
    without = look(model, [{"technique": "rtn", "bits": 8}]).estimates["bytes_after"]
    tables = look(model, [{"technique": "rtn", "bits": 8, "targets": ["Linear", "*embed_tokens*"]}]).estimates
    config = tiny_llama().config
    rows, width = config.vocab_size, config.hidden_size
    assert without - tables["bytes_after"] == rows * width * 4 - rows * (width + 4)


@pytest.mark.parametrize("fields", [{"bits": 4, "group_size": 16}, {"bits": 8}, {"bits": 8, "format": "fp8"}], ids=str)
def test_matrices_of_experts_count_in_the_bytes_after(fields, tmp_path):
    step = {"technique": "rtn", **fields}
    mixture = tiny_mixtral().eval()
    mixture.save_pretrained(tmp_path / "dense")
    guess = look(tmp_path / "dense", [step]).estimates["bytes_after"]
    hf_optim.optimize(mixture, step).save_pretrained(tmp_path / "packed")
    assert guess == bytes_of_codes(tmp_path / "packed")


@pytest.mark.parametrize(
    ("build", "step"),
    [
        (tiny_llama, {"technique": "rtn", "bits": 3, "group_size": 16}),
        (tiny_llama, {"technique": "rtn", "bits": 3, "group_size": 16, "symmetric": False}),
        (tiny_llama, {"technique": "rtn", "bits": 4, "activations": "int8"}),
        (tiny_llama, {"technique": "rtn", "bits": 8, "strategy": "tensor"}),
        (tiny_llama, {"technique": "llm_int8"}),
        (tiny_bfloat16, {"technique": "rtn", "bits": 4, "format": "mxfp4"}),
        (tiny_t5, {"technique": "rtn", "bits": 4}),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_the_bytes_after_are_those_of_the_checkpoint(build, step, tmp_path):
    model = build().eval()
    model.save_pretrained(tmp_path / "dense")
    guess = look(tmp_path / "dense", [step]).estimates["bytes_after"]
    hf_optim.optimize(model, step, calibration=[inputs_for(model)]).save_pretrained(tmp_path / "packed")
    assert guess == bytes_of_codes(tmp_path / "packed")


def test_a_budget_of_bits_is_a_bound_of_the_bytes_after(model, tmp_path):
    step = {"technique": "qbert", "budget": 4.0, "iterations": 2}
    guess = look(model, [step]).estimates["bytes_after"]
    dense = tiny_llama().eval()
    hf_optim.optimize(dense, step, calibration=[inputs_for(dense)]).save_pretrained(tmp_path / "packed")
    assert 0.9 * guess < bytes_of_codes(tmp_path / "packed") <= guess


def bytes_of_codes(folder):
    tensors = load_file(folder / "model.safetensors")
    return sum(tensor.nbytes for name, tensor in tensors.items() if not name.endswith("weight_shape"))


def test_groups_of_a_float_format_are_not_those_of_the_step(tmp_path):
    tiny_bfloat16(intermediate_size=160).save_pretrained(tmp_path)
    integer, floats = ({"technique": "gptq", **format} for format in ({}, {"format": "mxfp4"}))
    assert any("group_size 128 does not divide the 160 inputs" in note for note in look(tmp_path, [integer]).notes)
    assert not any("does not divide" in note for note in look(tmp_path, [floats]).notes)


@pytest.mark.parametrize("driver", ["streamed", "blockwise"])
def test_a_model_without_blocks(driver):
    model = tiny_llama()
    model.model.layers = model.model.layers[:0]
    recipe = OptimConfig.parse({"steps": [{"technique": "nm"}], "driver": driver})
    message = rf"driver {driver}: no sequence of blocks was found in LlamaForCausalLM: none .*; use driver: whole_model"
    with pytest.raises(ModelError, match=message):
        preflight.check_steps(recipe, model)


def test_a_mixture_that_cannot_be_traced_without_weights_is_not_streamed(tmp_path):
    tiny_mixtures.build("dbrx").save_pretrained(tmp_path)  # its forward asks which tokens each expert has
    recipe = {"steps": [{"technique": "magnitude", "sparsity": 0.5}], "driver": "streamed"}
    for driver in ("auto", "blockwise", "whole_model"):  # which load it
        assert look(tmp_path, {**recipe, "driver": driver}).estimates["parameters"] > 0
    message = r"driver streamed: the blocks of DbrxForCausalLM cannot .*\(DynamicOutputShape.*; use driver: blockwise"
    with pytest.raises(ModelError, match=message):
        look(tmp_path, recipe)


@pytest.mark.parametrize("driver", ["streamed", "auto"])
def test_an_output_that_cannot_be_written(model, driver):
    with pytest.raises(CheckpointError, match="cannot write to /proc/nowhere/out"):
        look(model, {**STREAMED, "driver": driver}, Path("/proc/nowhere/out"))


def test_a_spill_that_cannot_be_written(model):
    with pytest.raises(CheckpointError, match="cannot write to /proc/nowhere"):
        look(model, {**STREAMED, "spill": "/proc/nowhere"})


Usage = namedtuple("Usage", "total used free")


def test_not_enough_space_for_the_result(model, tmp_path, monkeypatch):
    monkeypatch.setattr(room.shutil, "disk_usage", lambda path: Usage(10**9, 10**9 - 5000, 5000))
    with pytest.raises(CheckpointError, match=r"not enough space for the result at .*out: about .* are needed, 5"):
        look(model, output=tmp_path / "out")


def test_not_enough_space_to_spill(model, tmp_path, monkeypatch):
    monkeypatch.setattr(room.shutil, "disk_usage", lambda path: Usage(10**9, 10**9 - 5000, 5000))
    recipe = {"steps": [{"technique": "gptq"}], "calibration": {"seq_len": 64}}
    with pytest.raises(CheckpointError, match="not enough space for the activations that are spilled"):
        look(model, {**STREAMED, **recipe, "spill": str(tmp_path)})


@pytest.mark.parametrize(
    ("driver", "spill", "remedy"),
    [("blockwise", None, "--driver streamed"), ("streamed", None, "--spill"), ("streamed", ".", "fewer")],
)
def test_not_enough_memory_says_what_would_do(model, monkeypatch, driver, spill, remedy):
    monkeypatch.setattr(room, "host_memory", lambda: 10**6)
    recipe = {"steps": [RTN], "driver": driver, **({"spill": spill} if spill else {})}
    with pytest.raises(ModelError, match=rf"driver {driver} needs about .* of memory.*{remedy}"):
        look(model, recipe)


def test_the_estimate_of_memory_counts_what_flows(model):
    recipe = {"steps": [{"technique": "gptq"}], "calibration": {"samples": 1000, "seq_len": 64}}
    held = look(model, {**STREAMED, **recipe}).estimates
    spilled = look(model, {**STREAMED, **recipe, "spill": "."}).estimates
    assert held["activation_bytes"] == 1000 * 64 * 32 * 4
    assert held["host_bytes"] - spilled["host_bytes"] == held["activation_bytes"]
    assert 10**8 < host_memory() < 10**14


def test_compress_finds_it_before_it_reads_data(model, tmp_path, capsys, monkeypatch):
    name = "model.layers.1.mlp.up_proj.weight"
    rewrite(shard_with(model, name), lambda tensors: tensors.pop(name))
    monkeypatch.setattr("hf_optim.cli.jobs.compress._calibration", lambda *args: pytest.fail("data was read"))
    words = ["compress", model, "--recipe", "rtn", "--output", tmp_path / "out", "--driver", "streamed"]
    assert main([str(word) for word in words]) == 2
    assert name in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_check_prints_what_it_finds(model, capsys):
    recipe = model / "recipe.json"
    recipe.write_text(json.dumps({"steps": [{**RTN, "group_size": 20}]}))
    assert main(["check", str(recipe), "--model", str(model)]) == 0
    printed = capsys.readouterr().out
    assert "host memory" in printed
    assert "group_size 20 does not divide" in printed
    name = "model.layers.1.mlp.up_proj.weight"
    rewrite(shard_with(model, name), lambda tensors: tensors.pop(name))
    with pytest.raises(CheckpointError, match=name):
        check(str(recipe), str(model))


def test_check_needs_no_weights(tmp_path):
    tiny_llama().config.save_pretrained(tmp_path)
    assert check(RTN, str(tmp_path))["model"]["bytes_after"] is not None


@pytest.mark.parametrize("option", ["--train", "--eval"])
def test_compress_refuses_conversations_for_training_and_evaluation_before_it_calibrates(
    sound, tmp_path, monkeypatch, capsys, option
):
    """Only calibration renders conversations: a run does not end, after hours, at what its first row shows."""
    rows = [{"text": "the cat sat on a mat"}, {"messages": [{"role": "user", "content": "the cat"}]}]
    texts, chats = tmp_path / "texts.jsonl", tmp_path / "chats.jsonl"
    for path, row in zip((texts, chats), rows, strict=True):
        path.write_text(json.dumps(row) + "\n")
    recipe = tmp_path / "recipe.json"
    recipe.write_text(json.dumps({"steps": [{"technique": "gmp"}], "training": {"max_steps": 1}}))
    monkeypatch.setattr("hf_optim.cli.jobs.compress._compress", lambda *args: pytest.fail("the run began"))
    words = ["compress", sound, "--recipe", recipe, "--output", tmp_path / "out", "--calibration", texts, option, chats]
    assert main([str(word) for word in words]) == 2
    assert "column 'messages' holds conversations" in capsys.readouterr().err
