"""Code that a run wrote is recognized by its content; the references that stock classes keep are removed."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest
from conftest import ROOT
from tiny_models import tiny_gpt2, tiny_llama

import hf_optim
from hf_optim.checkpoints import remote_code
from hf_optim.trust.code import WrittenCode, drop_references, is_written_by_run, may_run

LOCAL = {"steps": [{"technique": "local", "window": 4}]}


@pytest.fixture
def result(tmp_path):
    """A checkpoint with generated code, and that code."""
    model = hf_optim.optimize(tiny_gpt2(), LOCAL)
    model.save_pretrained(tmp_path / "result")
    return tmp_path / "result", remote_code.written_code(model)


def test_the_code_that_the_run_wrote_may_run(result):
    home, written = result
    assert [path.name for path in home.glob("*.py")] == list(written.hashes)
    assert is_written_by_run(home, written)


def test_a_stock_model_brings_no_code(tmp_path):
    assert remote_code.written_code(tiny_llama()) is None
    assert not is_written_by_run(tmp_path, None)


def edit(home, name, **fields):
    path = home / name
    data = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(data | fields))


def changed(home):
    path = next(home.glob("*.py"))
    path.write_text(path.read_text() + "\n")


def replaced_by_link(home):
    path = next(home.glob("*.py"))
    path.rename(home.parent / path.name)
    path.symlink_to(home.parent / path.name)


def generate(home):
    (home / "custom_generate").mkdir()
    (home / "custom_generate" / "generate.py").write_text("")


STRANGE = {
    "the file was changed": changed,
    "the file is a link": replaced_by_link,
    "the file is missing": lambda home: next(home.glob("*.py")).unlink(),
    "another file": lambda home: (home / "helper.py").write_text(""),
    "a compiled file": lambda home: (home / "helper.so").write_text(""),
    "a generate function": generate,
    "a class of another repository": lambda home: edit(
        home, "config.json", auto_map={"AutoConfig": "org/x--module.Class"}
    ),
    "another class of its own": lambda home: edit(
        home, "config.json", auto_map={"AutoModelForMaskedLM": "helper.Model"}
    ),
    "a tokenizer": lambda home: edit(home, "tokenizer_config.json", auto_map={"AutoTokenizer": ["helper.T", None]}),
    "a nested configuration": lambda home: edit(home, "config.json", text_config={"auto_map": {"AutoConfig": "a.B"}}),
    "a list": lambda home: edit(home, "processor_config.json", parts=[{"auto_map": ["a.B"]}]),
    "a pipeline": lambda home: edit(home, "config.json", custom_pipelines={"x": {"impl": "a.B"}}),
    "a configuration that cannot be read": lambda home: (home / "other.json").write_text("{"),
}


@pytest.mark.many
@pytest.mark.parametrize("what", STRANGE)
def test_any_other_code_is_not_trusted(what, result):
    home, written = result
    STRANGE[what](home)
    assert not is_written_by_run(home, written)


def test_only_true_is_a_word():
    assert may_run(True)
    assert not any(may_run(word) for word in (False, None, 1, "true", "false", [True]))


def test_references_are_removed_except_those_that_are_kept(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(
        json.dumps({"a": [{"auto_map": {"AutoConfig": "x.Y"}, "b": 1}], "auto_map": {"A": "m.N", "B": "o.P"}})
    )
    drop_references(path, {"A": "m.N"})
    assert json.loads(path.read_text()) == {"a": [{"b": 1}], "auto_map": {"A": "m.N"}}
    before = path.read_bytes()
    drop_references(path, {"A": "m.N"})
    assert path.read_bytes() == before
    drop_references(tmp_path / "missing.json")


def test_a_stale_reference_is_not_saved_by_a_stock_class(tmp_path):
    model = tiny_llama()
    model.config.auto_map = {"AutoConfig": "org/x--module.Class"}
    hf_optim.optimize(model, {"steps": [{"technique": "rtn", "bits": 4, "group_size": 16}]}).save_pretrained(tmp_path)
    assert "auto_map" not in json.loads((tmp_path / "config.json").read_text())


def test_hashes_are_of_the_text():
    assert WrittenCode.of("a.py", "x", {}).hashes == {
        "a.py": "2d711642b726b04401627ca9fbac32f5c8530fb1903cc4db02258717921a4881"
    }


# -- the sources -------------------------------------------------------------------------------------------------------
# file -> what it may contain, and why.
ALLOWED = {
    "hf_optim/training/pruning_rounds.py": {"torch.load"},  # weights_only, and a file whose hash the run knows
    "hf_optim/cli/jobs/measuring.py": {"--trust-remote-code"},  # guarded by the word, or by is_written_by_run
    "hf_optim/testing/recompute.py": {"trust_remote_code=True"},  # of the checkpoint that the conformance suite wrote
    "hf_optim/cli/options.py": {"--trust-remote-code"},  # the option itself
}
FORBIDDEN_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
FORBIDDEN_CALLS = {"torch.load", "np.load", "numpy.load", "pandas.read_pickle", "pd.read_pickle", "eval", "exec"}


def findings(path: Path) -> set[str]:
    """What a source file does that a stranger's file could abuse."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names} & FORBIDDEN_MODULES
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module} & FORBIDDEN_MODULES
        elif isinstance(node, ast.Constant) and node.value == "--trust-remote-code":
            found.add("--trust-remote-code")
        elif isinstance(node, ast.Call):
            found |= {ast.unparse(node.func)} & FORBIDDEN_CALLS
            for keyword in node.keywords:
                given = isinstance(keyword.value, ast.Constant) and keyword.value.value
                if keyword.arg in ("trust_remote_code", "trust") and given is True:
                    found.add("trust_remote_code=True")
                if keyword.arg == "weights_only" and given is not True:
                    found.add("weights_only=False")
    return found


def test_no_source_file_gives_trust_or_reads_pickles():
    strange = {}
    for folder in ("hf_optim", "plugins", "kernels"):
        for path in sorted(ROOT.joinpath(folder).rglob("*.py")):
            name = path.relative_to(ROOT).as_posix()
            if found := findings(path) - ALLOWED.get(name, set()):
                strange[name] = found
    assert strange == {}


def test_every_exception_is_needed():
    assert {name for name, allowed in ALLOWED.items() if not allowed <= findings(ROOT / name)} == set()


def test_loaders_of_transformers_get_the_word():
    """Auto classes ask on the terminal if they get neither True nor False."""
    silent = []
    for path in sorted(ROOT.joinpath("hf_optim").rglob("*.py")):
        if "testing" in path.parts:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] in (
                "from_pretrained",
                "from_config",
            ):
                owner = ast.unparse(node.func).rpartition(".")[0].rpartition(".")[2]
                named = {keyword.arg for keyword in node.keywords}
                if owner.startswith("Auto") and not named & {"trust_remote_code", None}:
                    silent.append(f"{path.name}:{node.lineno}")
    assert silent == []
