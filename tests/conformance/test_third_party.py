"""A technique from another distribution is found, listed, suggested, and runs the conformance suite as a user would."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT

EXAMPLE = ROOT / "examples" / "third_party_technique"


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """An environment in which the example is installed: its metadata on the path, as an installer would write it."""
    site = tmp_path_factory.mktemp("site")
    info = site / "hf_optim_ternary-0.1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: hf-optim-ternary\nVersion: 0.1.0\n")
    section, entry = "hf_optim", "ternary = hf_optim_ternary.ternary"
    text = (EXAMPLE / "pyproject.toml").read_text()
    assert f'[project.entry-points.{section}]\nternary = "hf_optim_ternary.ternary"' in text
    (info / "entry_points.txt").write_text(f"[{section}]\n{entry}\n")
    path = os.pathsep.join([str(site), str(EXAMPLE / "src")])
    return {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}


def run(environment, *command, cwd=None):
    return subprocess.run([sys.executable, "-m", *command], env=environment, cwd=cwd, capture_output=True, text=True)


def test_it_is_listed(environment):
    done = run(environment, "hf_optim.cli", "list", "--json")
    assert done.returncode == 0, done.stderr
    names = {t["name"]: t for t in json.loads(done.stdout)["techniques"]}
    assert names["ternary"]["paper"]["year"] == 2016


def test_its_own_tests_and_the_conformance_suite_pass(environment, tmp_path):
    done = run(environment, "pytest", "-q", "-p", "no:cacheprovider", str(EXAMPLE / "tests"), cwd=tmp_path)
    assert done.returncode == 0, done.stdout
    done = run(environment, "pytest", "-q", "-p", "no:cacheprovider", "--hf-optim", "ternary", cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout


def test_a_technique_that_breaks_the_contract_fails_the_suite(environment, tmp_path):
    source = (EXAMPLE / "src" / "hf_optim_ternary" / "ternary.py").read_text()
    broken = source.replace("        yield\n", "        yield\n        scope.module.register_forward_hook(print)\n")
    assert broken != source
    package = tmp_path / "hf_optim_ternary"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "ternary.py").write_text(broken)
    path = os.pathsep.join([str(tmp_path), environment["PYTHONPATH"]])
    done = run(
        {**environment, "PYTHONPATH": path}, "pytest", "-q", "-p", "no:cacheprovider", "--hf-optim", "ternary",
        "-k", "outlives and llama", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 1
    assert "keeps hooks" in done.stdout
