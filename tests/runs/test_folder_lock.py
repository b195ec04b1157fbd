"""Locks of folders, checksums of work files, and errors of a full disk."""

from __future__ import annotations

import errno
import os
import resource
import signal
import subprocess
import sys
import threading

import pytest
import torch

from hf_optim import CheckpointError
from hf_optim.calibration.streamed.spill import spill_folder
from hf_optim.checkpoints.shard_writer import write_shard
from hf_optim.runs import folder_lock, work_files
from hf_optim.runs.folder_lock import locked
from hf_optim.runs.resume_header import remove_work_folder

HOLD = (
    "import sys; from hf_optim.runs.folder_lock import locked\n"
    "with locked(sys.argv[1]):\n"
    "    print('held', flush=True); sys.stdin.readline()"
)


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the lock of ``out``."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "out")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline().strip() == "held"
        yield process
        process.kill()


def test_a_second_process_is_refused_however_it_spells_the_folder(tmp_path, holder, monkeypatch):
    (tmp_path / "link").symlink_to(tmp_path)
    monkeypatch.chdir(tmp_path)
    for spelling in (tmp_path / "out", "out", "./out/", tmp_path / "link" / "out", "link/./out"):
        if spelling == "link/./out":
            (tmp_path / "out").mkdir()
        with pytest.raises(CheckpointError, match=rf"process {holder.pid} on .*another directory"), locked(spelling):
            pass
    with locked(tmp_path / "other"), locked(tmp_path / "out2"):
        pass
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with locked(tmp_path / "out"):
        pass
    assert not list(tmp_path.glob(".*.lock"))


def test_a_lock_can_be_taken_again_by_its_thread_alone(tmp_path):
    refused = []

    def other():
        try:
            with locked(tmp_path / "out"):
                pass
        except CheckpointError as error:
            refused.append(str(error))

    with locked(tmp_path / "out"):
        with locked(tmp_path / "out"):
            pass
        assert (tmp_path / ".out.lock").exists()
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert "another thread" in refused[0]
    assert not (tmp_path / ".out.lock").exists()


def test_without_locks_of_the_file_system_the_file_is_the_lock(tmp_path, monkeypatch):
    def unsupported(*args):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(folder_lock.fcntl, "lockf", unsupported)
    monkeypatch.setattr(folder_lock, "SETTLE", 0.0)
    host = folder_lock.socket.gethostname()
    lock = tmp_path / ".out.lock"
    for process, name, free in ((2**22 + 5, host, True), (os.getppid(), host, False), (1, "elsewhere", False)):
        lock.write_text(f'{{"process": {process}, "host": "{name}"}}')
        if free:
            with locked(tmp_path / "out"):
                pass
            assert not lock.exists()
        else:
            with pytest.raises(CheckpointError, match=f"process {process} on {name}"), locked(tmp_path / "out"):
                pass


@pytest.mark.parametrize("name", ["/", "a\nb", "x" * 254, "a\0b", "y" * 5000])
def test_names_that_no_folder_can_have(tmp_path, name):
    with pytest.raises(CheckpointError), locked(name if name == "/" else f"{tmp_path}/{name}"):
        pass
    assert not list(tmp_path.iterdir())


def test_missing_parents_are_removed_unless_they_are_used(tmp_path):
    with locked(tmp_path / "a" / "b" / "out"):
        assert (tmp_path / "a" / "b").is_dir()
    assert not list(tmp_path.iterdir())
    with locked(tmp_path / "a" / "b" / "out") as real:
        real.mkdir()
    assert real.is_dir()


# -- work files -------------------------------------------------------------------------------------------------------
def test_a_file_is_intact_only_as_it_was_written(tmp_path, caplog):
    file, other = tmp_path / "step-1-a.safetensors", tmp_path / "step-1-b.safetensors"
    file.write_bytes(b"content")
    assert not work_files.is_intact(file, "run")  # killed before its checksum
    work_files.seal(file, "run")
    assert work_files.is_intact(file, "run")
    assert not work_files.is_intact(file, "another run")
    os.link(file, other)
    os.link(tmp_path / "step-1-a.safetensors.sum", tmp_path / "step-1-b.safetensors.sum")
    assert not work_files.is_intact(other, "run")  # the same bytes under another name
    assert "is not used" in caplog.text
    file.unlink()
    file.symlink_to(tmp_path / "elsewhere")
    assert not work_files.is_intact(file, "run")
    os.mkfifo(tmp_path / "pipe")
    assert not work_files.is_intact(tmp_path / "pipe", "run")


def test_only_work_folders_are_removed(tmp_path):
    mine = tmp_path / "results"
    mine.mkdir()
    (mine / "thesis.tex").write_text("years")
    (tmp_path / "link").symlink_to(mine)
    for folder in (mine, tmp_path / "link", mine / "thesis.tex"):
        with pytest.raises(CheckpointError):
            remove_work_folder(folder)
    assert (mine / "thesis.tex").read_text() == "years"


# -- a full disk ------------------------------------------------------------------------------------------------------
def test_a_shard_on_a_full_disk_names_folder_and_room_and_leaves_nothing(tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, before[1]))
    try:
        with pytest.raises(CheckpointError, match=r"disk is full.*\(1.05 MB needed, [\d,.]+ [GM]B free") as caught:
            write_shard(tmp_path / "state-1.safetensors", {"a": torch.zeros(1 << 18)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert str(tmp_path) in str(caught.value)
    assert not list(tmp_path.iterdir())


# -- activations ------------------------------------------------------------------------------------------------------
def test_spilled_activations_of_two_jobs_are_apart_and_stale_ones_removed(tmp_path):
    home = tmp_path / "new" / "spill"
    for name, file in (("activations-0abc1234", "h-0.activations"), ("activations-mine5678", "notes.txt")):
        (home / name).mkdir(parents=True)
        (home / name / file).write_bytes(b"x")
    with spill_folder(home) as one, spill_folder(home) as other:
        assert one != other
        assert {path.name for path in home.glob("activations-*")} == {one.name, other.name, "activations-mine5678"}
    assert [path.name for path in home.iterdir()] == ["activations-mine5678"]
    with spill_folder(tmp_path / "made" / "here") as folder:
        assert folder.is_dir()
    assert not (tmp_path / "made").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot write"), spill_folder(tmp_path / "file"):
        pass
