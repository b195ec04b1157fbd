"""Publish and load back, with the real Hub client and a fake Hub on loopback."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys

import pytest
from conftest import IMPORTS
from hub_double import TOKEN, hub_double
from huggingface_hub import ModelCard
from python_session import PythonSession
from terminal import run_on_terminal
from tiny_models import tiny_llama
from tiny_tokenizer import tiny_tokenizer

from hf_optim.runs.record import Record

RECIPE = "steps: [{technique: rtn, bits: 4, group_size: 16}]\n"
CHECKPOINT = {
    "config.json",
    "model.safetensors",
    "hf_optim.json",
    "README.md",
    "tokenizer.json",
    "tokenizer_config.json",
}

# The logits of a model as numbers that JSON stores exactly.
LOGITS = """
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM
def logits(model):
    ids = torch.arange(3, 35).reshape(2, 16)
    with torch.no_grad():
        return model.eval()(ids).logits.double().tolist()
"""


@pytest.fixture(scope="module")
def hub():
    with hub_double() as double:
        yield double


@pytest.fixture(scope="module")
def stock(hub, tmp_path_factory):
    """A user with stock transformers, without hf_optim, with a separate cache."""
    session = PythonSession(hub.environment(tmp_path_factory.mktemp("stock")), LOGITS, stock=True)
    yield session
    session.close()


@pytest.fixture(scope="module")
def ours(hub, tmp_path_factory):
    """The author, with hf_optim."""
    begin = "import os, hf_optim\n" + IMPORTS + LOGITS
    session = PythonSession(hub.environment(tmp_path_factory.mktemp("ours")), begin)
    yield session
    session.close()


@pytest.fixture(scope="module")
def base(hub, ours, stock, tmp_path_factory):
    """A dense model on the Hub, uploaded with stock transformers."""
    home = tmp_path_factory.mktemp("base")
    tiny_llama(vocab_size=259).save_pretrained(home)
    tiny_tokenizer().save_pretrained(home)
    stock.run(f"AutoModelForCausalLM.from_pretrained({str(home)!r}).push_to_hub('me/base')")
    stock.run(f"AutoTokenizer.from_pretrained({str(home)!r}).push_to_hub('me/base')")
    return "me/base"


@pytest.fixture(scope="module")
def compressed(base, ours, tmp_path_factory):
    """A checkpoint made from the model on the Hub by the command line."""
    home = tmp_path_factory.mktemp("compressed")
    (home / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
    done = ours.command(["compress", base, "--recipe", home / "recipe.yaml", "--output", home / "small"])
    assert done.status == 0, done.err
    return home / "small"


@pytest.fixture(scope="module")
def pushed(compressed, ours):
    done = ours.command(["push", compressed, "me/small"])
    assert done.status == 0, done.err
    return done


@pytest.fixture(scope="module")
def in_memory(base, ours):
    """A model optimized in memory and pushed with its own method, and its logits in memory."""
    return ours.run(f"""
model = AutoModelForCausalLM.from_pretrained({base!r})
model = hf_optim.optimize(model, [{{"technique": "rtn", "bits": 4, "group_size": 16}}],
                          tokenizer=AutoTokenizer.from_pretrained({base!r}))
