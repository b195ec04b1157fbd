"""The documents are true: snippets run, every hook stands there with its signature, every link leads somewhere."""

from __future__ import annotations

import inspect
import json
import os
import re
import shlex
import subprocess
import sys
import types
import warnings
from pathlib import Path

import pytest
from conftest import ROOT
from tiny_models import TINY, tiny_llama
from tiny_tokenizer import tiny_tokenizer

from hf_optim import OptimConfig, hookspecs

FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "CONTRIBUTING.md"]
HOOKS = {name: hook for name, hook in vars(hookspecs).items() if hasattr(hook, "hf_optim_spec")}


def snippets(page: Path) -> list[tuple[str, str]]:
    return FENCE.findall(page.read_text(encoding="utf-8"))


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A directory in which ``org/model``, ``org/vit`` and ``org/t5`` are tiny models and the documents' data exist."""
    tokenizer = tiny_tokenizer()
    tiny_llama(vocab_size=len(tokenizer)).save_pretrained(tmp_path / "org" / "model")
    tokenizer.save_pretrained(tmp_path / "org" / "model")
    for name in ("vit", "t5"):
        TINY[name]().save_pretrained(tmp_path / "org" / name)
    row = json.dumps({"text": "the quick brown fox jumps over the lazy dog " * 40})
    (tmp_path / "calibration.jsonl").write_text("\n".join([row] * 160))
    (tmp_path / "held-out.jsonl").write_text("\n".join([row] * 8))  # measured five times over
    theirs = {"GPTQModifier": {"scheme": "W4A16", "targets": ["Linear"], "ignore": ["lm_head"]}}
    (tmp_path / "recipe.yaml").write_text(json.dumps({"quant_stage": {"quant_modifiers": theirs}}))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    return tmp_path


def execute(line, folder, python, copies):
    """Return exit status and output of a line of a shell. ``hf-optim`` runs in the session, which has imported it.

    With ``copies``, so do the processes that it starts.
    """
    if line.startswith("hf-optim "):
        before = "import forked_children; forked_children.begin()" if copies else ""
        done = python.command(shlex.split(line)[1:], before, folder)
        return done.status, done.out + done.err
    # `make` would install everything: that the target exists is what can be shown here.
    command = line.replace("make ", f"make --dry-run -C {ROOT} ", 1) if line.startswith("make ") else line
    done = subprocess.run(command, shell=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    return done.returncode, done.stdout


@pytest.mark.timeout(900)  # README.md takes 40 seconds in its own processes, and several times that beside other work
@pytest.mark.parametrize(
    ("page", "copies"),
    [
        pytest.param(PAGES[0], True, id="README.md"),
        pytest.param(PAGES[0], False, id="README.md in processes of its own", marks=pytest.mark.slow),
        *(pytest.param(page, False, id=page.name, marks=pytest.mark.many) for page in PAGES[1:]),
    ],
)
def test_every_snippet_runs(page, copies, workplace, monkeypatch, python):
    module = types.ModuleType("snippet")  # classes look their module up by name
    monkeypatch.setitem(sys.modules, "snippet", module)
    for language, text in snippets(page):
        if language == "python":
            # As a notebook does: one namespace a page, and what a library warns of is not the page's business.
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                exec(compile(text, str(page.name), "exec"), vars(module))
        elif language == "yaml":
            (workplace / "snippet.yaml").write_text(text)
            OptimConfig.parse(workplace / "snippet.yaml").check()
        elif language == "sh":
            for line in filter(None, (line.split("  #")[0].strip() for line in text.splitlines())):
                status, output = execute(line, workplace, python, copies)
                assert status == 0, f"{line}\n{output}"
        else:
            assert language in ("text", "toml"), f"{page.name}: a fenced block of {language or 'no language'}"


def test_the_pages_have_snippets():
    counts = {page.name: len(snippets(page)) for page in PAGES}
    assert counts["README.md"] >= 4
    assert counts["recipes.md"] >= 4


def test_every_hook_is_documented_with_its_signature():
    page = (ROOT / "docs" / "hooks.md").read_text(encoding="utf-8")
    assert re.findall(r"^## (\w+)$", page, re.MULTILINE) == list(HOOKS)
    for name, hook in HOOKS.items():
        assert f"{name}{inspect.signature(hook)}".replace("'", "") in page
        assert inspect.getdoc(hook).replace("``", "`") in page


def test_there_are_ten_hooks():
    assert len(HOOKS) == 10


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?://)([^)#]+)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"
