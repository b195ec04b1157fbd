"""Recipes: all accepted forms, and the error for each mistake."""

from __future__ import annotations

import json
import re

import pytest
import yaml

from hf_optim import OptimConfig, RecipeError
from hf_optim.recipes.catalogue import catalogue
from hf_optim.recipes.config import DataConfig, shipped_recipes

RTN = {"technique": "rtn", "bits": 4}


def test_every_accepted_form_gives_the_same_recipe(tmp_path):
    step = catalogue().get("rtn")(bits=4)
    (tmp_path / "r.yaml").write_text(yaml.safe_dump({"steps": [RTN]}))
    (tmp_path / "r.json").write_text(json.dumps([RTN]))
    forms = [step, [step], [RTN], RTN, {"steps": [RTN]}, str(tmp_path / "r.yaml"), tmp_path / "r.json"]
    forms.append(OptimConfig.parse(step))
    assert [OptimConfig.parse(form).to_dict() for form in forms] == [{"steps": [RTN]}] * len(forms)


def test_a_recipe_survives_yaml():
    recipe = OptimConfig.parse(
        {
            "steps": [{"technique": "magnitude", "sparsity": 0.25, "skip": ["re:.*down_proj"]}, RTN],
            "calibration": {"dataset": "x.jsonl", "samples": 4, "seed": 3},
            "driver": "blockwise",
        }
    )
    again = OptimConfig.parse(yaml.safe_load(recipe.to_yaml()))
    assert again.to_dict() == recipe.to_dict()
    assert again.calibration == DataConfig(dataset="x.jsonl", samples=4, seed=3)
    assert again.steps[0].skip == ("re:.*down_proj",)


@pytest.mark.parametrize("name", sorted(shipped_recipes()))
def test_shipped_recipes_load_and_compose(name):
    recipe = OptimConfig.load(name)
    recipe.check()
    assert recipe.description


def test_the_promised_recipes_are_shipped():
    assert {"w8a8", "w4a16", "w3a16", "fp8", "2of4", "2of4-w4a16", "gmp50", "kd"} <= set(shipped_recipes())


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ([{"technique": "gtpq"}], "no technique 'gtpq'; did you mean 'gptq'"),
        ([{"technique": "rtn", "bit": 4}], "rtn has no field 'bit'; did you mean 'bits'"),
        ([{"technique": "rtn", "bits": "four"}], "rtn: bits must be int | None, not 'four'"),
        ([{"technique": "rtn", "bits": True}], "rtn: bits must be int | None, not True"),
        ([{"technique": "magnitude", "sparsity": 1.5}], "magnitude: sparsity must be"),
        ([{"bits": 4}], "step 1 must be a mapping with `technique:`"),
        ([], "at least one step"),
        ({"steps": "rtn"}, "`steps:` must be a list of mappings with `technique:`, not 'rtn'"),
        ({"steps": {"technique": "rtn"}}, "`steps:` must be a list of mappings"),
        ({}, "add `steps:` to the recipe"),
        ([{"technique": 3}], "step 1: `technique:` must be a name, not 3"),
        ({"tecnique": "rtn"}, "no key 'tecnique'; did you mean 'technique'"),
        (b"rtn", "not as a value of type bytes"),
        ("", "no recipe '': it is empty"),
        ("AUTO", "no recipe 'AUTO': optim_config=\"auto\" (in small letters)"),
        ("/", "no recipe '/': it is a folder"),
        ('{"technique": "rtn"}', "write a recipe that is not a name into a .yaml or .json file"),
        ("smoothquant,gptq", "no recipe 'smoothquant,gptq': several steps are a list"),
        ({"stepz": []}, "no key 'stepz'; did you mean 'steps'"),
        ({"steps": [RTN], "driver": "streamd"}, "driver must be one of"),
        ({"steps": [RTN], "calibration": {"sampels": 3}}, "no key 'sampels'; did you mean 'samples'"),
        ({"steps": [RTN], "calibration": {"samples": 0}}, "samples must be a whole number >= 1"),
        ({"steps": [RTN], "calibration": 3}, "must be a mapping"),
        ("w4a61", "no recipe 'w4a61'; did you mean 'w4a16'? (techniques: "),
        ("missing.yaml", "no recipe file 'missing.yaml'"),
        (3, "a mapping or a list of steps, not as a value of type int"),
    ],
)
def test_bad_recipes_are_refused_with_the_reason(source, message):
    with pytest.raises(RecipeError) as caught:
        OptimConfig.parse(source)
    assert message in str(caught.value)


@pytest.mark.parametrize("source", ["SmoothQuand", [{"technique": "SmoothQuand"}]])
def test_an_unknown_name_is_answered_with_the_nearest_techniques(source):
    with pytest.raises(RecipeError) as caught:
        OptimConfig.parse(source)
    names = catalogue().names()
    listed = re.search(rf"((?:\w+, )+)\.\.\.; `hf-optim list` shows all {len(names)}", str(caught.value)).group(1)
    assert listed.split(", ")[0] == "smoothquant"
    assert 1 < len(listed.split(", ")) <= 5
    assert set(listed.removesuffix(", ").split(", ")) <= set(names)


def test_a_name_like_no_technique_is_answered_with_where_they_are_listed():
    with pytest.raises(RecipeError, match=rf"\(`hf-optim list` shows all {len(catalogue().names())}\)"):
        OptimConfig.parse([{"technique": "%%%"}])


def test_yaml_cannot_construct_objects(tmp_path):
    path = tmp_path / "evil.yaml"
    path.write_text("steps: !!python/object/apply:os.system ['touch pwned']\n")
    with pytest.raises(RecipeError, match="not a plain YAML or JSON recipe"):
        OptimConfig.parse(path)
    assert not (tmp_path / "pwned").exists()


def test_an_error_names_the_file_and_the_step(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("steps:\n  - technique: rtn\n  - technique: rtn\n    bits: 99\n")
    with pytest.raises(RecipeError) as caught:
        OptimConfig.parse(path)
    assert "r.yaml: step 2: rtn: bits must be <= 8" in str(caught.value)
