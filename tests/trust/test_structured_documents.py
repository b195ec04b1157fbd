"""Reading JSON takes a time that is linear in the size of the document, whatever it holds."""

from __future__ import annotations

import time

import pytest

from hf_optim import CheckpointError
from hf_optim.trust.documents import parse_json, read_json, read_mapping

SIZE = 400_000
HOSTILE = {
    "a text that does not end": '"' + '\\"' * SIZE,
    "marks without texts": '"' * SIZE,
    "a key that occurs twice at the end": "{" + "".join(f'"{n}":1,' for n in range(SIZE // 8)) + '"1":1}',
    "open brackets": "[" * SIZE,
    "a long number": "[" + "1" * SIZE + "]",
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_document_is_refused_at_once(what):
    begun = time.process_time()
    with pytest.raises(CheckpointError, match=r"^x\.json is corrupt \(.{1,320}\)"):
        parse_json(HOSTILE[what], "x.json")
    assert time.process_time() - begun < 2  # quadratic time takes minutes


def test_the_document_is_named_in_messages(tmp_path):
    (tmp_path / "a.json").write_text("[1]")
    assert read_json(tmp_path / "a.json", "a.json of org/name") == [1]
    with pytest.raises(CheckpointError, match=r"^a\.json of org/name is corrupt: it holds a value of type list"):
        read_mapping(tmp_path / "a.json", "a.json of org/name")
    with pytest.raises(CheckpointError, match=r"^b\.json of org/name cannot be read: No such file"):
        read_mapping(tmp_path / "b.json", "b.json of org/name")
