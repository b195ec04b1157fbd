"""A killed streamed run resumes where it stopped, and every file ends up with the same bytes."""

from __future__ import annotations

import os
import shutil
import signal
import time
from pathlib import Path

import pytest
from streamed_and_blockwise import random_batches, streamed
from tiny_models import tiny_llama, tiny_t5
from tiny_tokenizer import tiny_tokenizer

from hf_optim import CheckpointError
from hf_optim.calibration.streamed import driver, materialize, output
from hf_optim.cli import main
from hf_optim.runs.record import Record
from hf_optim.toolkit import topology

BLOCKS = 8
GPTQ = ({"technique": "nm", "score": "activation"}, {"technique": "gptq", "bits": 4, "group_size": 16})
STATIC = ({"technique": "rtn", "bits": 8, "activations": "int8", "dynamic": False},)


class Shop:
    """A folder with a checkpoint, data and a recipe for the command."""

    def __init__(self, home):
        self.home, self.model, self.data = home, home / "model", home / "data.jsonl"
        tiny_llama(vocab_size=259, num_hidden_layers=BLOCKS).save_pretrained(self.model, max_shard_size="60KB")
        tiny_tokenizer().save_pretrained(self.model)
        self.data.write_text('{"text": "the cat sat on a mat and saw what the dog had done to it"}\n' * 40)
        self.recipe = home / "recipe.json"
        self.recipe.write_text(
            '{"steps": [{"technique": "nm", "score": "activation"}, '
            '{"technique": "gptq", "bits": 4, "group_size": 16, "true_sequential": true}], '
            '"calibration": {"samples": 8, "seq_len": 32}, "driver": "streamed"}'
        )

    def words(self, name, *options):
        words = ["compress", self.model, "--recipe", self.recipe, "--output", self.home / name]
        return [str(word) for word in (*words, "--calibration", self.data, "--device", "cpu", *options)]


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    return Shop(tmp_path_factory.mktemp("shop"))


@pytest.fixture(autouse=True)
def no_plots(monkeypatch):
    monkeypatch.setattr("hf_optim.evaluation.cards.card.Card._draw_plots", lambda self, directory: [])


# Commands run in forks of the session, which can be killed.
BEGIN = """
import os
from forks import fork
from hf_optim.cli import main

def begin(words):
    child = fork()
    if child == 0:
        os._exit(main(words))
    return child
"""


@pytest.fixture(scope="module")
def victims(python):
    python.run(BEGIN)
    return python


def killed_after(victims, words, journal, blocks):
    """Run the command in a child process, and kill it with SIGKILL once this many blocks are completed."""
    child = victims.run(f"result = begin({words!r})")
    deadline = time.monotonic() + 240
    while len(list(journal.glob("state-*.sum"))) < blocks:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    os.kill(child, signal.SIGKILL)
    ended = victims.run(f"result = os.WTERMSIG(os.waitpid({child}, 0)[1])")
    assert ended == signal.SIGKILL
    return len(list(journal.glob("state-*.sum")))


def test_killed_twice_it_ends_with_the_same_bytes(shop, victims):
    assert main(shop.words("undisturbed")) == 0
    journal = shop.home / ".killed.journal"
    first = killed_after(victims, shop.words("killed"), journal, 1)
    second = killed_after(victims, shop.words("killed", "--resume"), journal, first + 2)
    assert 1 <= first < second < BLOCKS
    assert not (shop.home / "killed").exists()
    finished = list(journal.glob("state-*.sum"))
    assert main(shop.words("killed", "--resume")) == 0
    assert len(finished) == second
    one, other = shop.home / "killed", shop.home / "undisturbed"
    names = {path.name for path in one.iterdir() if path.is_file()}
    assert names == {path.name for path in other.iterdir() if path.is_file()}
    for name in names - {"hf_optim.json", "README.md"}:  # these contain timings
        assert (one / name).read_bytes() == (other / name).read_bytes(), name
    ours, theirs = Record.read(one), Record.read(other)
    assert (ours.steps, ours.coverage, ours.traits) == (theirs.steps, theirs.coverage, theirs.traits)
    assert ours.stages[0]["blocks"] == BLOCKS - second
    assert not journal.exists()