commit = model.push_to_hub("me/memory", tags=["mine"], commit_message="first light")
result = {{"url": commit.commit_url, "logits": logits(model)}}
""")


def test_compress_takes_a_hub_id_and_records_its_commit(hub, base, compressed):
    record = Record.read(compressed)
    assert record.base_model["id"] == "me/base"
    assert record.base_model["revision"] == hub.repos["me/base"].branches["main"]


def test_push_uploads_the_checkpoint_in_one_commit(hub, compressed, pushed):
    repo = hub.repos["me/small"]
    assert set(repo.files) >= CHECKPOINT
    assert repo.messages == ["initial commit", "Upload with hf-optim"]
    assert pushed.out.strip() == f"{hub.url}/me/small/commit/{repo.branches['main']}"
    for name in CHECKPOINT:
        assert repo.files[name].content == (compressed / name).read_bytes(), name
    weights = repo.files["model.safetensors"]
    assert weights.lfs
    assert weights.sha256 == hashlib.sha256((compressed / "model.safetensors").read_bytes()).hexdigest()
    assert not any(path.startswith(".") for path in repo.files.keys() - {".gitattributes"})


@pytest.mark.slow
def test_push_on_a_terminal_draws_one_line(hub, compressed, tmp_path):
    environment = {**os.environ, **hub.environment(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    del environment["HF_HUB_DISABLE_PROGRESS_BARS"]
    command = [sys.executable, "-m", "hf_optim.cli", "push", str(compressed), "me/watched"]
    status, seen = run_on_terminal(command, environment)
    assert status == 0, seen.written
    assert "uploading to me/watched" in seen.written
    assert {frame.split(":")[0].split(",")[0] for frame in seen.frames} == {"uploading to me/watched"}
    assert not [
        word for word in ("\x1b[A", "Processing Files", "model.safetensors", "it/s", "B/s") if word in seen.written
    ]
    assert seen.screen[-2].startswith(f"{hub.url}/me/watched/commit/")


def test_the_card_on_the_hub_is_the_rendered_one(hub, base, pushed):
    card = ModelCard(hub.repos["me/small"].files["README.md"].content.decode())
    assert card.data.base_model == base
    assert card.data.pipeline_tag == "text-generation"
    assert "## Recipe" in card.text


def test_stock_transformers_loads_it_from_the_hub_with_the_same_bits(stock, ours, compressed, pushed):
    theirs = stock.run("result = logits(AutoModelForCausalLM.from_pretrained('me/small'))")
    assert theirs == ours.run(f"result = logits(AutoModelForCausalLM.from_pretrained({str(compressed)!r}))")
    assert (
        stock.run("result = AutoTokenizer.from_pretrained('me/small')('ab')['input_ids']")
        == tiny_tokenizer()("ab")["input_ids"]
    )
    assert stock.run("import sys; result = [n for n in sys.modules if n.startswith('hf_optim.')]") == []


def test_push_to_hub_of_a_model_in_memory(hub, stock, in_memory):
    repo = hub.repos["me/memory"]
    assert in_memory["url"] == f"{hub.url}/me/memory/commit/{repo.branches['main']}"
    assert repo.messages[-1] == "first light"
    assert set(repo.files) >= CHECKPOINT
    assert repo.files["model.safetensors"].lfs
    assert json.loads(repo.files["hf_optim.json"].content)["finished"] is True
    assert stock.run("result = logits(AutoModelForCausalLM.from_pretrained('me/memory'))") == in_memory["logits"]


def test_push_to_hub_keeps_our_card_and_adds_tags(hub, in_memory):
    card = ModelCard(hub.repos["me/memory"].files["README.md"].content.decode())
    assert "mine" in card.data.tags
    assert "## Recipe" in card.text


def test_auto_runs_the_checkpoint_from_the_hub(ours, pushed):
    found = ours.run("""
model = AutoModelForCausalLM.from_pretrained("me/small", optim_config="auto")
plain = AutoModelForCausalLM.from_pretrained("me/small")
result = {"auto": logits(model), "plain": logits(plain)}
""")
    auto, plain = (torch_of(found[key]) for key in ("auto", "plain"))
    assert (auto - plain).abs().max() <= 1e-4 * plain.abs().max()


def torch_of(values):
    import torch

    return torch.tensor(values, dtype=torch.float64)


def test_weights_of_an_earlier_push_are_removed(hub, ours, base):
    ours.run(f"""
