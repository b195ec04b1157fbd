"""``replace_directory``: readers see the complete old directory or the complete new one."""

from __future__ import annotations

import errno
import os
import signal
import stat
import subprocess
import sys
import time

import pytest

from hf_optim import CheckpointError
from hf_optim.checkpoints import atomic
from hf_optim.checkpoints.atomic import replace_directory


def files(directory):
    return {str(p.relative_to(directory)): p.read_text() for p in sorted(directory.rglob("*")) if p.is_file()}


def never(name):
    return False


def test_a_new_directory_appears_whole(tmp_path):
    target = tmp_path / "deep" / "out"
    with replace_directory(target, never) as staging:
        (staging / "a").write_text("1")
        assert not target.exists()
    assert files(target) == {"a": "1"}
    assert [p.name for p in target.parent.iterdir()] == ["out"]


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.skipif(os.name == "nt", reason="modes of POSIX")
@pytest.mark.parametrize(("umask", "expected"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_files_have_the_mode_of_the_umask(umask, expected, tmp_path):
    """The safetensors library writes for the owner alone. What the body did not write keeps its mode."""
    (tmp_path / "out").mkdir()
    for name, own in (("notes.txt", 0o604), ("elsewhere", 0o600)):
        (tmp_path / "out" / name).write_text(name)
        (tmp_path / "out" / name).chmod(own)
    before = os.umask(umask)
    try:
        with replace_directory(tmp_path / "out", never) as staging:
            for name in ("model.safetensors", "plots/layers.png"):
                (staging / name).parent.mkdir(exist_ok=True)
                (staging / name).write_text(name)
                (staging / name).chmod(0o600)
            (staging / "link").symlink_to("model.safetensors")
            os.link(tmp_path / "out" / "elsewhere", staging / "linked")
    finally:
        os.umask(before)
    assert mode(tmp_path / "out" / "model.safetensors") == mode(tmp_path / "out" / "plots" / "layers.png") == expected
    assert mode(tmp_path / "out" / "notes.txt") == 0o604
    assert mode(tmp_path / "out" / "linked") == 0o600
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(
        ["model.safetensors", "plots", "link", "linked", "notes.txt", "elsewhere"]
    )


def test_other_files_are_carried_over_and_stale_ones_are_not(tmp_path):
    (tmp_path / "out" / "runs").mkdir(parents=True)
    for name, text in (
        ("model-00001-of-00002.safetensors", "old"),
        ("tokenizer.json", "t"),
        ("runs/log", "l"),
        ("a", "0"),
    ):
        (tmp_path / "out" / name).write_text(text)
    with replace_directory(tmp_path / "out", lambda name: name.startswith("model")) as staging:
        (staging / "a").write_text("1")
    assert files(tmp_path / "out") == {"a": "1", "runs/log": "l", "tokenizer.json": "t"}


@pytest.mark.parametrize("swap", [True, False])
def test_an_error_leaves_the_old_directory(tmp_path, monkeypatch, swap):
    if not swap:
        monkeypatch.setattr(atomic, "_swap", lambda one, other: False)
    out = tmp_path / "out"
    with replace_directory(out, never) as staging:
        (staging / "a").write_text("old")
    with pytest.raises(KeyError), replace_directory(out, never) as staging:
        raise KeyError((staging / "a").write_text("new"))
    assert files(out) == {"a": "old"}
    with replace_directory(out, never) as staging:
        (staging / "a").write_text("new")
    assert files(out) == {"a": "new"}
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_full_disk_gives_a_readable_error(tmp_path):
    out = tmp_path / "out"
    with replace_directory(out, never) as staging:
        (staging / "a").write_text("old")
    with pytest.raises(CheckpointError, match="the disk is full"), replace_directory(out, never):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert files(out) == {"a": "old"}


def test_a_killed_writer_leaves_the_old_directory_and_its_leftovers_are_removed(tmp_path):
    out = tmp_path / "out"
    with replace_directory(out, never) as staging:
        (staging / "a").write_text("old")
    code = (
        "import sys, time; from pathlib import Path; from hf_optim.checkpoints.atomic import replace_directory\n"
        "with replace_directory(Path(sys.argv[1]), lambda name: False) as staging:\n"
        "    (staging / 'a').write_text('half'); print('writing', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(out)], stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout.readline().strip() == "writing"
        writer.send_signal(signal.SIGKILL)
        writer.wait()
    assert files(out) == {"a": "old"}
    assert sorted(path.name.split("-")[0] for path in tmp_path.iterdir()) == [".out.lock", ".out.saving", "out"]
    with replace_directory(out, never) as staging:
        (staging / "a").write_text("new")
    assert files(out) == {"a": "new"}
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_kill_between_the_two_renames_is_repaired(tmp_path):
    old = tmp_path / ".out.old-999999999"
    old.mkdir()
    (old / "a").write_text("old")
    with replace_directory(tmp_path / "out", never) as staging:
        assert files(tmp_path / "out") == {"a": "old"}
        (staging / "b").write_text("new")
    assert files(tmp_path / "out") == {"a": "old", "b": "new"}


def test_a_reader_never_sees_a_partial_directory(tmp_path):
    out = tmp_path / "out"
    with replace_directory(out, never) as staging:
        (staging / "a").write_text("0")
        (staging / "b").write_text("0")
    code = (
        "import sys; from pathlib import Path; from hf_optim.checkpoints.atomic import replace_directory\n"
        "for i in range(150):\n"
        "    with replace_directory(Path(sys.argv[1]), lambda name: False) as staging:\n"
        "        (staging / 'a').write_text(str(i)); (staging / 'b').write_text(str(i))"
    )
    seen = 0
    with subprocess.Popen([sys.executable, "-c", code, str(out)]) as writer:
        while writer.poll() is None:
            handle = os.open(out, os.O_RDONLY)  # stays the same directory if its name changes
            try:
                pair = []
                for name in ("a", "b"):
                    part = os.open(name, os.O_RDONLY, dir_fd=handle)
                    pair.append(os.read(part, 10))
                    os.close(part)
                assert pair[0] == pair[1]
                seen += 1
            except FileNotFoundError:
                pass  # the old directory was removed between two opens
            finally:
                os.close(handle)
            time.sleep(0.001)
    assert writer.returncode == 0
    assert seen > 10


def test_a_file_in_the_way_is_refused(tmp_path):
    (tmp_path / "out").write_text("a file")
    with pytest.raises(CheckpointError, match="is a file"), replace_directory(tmp_path / "out", never):
        pass


def test_a_link_stays_and_its_directory_is_replaced(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    with replace_directory(tmp_path / "link", never) as staging:
        (staging / "a").write_text("1")
    assert (tmp_path / "link").is_symlink()
    assert files(tmp_path / "real") == {"a": "1"}
    (tmp_path / "to come").symlink_to("later")
    with replace_directory(tmp_path / "to come", never) as staging:
        (staging / "a").write_text("2")
    assert files(tmp_path / "later") == {"a": "2"}
    assert {path.name for path in tmp_path.iterdir()} == {"real", "link", "to come", "later"}


def test_links_in_the_old_directory_are_carried_over_as_links(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "d").write_text("d")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "folder").symlink_to(tmp_path / "data")
    (tmp_path / "out" / "dangling").symlink_to("nowhere")
    with replace_directory(tmp_path / "out", never) as staging:
        (staging / "a").write_text("1")
    assert os.readlink(tmp_path / "out" / "folder") == str(tmp_path / "data")
    assert os.readlink(tmp_path / "out" / "dangling") == "nowhere"
    assert files(tmp_path / "data") == {"d": "d"}


@pytest.mark.parametrize("place", [".", "inside"])
def test_the_current_directory_is_not_replaced(tmp_path, monkeypatch, place):
    (tmp_path / "out" / "inside").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "out" / place)
    for spelling in ("." if place == "." else "..", tmp_path / "out"):
        with pytest.raises(CheckpointError, match="current directory"), replace_directory(spelling, never):
            raise AssertionError("the work has begun")
    assert os.listdir(tmp_path / "out") == ["inside"]


@pytest.mark.parametrize(("where", "told"), [("out", "is a mount point"), ("out/disk", "holds the mount point")])
def test_a_mount_point_is_refused_before_the_work(tmp_path, monkeypatch, where, told):
    (tmp_path / "out" / "disk").mkdir(parents=True)
    monkeypatch.setattr(atomic, "_mount_points", lambda: [tmp_path / where])
    with pytest.raises(CheckpointError, match=f"{told}.*NAME"), replace_directory(tmp_path / "out", never):
        raise AssertionError("the work has begun")


@pytest.mark.parametrize("number", [errno.EXDEV, errno.EBUSY, errno.EACCES, errno.EROFS])
def test_a_directory_that_cannot_be_renamed_is_refused_before_the_work(tmp_path, monkeypatch, number):
    (tmp_path / "out").mkdir()

    def rename(*args):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(atomic.os, "rename", rename)
    with pytest.raises(CheckpointError, match=os.strerror(number)), replace_directory(tmp_path / "out", never):
        raise AssertionError("the work has begun")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_exchange_that_fails_at_the_end_leaves_the_old_directory(tmp_path, monkeypatch):
    out = tmp_path / "out"
    out.mkdir()
    (out / "a").write_text("old")
    stock = os.rename

    def rename(one, other):
        if ".saving-" in str(one):
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
        stock(one, other)

    monkeypatch.setattr(atomic, "_swap", lambda one, other: False)
    monkeypatch.setattr(atomic.os, "rename", rename)
    with pytest.raises(CheckpointError, match="untouched"), replace_directory(out, never) as staging:
        (staging / "a").write_text("new")
    assert files(out) == {"a": "old"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_names_with_wildcards_meet_only_their_own_leftovers(tmp_path):
    for name in (".a[1].saving-77", ".ab.saving-77", ".a*.saving-77", ".a*.saving-x"):
        (tmp_path / name).mkdir()
    for name in ("a[1]", "a*"):
        with replace_directory(tmp_path / name, never) as staging:
            (staging / "f").write_text("1")
    assert {path.name for path in tmp_path.iterdir()} == {"a[1]", "a*", ".ab.saving-77", ".a*.saving-x"}
