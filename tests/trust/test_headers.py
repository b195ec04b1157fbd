"""Headers of safetensors files: each departure from the format is an error that names the file, at once."""

from __future__ import annotations

import json
import time

import pytest
import torch
from safetensors.torch import save_file

from hf_optim import CheckpointError
from hf_optim.trust.headers import BITS, read_header, require_disjoint

GOOD = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}


def write(path, header, data=b"\0" * 24):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def test_what_the_library_writes_is_read(tmp_path):
    state = {"a": torch.zeros(2, 3), "b": torch.zeros(0, 4, dtype=torch.int8), "c": torch.zeros((), dtype=torch.bool)}
    save_file(state, tmp_path / "x.safetensors", {"format": "pt"})
    found = {entry.key: entry for entry in read_header(tmp_path / "x.safetensors")}
    assert {key: (entry.type, entry.shape) for key, entry in found.items()} == {
        "a": ("F32", (2, 3)),
        "b": ("I8", (0, 4)),
        "c": ("BOOL", ()),
    }
    assert found["a"].end - found["a"].begin == 24
    assert max(entry.end for entry in found.values()) == (tmp_path / "x.safetensors").stat().st_size


BAD = {
    "offsets beyond the file": {"a": GOOD | {"shape": [4, 3], "data_offsets": [0, 48]}},
    "offsets in the wrong order": {"a": GOOD | {"data_offsets": [24, 0]}},
    "negative offsets": {"a": GOOD | {"data_offsets": [-24, 0]}},
    "overlapping offsets": {"a": GOOD, "b": GOOD | {"shape": [1, 3], "data_offsets": [12, 24]}},
    "a hole": {"a": GOOD | {"shape": [1, 3], "data_offsets": [12, 24]}},
    "data that no tensor has": {"a": GOOD | {"shape": [1, 3], "data_offsets": [0, 12]}},
    "an unknown dtype": {"a": GOOD | {"dtype": "F31"}},
    "a dtype that is not a text": {"a": GOOD | {"dtype": 5}},
    "negative sizes": {"a": GOOD | {"shape": [-2, -3]}},
    "sizes that are not whole": {"a": GOOD | {"shape": [2.0, 3]}},
    "sizes that are truth values": {"a": GOOD | {"shape": [True, 6]}},
    "a huge size": {"a": GOOD | {"shape": [2**70, 3]}},
    "a shape that does not fit": {"a": GOOD | {"shape": [2, 4]}},
    "a shape that is a text": {"a": GOOD | {"shape": "23"}},
    "a missing field": {"a": {"dtype": "F32", "shape": [2, 3]}},
    "an entry that is a list": {"a": [GOOD]},
    "a header that is a list": [GOOD],
    "metadata that are numbers": {"__metadata__": {"format": 1}, "a": GOOD},
    "text that is not JSON": b"{" * 40,
    "text that is not UTF-8": b"\xff" * 40,
    "deep nesting": b"[" * 200_000,
    "a name that occurs twice": b'{"a": %s, "a": %s}' % ((json.dumps(GOOD).encode(),) * 2),
}


@pytest.mark.parametrize("what", BAD)
def test_a_header_out_of_order_is_refused(what, tmp_path):
    path = write(tmp_path / "bad.safetensors", BAD[what])
    begin = time.perf_counter()
    with pytest.raises(CheckpointError, match=r"bad\.safetensors of model is truncated or corrupt"):
        read_header(path, "model")
    assert time.perf_counter() - begin < 1


@pytest.mark.parametrize("content", [b"", b"\0\0\0", (2**60).to_bytes(8, "little"), (10).to_bytes(8, "little") + b"{}"])
def test_a_file_shorter_than_its_header_is_refused(content, tmp_path):
    (tmp_path / "bad.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"bad\.safetensors is truncated or corrupt"):
        read_header(tmp_path / "bad.safetensors")


def test_every_dtype_of_the_loader_has_a_size():
    from hf_optim.toolkit.checkpoint.safetensors import TORCH_DTYPES

    assert {name: BITS[name] for name in TORCH_DTYPES} == {
        name: 8 * dtype.itemsize for name, dtype in TORCH_DTYPES.items()
    }


def test_one_tensor_in_two_files_is_refused(tmp_path):
    files = [write(tmp_path / f"{name}.safetensors", {"a": GOOD}) for name in ("one", "two")]
    with pytest.raises(CheckpointError, match=r"one\.safetensors and two\.safetensors of model both have a tensor 'a'"):
        require_disjoint([(path, read_header(path)) for path in files], "model")
