"""A killed streamed run resumes where it stopped, and every file ends up with the same bytes."""

from __future__ import annotations

import os
import signal
import time

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
from hf_optim.cli import main

def begin(words):
    child = os.fork()
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
    while len(list(journal.glob("state-*.safetensors"))) < blocks:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    os.kill(child, signal.SIGKILL)
    ended = victims.run(f"result = os.WTERMSIG(os.waitpid({child}, 0)[1])")
    assert ended == signal.SIGKILL
    return len(list(journal.glob("state-*.safetensors")))


def test_killed_twice_it_ends_with_the_same_bytes(shop, victims):
    assert main(shop.words("undisturbed")) == 0
    journal = shop.home / ".killed.journal"
    first = killed_after(victims, shop.words("killed"), journal, 1)
    second = killed_after(victims, shop.words("killed", "--resume"), journal, first + 2)
    assert 1 <= first < second < BLOCKS
    assert not (shop.home / "killed").exists()
    finished = {path: path.stat().st_mtime_ns for path in journal.glob("state-*.safetensors")}
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


def test_a_damaged_journal_is_named(tmp_path, monkeypatch):
    home, batches = tmp_path / "model", random_batches(tiny_llama())
    tiny_llama().save_pretrained(home)
    with monkeypatch.context() as patch:
        patch.setattr(driver.StreamedDriver, "_calibrate_non_blocks", lambda self: (_ for _ in ()).throw(Stop))
        with pytest.raises(Stop):
            streamed(home, GPTQ, batches, tmp_path / "out")
    damaged = tmp_path / ".out.journal" / "state-00001.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:40])
    with pytest.raises(CheckpointError, match=r"state-00001\.safetensors cannot be read .*without --resume"):
        streamed(home, GPTQ, batches, tmp_path / "out", resume=True)


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