model = AutoModelForCausalLM.from_pretrained({base!r}, optim_config=[{{"technique": "rtn", "bits": 8}}])
model.push_to_hub("me/shards")
model.push_to_hub("me/shards", max_shard_size="20KB")
""")
    files = hub.repos["me/shards"].files
    shards = [name for name in files if name.startswith("model-")]
    assert len(shards) > 1
    assert "model.safetensors" not in files
    assert set(json.loads(files["model.safetensors.index.json"].content)["weight_map"].values()) == set(shards)


def test_a_branch_is_created_and_pushed_to(hub, ours, stock, compressed, pushed):
    done = ours.command(["push", compressed, "me/small", "--revision", "w4"])
    assert done.status == 0, done.err
    repo = hub.repos["me/small"]
    assert set(repo.commits[repo.branches["w4"]]) >= CHECKPOINT
    assert (
        stock.run("result = type(AutoModelForCausalLM.from_pretrained('me/small', revision='w4')).__name__")
        == "LlamaForCausalLM"
    )


def test_private_repositories_need_the_token(hub, ours, compressed):
    assert ours.command(["push", compressed, "me/secret", "--private"]).status == 0
    assert hub.repos["me/secret"].private
    ours.run("token = os.environ.pop('HF_TOKEN')")
    try:
        done = ours.command(["compress", "me/secret", "--recipe", "w8a8", "--output", compressed.parent / "none"])
    finally:
        ours.run("os.environ['HF_TOKEN'] = token")
    assert_one_line(done, "me/secret")


def assert_one_line(done, *parts):
    assert done.status == 2
    assert done.out == ""
    complaints = [line for line in done.err.splitlines() if line.startswith("hf-optim: ")]
    assert len(complaints) == 1
    assert "Traceback" not in done.err
    for part in parts:
        assert part in complaints[0]


def test_push_without_a_token(ours, compressed):
    ours.run("token = os.environ.pop('HF_TOKEN')")
    try:
        done = ours.command(["push", compressed, "me/other"])
    finally:
        ours.run("os.environ['HF_TOKEN'] = token")
    assert_one_line(done, "me/other", "hf auth login", "HF_TOKEN")


def test_push_with_a_wrong_token(ours, compressed):
    ours.run("os.environ['HF_TOKEN'] = 'hf_wrong'")
    try:
        done = ours.command(["push", compressed, "me/other"])
    finally:
        ours.run(f"os.environ['HF_TOKEN'] = {TOKEN!r}")
    assert_one_line(done, "the Hub refused me/other", "401", "Invalid username or password", "hf auth whoami")


def test_push_without_write_access(hub, ours, compressed):
    done = ours.command(["push", compressed, "them/model"])
    assert_one_line(done, "the Hub refused them/model", "403", "under the namespace them")
    assert "them/model" not in hub.repos


def test_push_to_an_invalid_name(ours, compressed):
    assert_one_line(ours.command(["push", compressed, "a/b/c"]), "'a/b/c'", "owner/name")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda home: (home / "hf_optim.json").unlink(), "has no hf_optim.json"),
        (lambda home: (home / "README.md").unlink(), "has no README.md"),
        (lambda home: (home / "model.safetensors").unlink(), "no safetensors weights"),
        (lambda home: (home / "hf_optim.json").write_text("{"), "is corrupt"),
        (lambda home: unfinish(home), "from the middle of a recipe"),
        (lambda home: shutil.rmtree(home), "no directory"),
    ],
    ids=["no record", "no card", "no weights", "broken record", "unfinished", "nothing there"],
)
def test_push_of_anything_but_a_finished_checkpoint(hub, ours, compressed, tmp_path, spoil, message):
    home = tmp_path / "copy"
    shutil.copytree(compressed, home)
    spoil(home)
    requests = len(hub.requests)
    assert_one_line(ours.command(["push", home, "me/never"]), message)
    assert len(hub.requests) == requests


def unfinish(home):
    record = json.loads((home / "hf_optim.json").read_text())
    (home / "hf_optim.json").write_text(json.dumps({**record, "finished": False}))


def test_a_model_that_is_not_on_the_hub(ours, tmp_path):
    done = ours.command(["compress", "me/nothing", "--recipe", "w8a8", "--output", tmp_path / "out"])
    assert_one_line(done, "me/nothing")
