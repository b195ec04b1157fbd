"""No example rots: each is run, or at least imported and asked for its help, and each name that it uses exists."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import json
import re
import sys
import types
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from PIL import Image
from tiny_models import TINY, tiny_llama
from tiny_tokenizer import tiny_tokenizer

HOME = ROOT / "examples"
THIRD_PARTY = HOME / "third_party_technique"  # tests/conformance/test_third_party.py
SHORT = ("qlora", "sentence_encoder", "image_classifier")
SCRIPTS = [path for path in sorted(HOME.rglob("*.py")) if THIRD_PARTY not in path.parents]
NOTEBOOKS = sorted(HOME.rglob("*.ipynb"))
WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "dog", "saw", "bird", "in", "old", "tree", "near", "river"]


@pytest.fixture(autouse=True)
def verbosity_as_found():
    """An example is a process of its own as users run it, and quiets transformers for all of it."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    yield
    logging.set_verbosity(level)


def load(name: str) -> types.ModuleType:
    """Import an example as a module."""
    spec = importlib.util.spec_from_file_location(f"example_{name}", HOME / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def shape_of(text: str) -> list[str]:
    """The lines of a printed table without its numbers and its spacing."""
    return [re.sub(r"-?\d+(\.\d+)?", "#", " ".join(line.split())) for line in text.splitlines() if line.strip()]


def printed(text: str) -> list[str]:
    """What an example printed itself, without what the Trainer prints."""
    return [line for line in shape_of(text) if "train_runtime" not in line]


def sentences(count: int, seed: int = 0) -> list[str]:
    picks = torch.randint(len(WORDS), (count, 9), generator=torch.Generator().manual_seed(seed)).tolist()
    return [" ".join(WORDS[pick] for pick in row) for row in picks]


# -- all of them ------------------------------------------------------------------------------------------------------
def test_the_short_examples_and_the_notebook_are_here():
    assert {HOME / f"{name}.py" for name in SHORT} <= set(SCRIPTS)
    assert [path.name for path in NOTEBOOKS] == ["pruning_comparison.ipynb"]


@pytest.mark.many
@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: str(path.relative_to(HOME)))
def test_it_starts(path, python):
    """A script with options prints its help; one of sections runs with none selected; the rest is imported."""
    source = path.read_text(encoding="utf-8")
    assert ast.get_docstring(ast.parse(source)), "an example begins with what it shows and how it is run"
    options = "--help" if "parse_args(" in source else "no-section-has-this-word"
    name = "__main__" if "parse_args(" in source else "example"
    done = python.copy(f"""
import runpy, sys
sys.path.insert(0, {str(path.parent)!r})
sys.argv = [{str(path)!r}, {options!r}]
runpy.run_path({str(path)!r}, run_name={name!r})
""")
    assert done.status == 0, done.err
    assert options != "--help" or f"usage: {path.name}" in done.out


def test_words_are_read_by_a_parser():
    """A missing word gives the usage. Sections on a GPU, and the processes they start, read words themselves."""
    own = [path for path in SCRIPTS if path.parent.name != "gpu" or path.name.endswith("_page.py")]
    assert len(own) > 80
    by_place = re.compile(r"sys\.argv\[\d+\]")
    tracked = {path: by_place.findall(path.read_text(encoding="utf-8").split('"""\n', 2)[-1]) for path in own}
    # The words of ``offload_on_cpu`` are those of a process that it starts.
    assert [path.name for path, found in tracked.items() if found] == ["offload_on_cpu.py"]


