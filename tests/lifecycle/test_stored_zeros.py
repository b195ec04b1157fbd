"""A recipe on a checkpoint that an earlier recipe pruned: its zeros are known, and kept or the step refused."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from tiny_models import tiny_llama, tiny_mixtral
from transformers import AutoModel, AutoModelForCausalLM

from hf_optim import OptimConfig, RecipeError, optimize, run_of
from hf_optim.checkpoints.source import ModelSource
from hf_optim.cli.check import check
from hf_optim.cli.jobs.compress import compress
from hf_optim.cli.jobs.job import Job
from hf_optim.compressed.packed.accelerate import decode_loaded
from hf_optim.runs.masking import stray_weights
from hf_optim.toolkit.pruning.masks import has_nm_pattern

IDS = torch.randint(3, 60, (2, 12), generator=torch.Generator().manual_seed(0))
DATA = [{"input_ids": IDS}]
KV = {"technique": "kv_cache", "bits": 8}
RTN = {"technique": "rtn", "bits": 4, "group_size": 16}
ASYMMETRIC = RTN | {"symmetric": False}
Q = "model.layers.0.self_attn.q_proj.weight"
pytestmark = pytest.mark.filterwarnings("ignore::hf_optim.KernelWarning")


def pruned(folder, *recipe, model=tiny_llama):
    optimize(model(), list(recipe), calibration=DATA).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def magnitude(tmp_path_factory):
    return pruned(tmp_path_factory.mktemp("magnitude"), "magnitude")


@pytest.fixture(scope="module")
def nm(tmp_path_factory):
    return pruned(tmp_path_factory.mktemp("nm"), "nm")


def again(door, source, recipe, cls=AutoModelForCausalLM):
    if door == "from_pretrained":
        return cls.from_pretrained(source, optim_config=recipe)
    return optimize(cls.from_pretrained(source), recipe)


@pytest.mark.parametrize("door", ["from_pretrained", "optimize"])
@pytest.mark.parametrize("cls", [AutoModelForCausalLM, AutoModel])
def test_a_further_step_knows_the_zeros(door, cls, nm):
    model = again(door, nm, [RTN], cls)
    run = run_of(model)
    former = optimize(tiny_llama(), ["nm", RTN], calibration=DATA)
    once = run_of(former)
    names = {name.removeprefix("model."): name for name in once.masks}
    assert {name.removeprefix("model.") for name in run.masks} == set(names)
    for name, mask in run.masks.items():
        assert torch.equal(mask, once.masks[names[name.removeprefix("model.")]])
        assert run.nm_patterns[name] == (2, 4)
    assert {"sparse", "sparse-nm"} <= set(run.record.traits)


@pytest.mark.parametrize("door", ["from_pretrained", "optimize"])
def test_zero_points_keep_the_zeros(door, magnitude):
    model = again(door, magnitude, [ASYMMETRIC])
    run = run_of(model)
    assert len(run.masks) == 14
    assert not stray_weights(run)


def test_a_step_that_would_destroy_zeros_is_refused_as_in_one_recipe(magnitude):
    with pytest.raises(RecipeError, match=r"step 1 \(rotation\) rewrites weights and would destroy sparse, which the"):
        again("from_pretrained", magnitude, ["rotation", RTN])
    with pytest.raises(RecipeError, match=r"step 1 \(rotation\) rewrites weights and would destroy sparse"):
        again("optimize", magnitude, ["rotation", RTN])
    with pytest.raises(RecipeError, match=r"step 1 \(rotation\) rewrites weights and would destroy sparse"):
        check(["rotation", RTN], str(magnitude))


def test_the_card_of_each_further_recipe_tells_of_the_zeros(nm, tmp_path):
    again("optimize", nm, [KV]).save_pretrained(tmp_path / "second")
    again("from_pretrained", tmp_path / "second", [RTN]).save_pretrained(tmp_path / "third")
    for name in ("second", "third"):
        assert "N:M zeros are stored" in (tmp_path / name / "README.md").read_text()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "third")
    model = optimize(model, [KV])
    run = run_of(model)
    assert {"sparse", "sparse-nm", "quantized"} <= set(run.record.traits)
    assert set(json.loads((tmp_path / "third" / "hf_optim.json").read_text())["pruned"]) == set(run.record.pruned)


def test_a_model_on_kernels_knows_its_zeros(tmp_path):
    source = pruned(tmp_path, "nm", RTN)
    model = AutoModelForCausalLM.from_pretrained(source, optim_config="auto")
    model = optimize(model, [KV])
    run = run_of(model)
    assert {"sparse", "sparse-nm", "quantized"} <= set(run.record.traits)
    assert len(run.record.pruned) == 14


@pytest.mark.parametrize("driver", ["whole_model", "streamed"])
def test_compress_of_a_pruned_checkpoint(driver, nm, tmp_path):
    job = Job(ModelSource(str(nm)), OptimConfig.parse({"steps": [ASYMMETRIC], "driver": driver}), tmp_path / "out")
    run = compress(job)
    assert {"sparse", "sparse-nm", "quantized"} <= set(run.record.traits)
    assert len(run.record.pruned) == 14
    decoded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    decode_loaded(decoded)
    for name, entry in run.record.pruned.items():
        assert has_nm_pattern(decoded.get_parameter(name), *entry["pattern"])


def test_a_second_recipe_on_the_model_in_memory_knows_its_zeros():
    model = optimize(tiny_llama(), "magnitude")
    masks = dict(run_of(model).masks)
    model = optimize(model, [ASYMMETRIC])
    run = run_of(model)
    assert masks.keys() == run.masks.keys()
    assert not stray_weights(run)


def test_experts(tmp_path):
    source = pruned(tmp_path, "magnitude", model=tiny_mixtral)
    model = again("optimize", source, [KV])
    run = run_of(model)
    assert any(mask.dim() == 3 for mask in run.masks.values())
    assert not stray_weights(run)


def test_a_record_of_an_earlier_version(nm, tmp_path):
    shutil.copytree(nm, tmp_path, dirs_exist_ok=True)
    record = json.loads((tmp_path / "hf_optim.json").read_text())
    del record["pruned"]
    (tmp_path / "hf_optim.json").write_text(json.dumps(record))
    model = again("optimize", tmp_path, [KV])
    run = run_of(model)
    assert len(run.masks) == len(run.nm_patterns) == 14


def test_weights_that_were_changed_since_have_no_zeros_to_keep(magnitude):
    model = AutoModelForCausalLM.from_pretrained(magnitude)
    with torch.no_grad():
        model.get_parameter(Q).add_(1.0)
    model = optimize(model, [KV])
    run = run_of(model)
    assert Q not in run.masks
    assert len(run.masks) == 13
    assert any(Q in note for note in run.record.notes)


def test_zeros_by_chance_are_weights(tmp_path):
    model = tiny_llama()
    with torch.no_grad():
        model.get_parameter(Q)[:, ::2] = 0.0
    model.save_pretrained(tmp_path)
    model = again("from_pretrained", tmp_path, [KV])
    run = run_of(model)
    assert not run.masks
    assert "sparse" not in run.record.traits