def test_another_recipe_cannot_resume_it(shop, victims, capsys):
    journal = shop.home / ".other.journal"
    killed_after(victims, shop.words("other"), journal, 1)
    assert main([*shop.words("other", "--resume"), "--samples", "4"]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "another" in line
    assert "start without --resume" in line
    assert list(journal.glob("state-*.safetensors"))


class Stop(Exception):
    """Simulates a kill, where a child process would show nothing more."""


@pytest.mark.many
@pytest.mark.parametrize("make", [tiny_llama, tiny_t5])
@pytest.mark.parametrize("steps", [GPTQ, STATIC], ids=["nm + gptq", "static"])
@pytest.mark.parametrize("when", ["before the state is written", "after the shard", "in the outputs"])
def test_stopped_anywhere_in_a_block(make, steps, when, tmp_path, monkeypatch):
    home, batches = tmp_path / "model", random_batches(make())
    make().save_pretrained(home)
    streamed(home, steps, batches, tmp_path / "undisturbed")
    with monkeypatch.context() as patch:
        count = 0

        def stopping(stock, at):
            def stop(*args, **kwargs):
                nonlocal count
                count += 1
                if count == at:
                    raise Stop
                return stock(*args, **kwargs)

            return stop

        place, name, at = {
            "before the state is written": (output, "dump_module_state", 2),
            "after the shard": (output.snapshot, "take", 2),
            "in the outputs": (driver.StreamedDriver, "_compute_outputs", 1),
        }[when]
        patch.setattr(place, name, stopping(getattr(place, name), at))
        with pytest.raises(Stop):
            streamed(home, steps, batches, tmp_path / "stopped")
    run = streamed(home, steps, batches, tmp_path / "stopped", resume=True)
    assert run.record.stages[0]["blocks"] == len(topology.blocks(make())) - 1
    for path in (tmp_path / "undisturbed").glob("*.safetensors"):
        assert (tmp_path / "stopped" / path.name).read_bytes() == path.read_bytes(), path.name


def flip(path):
    content = bytearray(path.read_bytes())
    content[-9] ^= 4
    path.write_bytes(content)


def swap(path):
    other = path.with_name(path.name.replace("00001", "00002", 1))
    first, second = path.read_bytes(), other.read_bytes()
    path.write_bytes(second)
    other.write_bytes(first)


DAMAGES = {
    "flipped": flip,
    "swapped": swap,
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:40]),
    "empty": lambda path: path.write_bytes(b""),
    "missing": lambda path: path.unlink(),
    "foreign": lambda path: path.write_bytes(b"not ours"),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
}


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A checkpoint, its batches, the undisturbed result, and the journal of a run that stopped behind the blocks."""
    shop = tmp_path_factory.mktemp("stopped")
    home, batches = shop / "model", random_batches(tiny_llama())
    tiny_llama().save_pretrained(home)
    streamed(home, GPTQ, batches, shop / "undisturbed")
    stop_behind_the_blocks(home, batches, shop / "out")
    return shop, batches


@pytest.mark.many
@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("kind", ["state-00001.safetensors", "model-00001-of-00003.safetensors"])
def test_a_damaged_block_is_calibrated_again(stopped, tmp_path, caplog, damage, kind):
    shop, batches = stopped
    shutil.copytree(shop / ".out.journal", tmp_path / ".out.journal")
    damaged = tmp_path / ".out.journal" / kind
    DAMAGES[damage](damaged)
    run = streamed(shop / "model", GPTQ, batches, tmp_path / "out", resume=True)
    assert run.record.stages[0]["blocks"] == (2 if damage == "swapped" else 1)
    assert "computed again" in caplog.text
    for path in (shop / "undisturbed").glob("*.safetensors"):
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes(), path.name


@pytest.mark.parametrize("content", ["", "[]", "{", "[" * 100_000, '{"format": 2}', "null", "\x00"])
def test_a_damaged_or_old_header_is_refused(stopped, tmp_path, content):
    shop, batches = stopped
    shutil.copytree(shop / ".out.journal", tmp_path / ".out.journal")
    (tmp_path / ".out.journal" / "journal.json").write_text(content)
    with pytest.raises(CheckpointError, match="start without --resume"):
        streamed(shop / "model", GPTQ, batches, tmp_path / "out", resume=True)
    assert (tmp_path / ".out.journal" / "state-00001.safetensors").exists()


def stop_behind_the_blocks(home, batches, output):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(driver.StreamedDriver, "_calibrate_non_blocks", lambda self: (_ for _ in ()).throw(Stop))
        with pytest.raises(Stop):
            streamed(home, GPTQ, batches, output)


def test_a_weight_changed_in_place_is_noticed(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "model")
    batches = random_batches(tiny_llama())
    stop_behind_the_blocks(tmp_path / "model", batches, tmp_path / "out")
    shard = tmp_path / "model" / "model.safetensors"
    before = shard.stat()
    content = bytearray(shard.read_bytes())
    content[8 + int.from_bytes(content[:8], "little")] ^= 1  # the first byte of the first tensor
    shard.write_bytes(content)
    os.utime(shard, ns=(before.st_atime_ns, before.st_mtime_ns))  # same size, same time
    with pytest.raises(CheckpointError, match="another model; start without --resume"):
        streamed(tmp_path / "model", GPTQ, batches, tmp_path / "out", resume=True)


def test_the_model_may_be_named_by_another_path(stopped, tmp_path, monkeypatch):
    shop, batches = stopped
    shutil.copytree(shop / ".out.journal", tmp_path / ".out.journal")
    monkeypatch.chdir(shop)
    run = streamed(Path("model"), GPTQ, batches, tmp_path / "out", resume=True)
    assert run.record.stages[0].get("blocks", 0) == 0


def test_a_run_without_data_skips_completed_blocks(tmp_path, monkeypatch):
    home = tmp_path / "model"
    tiny_llama().save_pretrained(home)
    rtn = ({"technique": "rtn", "bits": 4, "group_size": 16},)
    streamed(home, rtn, None, tmp_path / "undisturbed")
    with monkeypatch.context() as patch:
        patch.setattr(driver.StreamedDriver, "_calibrate_non_blocks", lambda self: (_ for _ in ()).throw(Stop))
        with pytest.raises(Stop):
            streamed(home, rtn, None, tmp_path / "out")
    read = []
    stock = materialize.materialize
    monkeypatch.setattr(driver, "materialize", lambda *args: read.append(args) or stock(*args))
    streamed(home, rtn, None, tmp_path / "out", resume=True)
    assert not read
    for path in (tmp_path / "undisturbed").glob("*.safetensors"):
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()
    config = "config.json"
    assert (tmp_path / "out" / config).read_bytes() == (tmp_path / "undisturbed" / config).read_bytes()