@pytest.mark.parametrize("name", ["moe/vmoe_page", "gpu/sparse_attention_page", "adaptive/calm_study"])
def test_a_missing_word_gives_the_usage(name, python):
    path = HOME / f"{name}.py"
    done = python.copy(f"""
import runpy, sys
sys.path.insert(0, {str(path.parent)!r})
sys.argv = [{str(path)!r}]
runpy.run_path({str(path)!r}, run_name="__main__")
""")
    assert done.status == 2, done.err
    assert f"usage: {path.name}" in done.err


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: str(path.relative_to(HOME)))
def test_what_it_uses_of_hf_optim_exists(path):
    """Also inside of functions that only a GPU runs."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    modules: dict[str, types.ModuleType] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.startswith("hf_optim"):
                    found = importlib.import_module(alias.name)
                    modules[alias.asname or alias.name] = found
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("hf_optim"):
            home = importlib.import_module(node.module)
            for alias in node.names:
                if not hasattr(home, alias.name):
                    importlib.import_module(f"{node.module}.{alias.name}")
                value = getattr(home, alias.name)
                if isinstance(value, types.ModuleType):
                    modules[alias.asname or alias.name] = value
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in modules:
            assert hasattr(modules[node.value.id], node.attr), f"line {node.lineno}: {ast.unparse(node)}"


def test_the_examples_are_listed():
    listed = (HOME / "README.md").read_text(encoding="utf-8")
    for path in (*SCRIPTS, *NOTEBOOKS):
        name = str(path.relative_to(HOME))
        assert name in listed or f"({path.parent.name})" in listed, f"examples/README.md does not list {name}"


# -- the short ones, in small -----------------------------------------------------------------------------------------
@pytest.fixture
def language_model(tmp_path):
    tokenizer = tiny_tokenizer()
    tiny_llama(vocab_size=len(tokenizer), intermediate_size=128).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in sentences(160)))
    return tmp_path


def test_qlora(language_model, capsys, monkeypatch):
    example = load("qlora")
    monkeypatch.setattr(example, "WIDTH", 32)
    losses = example.main(
        str(language_model / "model"), str(language_model / "text.jsonl"), 12, 16, 8, language_model / "out"
    )
    assert losses["4-bit base + LoRA"] < losses["4-bit base"] - 0.05
    assert losses["adapter loaded again"] == losses["4-bit base + LoRA"]
    assert losses["merged, dense"] == pytest.approx(losses["4-bit base + LoRA"], abs=2e-2)
    assert (language_model / "out" / "adapter" / "adapter_model.safetensors").is_file()
    config = json.loads((language_model / "out" / "merged" / "config.json").read_text())
    assert "quantization_config" not in config
    lines = printed(capsys.readouterr().out)
    assert set(lines) <= set(shape_of(example.__doc__))
    assert len(lines) == 7


def test_sentence_encoder(tmp_path, capsys):
    example = load("sentence_encoder")
    tokenizer = tiny_tokenizer()
    TINY["bert"](vocab_size=len(tokenizer)).base_model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "modules.json").write_text("[]")
    (tmp_path / "model" / "1_Pooling").mkdir()
    (tmp_path / "model" / "1_Pooling" / "config.json").write_text("{}")
    rows = zip(sentences(20, 1), sentences(20, 2), range(20), strict=True)
    (tmp_path / "pairs.tsv").write_text(
        "sentence1\tsentence2\tscore\n" + "".join(f"{a}\t{b}\t{score / 4}\n" for a, b, score in rows)
    )
    figures = example.main(str(tmp_path / "model"), str(tmp_path / "pairs.tsv"), 20, tmp_path / "out")
    assert 0.99 < figures["cosine of a vector before and after, smallest"] < 1.0
    assert abs(figures["Spearman, W8A8"] - figures["Spearman, original"]) < 0.1
    assert (tmp_path / "out" / "modules.json").is_file()
    assert (tmp_path / "out" / "1_Pooling" / "config.json").is_file()
    lines = printed(capsys.readouterr().out)
    assert set(lines) <= set(shape_of(example.__doc__))
    assert len(lines) == 6


def test_sentences_are_those_of_docstrings():
    found = load("sentence_encoder").docstring_sentences(30)
    assert len(found) == len(set(found)) == 30
    assert all(len(text.split()) > 3 for text in found)


def test_image_classifier_on_drawn_shapes(tmp_path, capsys):
    example = load("image_classifier")
    figures = example.main(None, None, 4, 64, tmp_path)
    assert figures["original"]["agreement"] == 1.0
    assert figures["w8a8"]["agreement"] > 0.7
    assert figures["w4a16"]["kB"] < figures["w8a8"]["kB"] < figures["original"]["kB"] / 3
    lines = printed(capsys.readouterr().out)
    assert set(lines) <= set(shape_of(example.__doc__))
    assert len(lines) == 4


def test_shapes_of_a_seed_are_the_same_and_differ_in_class():
    example = load("image_classifier")
    pixels, labels = example.draw_shapes(200, seed=3)
    again, _ = example.draw_shapes(200, seed=3)
    assert torch.equal(pixels, again)
    assert pixels.shape == (200, 3, 32, 32)
    assert pixels.abs().max() <= 1
    assert set(labels.tolist()) == set(range(len(example.SHAPES)))
    bright = (pixels.mean(1) > 0).float().mean((1, 2))
    areas = [float(bright[labels == kind].mean()) for kind in range(4)]
    assert areas[1] > areas[2]  # a square is larger than the triangle in it


def test_images_of_a_folder_per_class_are_read(tmp_path):
    example = load("image_classifier")
    for name, color in {"dark": (10, 20, 30), "light": (250, 240, 230)}.items():
        (tmp_path / name).mkdir()
        for number in range(3):
            Image.new("RGB", (48, 40), color).save(tmp_path / name / f"{number}.png")
    (pixels, labels), names = example.load_images(str(tmp_path), 6)
    assert names == ["dark", "light"]
    assert pixels.shape == (6, 3, 32, 32)
    assert sorted(labels.tolist()) == [0, 0, 0, 1, 1, 1]
    assert (pixels[labels == 1] > 0.8).all()


def execute(path: Path, folder: Path, monkeypatch) -> dict:
    """Execute the code cells of a notebook in order, in ``folder``; return their namespace."""
    monkeypatch.chdir(folder)
    module = types.ModuleType(path.stem)
    monkeypatch.setitem(sys.modules, path.stem, module)
    for number, cell in enumerate(json.loads(path.read_text(encoding="utf-8"))["cells"]):
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), f"{path.name}, cell {number}", "exec"), vars(module))
    return vars(module)


def test_the_notebook_in_small(language_model, monkeypatch):
    monkeypatch.setenv("HF_OPTIM_QUICK", "1")
    monkeypatch.setattr("hf_optim.cli.jobs.demo.bundled_model", lambda: language_model / "model")
    found = execute(NOTEBOOKS[0], language_model, monkeypatch)
    assert {name: len(points) for name, points in found["curves"].items()} == {
        "magnitude": 3, "N:M by magnitude": 3, "N:M by activation": 3, "N:M, compensated": 3, "gmp, trained": 2,
    }  # fmt: skip
    assert [round(share, 2) for share, _ in found["curves"]["N:M by magnitude"]] == [0.25, 0.5, 0.62]
    assert len(found["axes"].lines) == 7
    found["plt"].close("all")


def test_the_notebook_holds_its_own_results():
    cells = json.loads(NOTEBOOKS[0].read_text(encoding="utf-8"))["cells"]
    assert all(cell["execution_count"] for cell in cells if cell["cell_type"] == "code")
    assert NOTEBOOKS[0].stat().st_size < 100_000
    text = "".join("".join(o.get("text", [])) for cell in cells for o in cell.get("outputs", []))
    assert "dense, trained" in text
    assert "/tmp" not in text


# -- as a user runs them ----------------------------------------------------------------------------------------------
@pytest.mark.real_model
@pytest.mark.timeout(900)
def test_qlora_as_it_is_documented(tmp_path):
    example = load("qlora")
    given = example.parse([])
    losses = example.main(given.model, given.text, given.steps, given.calibration_rows, given.evaluation_rows, tmp_path)
    assert losses["4-bit base"] - losses["float base"] < 0.05
    assert losses["4-bit base + LoRA"] < losses["float base"] - 0.15
    assert losses["merged, dense"] == pytest.approx(losses["4-bit base + LoRA"], abs=5e-3)


@pytest.mark.real_model
@pytest.mark.timeout(900)
def test_sentence_encoder_as_it_is_documented(minilm, shared_data, tmp_path):
    figures = load("sentence_encoder").main(str(minilm), str(shared_data / "stsb" / "test.tsv"), 400, tmp_path / "out")
    assert figures["Spearman, W8A8"] > figures["Spearman, original"] - 0.01
    assert figures["cosine of a vector before and after, smallest"] > 0.97


@pytest.mark.real_model
def test_sentence_transformers_loads_the_encoder(minilm, tmp_path):
    library = pytest.importorskip("sentence_transformers")
    example = load("sentence_encoder")
    example.main(str(minilm), None, 20, tmp_path / "out")
    encoder = library.SentenceTransformer(str(tmp_path / "out"))
    encoder[0].auto_model(torch.tensor([[101, 102]]))
    original = library.SentenceTransformer(str(minilm))
    texts = sentences(4)
    assert (encoder.encode(texts) * original.encode(texts)).sum(-1).min() > 0.98


@pytest.mark.real_model
@pytest.mark.timeout(900)
def test_image_classifier_as_it_is_documented(tmp_path):
    example = load("image_classifier")
    given = example.parse([])
    figures = example.main(None, None, given.steps, given.count, tmp_path)
    assert figures["original"]["accuracy"] > 0.85
    assert min(figures[name]["agreement"] for name in ("w8a8", "w4a16")) > 0.98


@pytest.mark.real_model
@pytest.mark.timeout(900)
def test_image_classifier_on_photographs(shared_data, tmp_path):
    home = shared_data / "cifar10"
    figures = load("image_classifier").main(str(home / "train.parquet"), str(home / "test.parquet"), 60, 1000, tmp_path)
    assert figures["original"]["accuracy"] > 0.15  # ten classes
    assert figures["w8a8"]["agreement"] > 0.9


@pytest.mark.real_model
@pytest.mark.timeout(900)
def test_the_notebook_as_it_is(tmp_path, monkeypatch):
    """Its conclusions hold: scores that know the inputs cost less, and training wins back most."""
    found = execute(NOTEBOOKS[0], tmp_path, monkeypatch)
    at_half = {name: min(points, key=lambda point: abs(point[0] - 0.5))[1] for name, points in found["curves"].items()}
    assert at_half["N:M, compensated"] < at_half["N:M by activation"] < at_half["N:M by magnitude"]
    assert at_half["magnitude"] < at_half["N:M by magnitude"]
    assert at_half["gmp, trained"] < at_half["magnitude"]
    found["plt"].close("all")
