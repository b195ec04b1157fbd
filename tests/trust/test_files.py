"""Files inside the folder of a checkpoint, and the links of the Hub's cache."""

from __future__ import annotations

import os

import pytest

from hf_optim import CheckpointError
from hf_optim.trust.files import require_inside, require_publishable, require_regular


@pytest.fixture
def home(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "secret.json").write_text("{}")
    return tmp_path / "model"


@pytest.fixture
def snapshot(tmp_path):
    """A folder like those of the Hub's cache, with one file."""
    repository = tmp_path / "models--org--name"
    home = repository / "snapshots" / "0123abcd"
    home.mkdir(parents=True)
    (repository / "blobs").mkdir()
    (repository / "blobs" / "f00").write_text("{}")
    (home / "config.json").symlink_to("../../blobs/f00")
    return home


def test_plain_files_are_found(home):
    (home / "a.json").write_text("{}")
    (home / "part").mkdir()
    (home / "part" / "b.json").write_text("{}")
    (home / "c.json").symlink_to("a.json")
    for name in ("a.json", "part/b.json", "c.json"):
        assert require_inside(home, name) == home / name
    require_regular(home)
    require_publishable(home)


@pytest.mark.parametrize(
    "name", ["../secret.json", "part/../../secret.json", "/etc/passwd", "", "a\0b", "..\\secret", 5, None]
)
def test_names_that_lead_elsewhere(home, name):
    with pytest.raises(CheckpointError):
        require_inside(home, name)


def test_links_that_lead_elsewhere(home):
    (home / "link.json").symlink_to("../secret.json")
    for check in (
        lambda: require_inside(home, "link.json"),
        lambda: require_regular(home),
        lambda: require_publishable(home),
    ):
        with pytest.raises(CheckpointError, match=r"'link\.json' of .* is a link to .*secret\.json"):
            check()


def test_a_folder_that_is_a_link_elsewhere(home):
    (home.parent / "other").mkdir()
    (home.parent / "other" / "a.safetensors").write_text("")
    (home / "part").symlink_to("../other")
    for check in (lambda: require_inside(home, "part/a.safetensors"), lambda: require_publishable(home)):
        with pytest.raises(CheckpointError, match="is a link to"):
            check()


def test_pipes_and_dangling_links_do_not_hang(home):
    os.mkfifo(home / "pipe.json")
    for check in (
        lambda: require_inside(home, "pipe.json"),
        lambda: require_regular(home),
        lambda: require_publishable(home),
    ):
        with pytest.raises(CheckpointError, match="a pipe, not a regular file"):
            check()
    (home / "pipe.json").unlink()
    (home / "loop.json").symlink_to("loop.json")
    with pytest.raises(CheckpointError, match=r"loop\.json"):
        require_inside(home, "loop.json")
    require_regular(home)


def test_a_checkpoint_named_through_a_link_is_opened(home):
    (home / "a.json").write_text("{}")
    (home.parent / "alias").symlink_to("model")
    assert require_inside(home.parent / "alias", "a.json").is_file()


def test_the_links_of_the_cache_are_allowed(snapshot):
    assert require_inside(snapshot, "config.json").read_text() == "{}"
    require_regular(snapshot)


@pytest.mark.parametrize("target", ["../../../secret.json", "../../blobs/out", "../../../models--org--other/blobs/f00"])
def test_other_links_of_a_cache_are_not(snapshot, target):
    cache = snapshot.parents[2]
    (cache / "secret.json").write_text("{}")
    (cache / "models--org--other" / "blobs").mkdir(parents=True)
    (cache / "models--org--other" / "blobs" / "f00").write_text("{}")
    (snapshot.parents[1] / "blobs" / "out").symlink_to("../../secret.json")
    (snapshot / "bad.json").symlink_to(target)
    with pytest.raises(CheckpointError, match="outside the checkpoint"):
        require_inside(snapshot, "bad.json")


def test_blobs_that_are_a_link_elsewhere_are_not(snapshot):
    blobs = snapshot.parents[1] / "blobs"
    blobs.rename(snapshot.parents[2] / "private")
    blobs.symlink_to("../private")
    with pytest.raises(CheckpointError, match="outside the checkpoint"):
        require_inside(snapshot, "config.json")
