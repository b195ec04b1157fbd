"""Work files: whatever stands in the place of one makes way for it."""

from __future__ import annotations

import os

import pytest

from hf_optim import CheckpointError
from hf_optim.runs import folder_lock, work_files


@pytest.mark.parametrize("name", ["part.safetensors", "part.safetensors.sum"])
def test_a_directory_in_place_of_a_file_is_replaced(name, tmp_path):
    path = tmp_path / "part.safetensors"
    (tmp_path / name / "inner").mkdir(parents=True)
    assert not work_files.is_intact(path, "run")
    work_files.unseal(path)
    path.write_bytes(b"content")
    work_files.seal(path, "run")
    assert work_files.is_intact(path, "run")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("loop", "leads to itself"),
        ("x" * 300, "too long"),
        ("é" * 120, "too long"),
        ("a\nb", "control characters"),
        ("a\0b", "cannot be the name of a directory"),
        ("/", "root of a file system"),
    ],
)
def test_a_name_that_no_directory_can_have(name, message, tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(CheckpointError, match=message) as raised, folder_lock.locked(os.path.join(tmp_path, name)):
        pass
    assert len(str(raised.value)) < 500
    assert str(raised.value).isprintable()
