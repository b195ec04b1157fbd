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
def installed(tmp_path_factory):
    """The paths on which the example is installed: its metadata, as an installer would write it, and its package."""
    site = tmp_path_factory.mktemp("site")
    info = site / "hf_optim_ternary-0.1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: hf-optim-ternary\nVersion: 0.1.0\n")
    section, entry = "hf_optim", "ternary = hf_optim_ternary.ternary"
    text = (EXAMPLE / "pyproject.toml").read_text()
    assert f'[project.entry-points.{section}]\nternary = "hf_optim_ternary.ternary"' in text
    (info / "entry_points.txt").write_text(f"[{section}]\n{entry}\n")
    return [str(site), str(EXAMPLE / "src")]


def run_pytest(python, paths, folder, *arguments):
    """Run pytest with ``paths`` on the path in a copy of the session."""
    words = ["-q", "-p", "no:cacheprovider", *arguments]
    return python.copy(f"""
import os, pytest, sys
sys.path[:0] = {paths}
os.chdir({str(folder)!r})
raise SystemExit(pytest.main({words}))
""")


def test_it_is_listed(installed, python):
    done = python.command(["list", "--json"], before=f"import sys; sys.path[:0] = {installed}")
    assert done.status == 0, done.err
    names = {t["name"]: t for t in json.loads(done.out)["techniques"]}
    assert names["ternary"]["paper"]["year"] == 2016


def test_its_own_tests_pass(installed, python, tmp_path):
    done = run_pytest(python, installed, tmp_path, str(EXAMPLE / "tests"))
    assert done.status == 0, done.out
    assert " passed" in done.out


@pytest.mark.slow
def test_the_conformance_suite_passes(installed, tmp_path):
    """By the command of a user."""
    path = os.pathsep.join([*installed, *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--hf-optim", "ternary"],
        env={**os.environ, "PYTHONPATH": path}, cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout


def test_a_technique_that_breaks_the_contract_fails_the_suite(installed, python, tmp_path):
    source = (EXAMPLE / "src" / "hf_optim_ternary" / "ternary.py").read_text()
    broken = source.replace("        yield\n", "        yield\n        scope.module.register_forward_hook(print)\n")
    assert broken != source
    package = tmp_path / "hf_optim_ternary"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "ternary.py").write_text(broken)
    paths = [str(tmp_path), *installed]
    done = run_pytest(python, paths, tmp_path, "--hf-optim", "ternary", "-k", "outlives and llama")
    assert done.status == 1
    assert "keeps hooks" in done.out
