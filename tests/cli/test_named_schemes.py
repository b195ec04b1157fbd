"""Schemes on the command line: ``list`` names them, ``check`` takes them as recipes."""

from __future__ import annotations

import json

import pytest

from hf_optim.cli import main
from hf_optim.recipes.schemes import SCHEMES


def test_list_names_every_scheme_with_its_step_and_what_is_stored(capsys):
    assert main(["list"]) == 0
    table = capsys.readouterr().out.split("what is stored\n", 1)[1].split("\n\n")[0]
    assert [line.split()[0] for line in table.splitlines()[1:] if line[0] != " "] == list(SCHEMES)
    assert main(["list", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)["schemes"]
    assert [one["name"] for one in listed] == list(SCHEMES)
    assert {
        "name": "W4A16_ASYM",
        "technique": "gptq",
        "stored": "weights int4, one scale and one zero point for a group of 128 inputs; inputs as they are",
    } in listed


@pytest.mark.parametrize("name", ["FP8", "fp8_dynamic", "W8A8"])
def test_list_describes_a_scheme_as_a_step_that_check_accepts(name, capsys, tmp_path):
    assert main(["list", name]) == 0
    page = capsys.readouterr().out
    assert page.startswith(f"{name.upper()} (scheme): weights ")
    (tmp_path / "r.yaml").write_text(page[page.index("- technique") :])
    assert main(["check", str(tmp_path / "r.yaml")]) == main(["check", name]) == 0
    assert main(["list", name, "--json"]) == 0


def test_a_scheme_that_cannot_be_written_is_refused_by_every_command(capsys):
    for command, status in ((["list", "NVFP4"], 2), (["check", "nvfp4"], 1)):
        assert main(command) == status
        assert "scheme NVFP4 cannot be written: inputs of 4-bit floats" in capsys.readouterr().err


def test_a_scheme_that_shares_its_letters_with_a_recipe_says_which_one_runs(capsys):
    assert main(["check", "W4A16"]) == 0
    assert "W4A16 is the scheme (gptq, groups of 128 inputs)" in capsys.readouterr().err
    assert main(["check", "w4a16"]) == 0
    assert "scheme" not in capsys.readouterr().err
