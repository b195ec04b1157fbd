"""Reading weights from disk: failures end with file and tensor, never with other tokens; no page cache grows."""

from __future__ import annotations

import os

import pytest
import torch
from late_link import LateLink
from tiny_models import tiny_llama
from transformers import AutoModelForCausalLM

import hf_optim
from hf_optim import CheckpointError, ModelError
from hf_optim.testing.tiny_runs import inputs_for
from hf_optim.toolkit.offloading import OpenFile, Piece, files, place
from hf_optim.toolkit.offloading.files import CHUNK, Reader, aligned_memory

STEP = {"technique": "offload", "to": "disk", "threads": 2}


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def reader(threads=2):
    def put(target, source, after):
        target.copy_(source)

    return Reader(aligned_memory, put, lambda ticket: None, threads)


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize(("begin", "size"), [(0, 10), (8, 4096), (4095, 2), (77, CHUNK + 4097), (123, 3 * CHUNK + 1)])
def test_any_range_is_read_as_it_is(begin, size, direct, tmp_path):
    content = torch.randint(0, 256, (begin + size + 9,), dtype=torch.uint8)
    (tmp_path / "f").write_bytes(content.numpy().tobytes())
    file = OpenFile(tmp_path / "f", "f")
    if not direct:
        os.close(file.direct_fd)
        file.direct_fd = -1
    target = torch.zeros(size + 5, dtype=torch.uint8)
    for _ in range(2):
        for part in reader().read([Piece(file, begin, size, 3, "w")], target):
            part.result()
        assert torch.equal(target[3 : 3 + size], content[begin : begin + size])
        assert not target[:3].any()
        assert not target[3 + size :].any()
    assert torch.equal(file.mapped(begin, size, "x"), content[begin : begin + size])


@pytest.fixture
def checkpoint(tmp_path):
    tiny_llama(num_hidden_layers=6).save_pretrained(tmp_path / "model", max_shard_size="60KB")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", optim_config=STEP)
    return model, tmp_path / "model", inputs_for(model)


def shard_of(folder, name):
    import json

    return folder / json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"][name]


NAMED = r"model-0000\d-of-0000\d\.safetensors.*(layers\.\d\.|model\.layers)"


def test_a_truncated_file_is_an_error_in_the_middle_of_decoding(checkpoint):
    model, folder, inputs = checkpoint
    expected = model.generate(**inputs, max_new_tokens=3, do_sample=False, pad_token_id=0)
    file = shard_of(folder, "model.layers.4.mlp.up_proj.weight")
    whole, times = file.read_bytes(), file.stat()
    os.truncate(file, 5000)
    with pytest.raises(CheckpointError, match=NAMED + r".*|was truncated from \d+ to 5000 bytes while \S+layers"):
        model.generate(**inputs, max_new_tokens=3, do_sample=False, pad_token_id=0)
    file.write_bytes(whole)  # the same file, whole again
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    again = model.generate(**inputs, max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert torch.equal(again, expected)


def test_a_file_that_was_written_to_is_an_error(checkpoint):
    model, folder, inputs = checkpoint
    file = shard_of(folder, "model.layers.4.mlp.up_proj.weight")
    with open(file, "r+b") as opened:
        opened.seek(-8, os.SEEK_END)
        opened.write(b"\1" * 8)
    with pytest.raises(CheckpointError, match=r"safetensors has changed since the model was offloaded; \S+ was needed"):
        model(**inputs)


def test_bytes_that_differ_between_reads_are_an_error(checkpoint):
    model, folder, inputs = checkpoint
    model(**inputs)
    file = shard_of(folder, "model.layers.4.mlp.up_proj.weight")
    times = file.stat()
    with open(file, "r+b") as opened:
        opened.seek(-8, os.SEEK_END)
        opened.write(b"\1" * 8)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))  # as a failing disk does, which changes no time
    with pytest.raises(
        CheckpointError, match=r"model-\S+safetensors: model\.layers\S+ differs from what was read of it"
    ):
        model(**inputs)


def test_a_disk_that_fails_names_file_and_tensor(checkpoint, monkeypatch):
    model, _, inputs = checkpoint
    expected = model(**inputs).logits

    def fail(*args):
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "preadv", fail)
        with pytest.raises(CheckpointError, match=r"safetensors: reading model\.layers\S+ failed: Input/output error"):
            model(**inputs)
    assert torch.equal(model(**inputs).logits, expected)


def test_a_removed_or_replaced_checkpoint_is_read_as_it_was(checkpoint):
    model, folder, inputs = checkpoint
    expected = model(**inputs).logits
    for file in folder.glob("*.safetensors"):
        file.unlink()
    assert torch.equal(model(**inputs).logits, expected)
    model.save_pretrained(folder)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(folder)(**inputs).logits, expected)


def test_a_folder_in_memory_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(files, "file_system", lambda folder: "tmpfs")
    with pytest.raises(ModelError, match="is a tmpfs, which is memory, not a disk: pass folder="):
        hf_optim.offload(tiny_llama(), "disk", folder=tmp_path)
    monkeypatch.undo()
    with pytest.raises(ModelError, match="weights cannot be written to"):
        hf_optim.offload(tiny_llama(), "disk", folder=tmp_path / "missing")


def test_a_full_disk_is_an_error(monkeypatch, tmp_path):
    def fail(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "pwrite", fail)
    with pytest.raises(ModelError, match=r"failed: No space left on device; pass folder="):
        place(tiny_llama(), "disk", link=LateLink(), folder=tmp_path)
