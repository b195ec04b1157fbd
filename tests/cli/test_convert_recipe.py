"""``hf-optim convert-recipe``: what is printed where, and the exit status."""

from __future__ import annotations

import yaml

from hf_optim.cli import main

COMPLETE = """
quant_stage:
  quant_modifiers:
    SmoothQuantModifier: {smoothing_strength: 0.8}
    GPTQModifier: {scheme: W8A8, targets: [Linear], ignore: [lm_head], offload_hessians: true}
"""
PARTIAL = """
quant_stage:
  quant_modifiers:
    AWQModifier: {scheme: FP8_DYNAMIC, ignore: [lm_head]}
"""


def test_a_complete_translation_is_printed_and_harmless_fields_are_named_on_stderr(capsys, tmp_path):
    (tmp_path / "recipe.yaml").write_text(COMPLETE)
    assert main(["convert-recipe", str(tmp_path / "recipe.yaml")]) == 0
    printed = capsys.readouterr()
    assert [step["technique"] for step in yaml.safe_load(printed.out)["steps"]] == ["smoothquant", "gptq"]
    line = "left out, without effect on the result: GPTQModifier: offload_hessians (it decides memory and time only)"
    assert line in printed.err
    assert f"# {line}" in printed.out


def test_the_written_file_is_a_recipe_that_check_accepts(capsys, tmp_path):
    (tmp_path / "recipe.yaml").write_text(COMPLETE)
    assert main(["convert-recipe", str(tmp_path / "recipe.yaml"), "--output", str(tmp_path / "ours.yaml")]) == 0
    assert capsys.readouterr().out == f"wrote {tmp_path / 'ours.yaml'}\n"
    assert main(["check", str(tmp_path / "ours.yaml")]) == 0
    assert "[smoothquant, gptq] composes" in capsys.readouterr().out
    assert main(["convert-recipe", str(tmp_path / "recipe.yaml"), "--output", str(tmp_path / "no" / "o.yaml")]) == 2
    assert "cannot write" in capsys.readouterr().err


def test_a_modifier_without_counterpart_is_an_error_unless_partial(capsys, tmp_path):
    (tmp_path / "recipe.yaml").write_text(PARTIAL)
    assert main(["convert-recipe", str(tmp_path / "recipe.yaml"), "--output", str(tmp_path / "ours.yaml")]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert not (tmp_path / "ours.yaml").exists()
    assert "no counterpart: AWQModifier" in printed.err
    assert "1 part of it has no counterpart (above); --partial prints the rest" in printed.err
    assert main(["convert-recipe", str(tmp_path / "recipe.yaml"), "--partial"]) == 0
    printed = capsys.readouterr()
    assert yaml.safe_load(printed.out) == {"steps": [{"technique": "rtn", "scheme": "FP8_DYNAMIC"}]}
    assert "# no counterpart: AWQModifier" in printed.out


def test_a_recipe_without_any_counterpart_is_an_error(capsys, tmp_path):
    (tmp_path / "recipe.yaml").write_text("a_stage: {a_modifiers: {QuIPModifier: {}}}")
    assert main(["convert-recipe", str(tmp_path / "recipe.yaml"), "--partial"]) == 2
    assert "no modifier has a counterpart" in capsys.readouterr().err
