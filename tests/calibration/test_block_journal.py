"""What a blockwise run resumes from: the same weights to the last byte, and files that are as they were written."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from tiny_models import tiny_llama

from hf_optim import CheckpointError, optimize
from hf_optim.calibration.block_journal import BlockJournal, run_identity
from hf_optim.runs.run import run_of

IDS = torch.randint(3, 60, (4, 8), generator=torch.Generator().manual_seed(0))
GPTQ = [{"technique": "gptq", "bits": 4, "group_size": 16}]


@pytest.fixture(scope="module")
def journal(tmp_path_factory):
    """The journal of a run that is not removed, and the weights it ended with."""
    home = tmp_path_factory.mktemp("journal") / "journal"
    return home, optimize(tiny_llama(), GPTQ, IDS, journal=BlockJournal(home, resume=False)).state_dict()


def resumed(home, model=None):
    return optimize(model or tiny_llama(), GPTQ, IDS, journal=BlockJournal(home, resume=True))


def test_one_changed_weight_is_noticed(tmp_path):
    def wide():
        return tiny_llama(hidden_size=64, intermediate_size=256)

    home = tmp_path / "journal"
    optimize(wide(), GPTQ, IDS, journal=BlockJournal(home, resume=False))
    model = wide()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] += 1e-3  # one of 16,384
    with pytest.raises(CheckpointError, match="another model; start without --resume"):
        resumed(home, model)


@pytest.mark.parametrize("damage", ["flipped", "swapped", "truncated", "empty", "without its checksum"])
def test_a_damaged_block_is_calibrated_again(journal, tmp_path, damage, caplog):
    home = shutil.copytree(journal[0], tmp_path / "journal")
    one, other = sorted(home.glob("step-*.safetensors"))
    content = bytearray(one.read_bytes())
    if damage == "flipped":
        content[-1] ^= 1
    elif damage == "swapped":
        shutil.copyfile(other, one.with_suffix(".x"))
        content = bytearray(one.with_suffix(".x").read_bytes())
        one.with_suffix(".x").unlink()
    elif damage == "without its checksum":
        one.with_name(one.name + ".sum").unlink()
    else:
        del content[0 if damage == "empty" else 100 :]
    one.write_bytes(content)
    model = resumed(home)
    assert run_of(model).record.stages[0]["blocks"] == 1
    assert ("damaged" in caplog.text) == (damage != "without its checksum")
    for name, tensor in journal[1].items():
        assert torch.equal(model.state_dict()[name], tensor), name


@pytest.mark.parametrize("content", ["", "[]", "{", '{"format": 2}', "[" * 100_000])
def test_a_damaged_or_old_header_is_refused(journal, tmp_path, content):
    home = shutil.copytree(journal[0], tmp_path / "journal")
    (home / "journal.json").write_text(content)
    with pytest.raises(CheckpointError, match="start without --resume"):
        resumed(home)


def test_paths_may_be_written_in_another_way(tmp_path, monkeypatch):
    def identity(dataset, teacher):
        steps = [{"technique": "logit_kd", "teacher": str(teacher)}]
        recipe = {"steps": steps, "calibration": {"dataset": str(dataset)}}
        model = optimize(tiny_llama(), recipe)
        return json.dumps(run_identity(run_of(model)), sort_keys=True)

    tiny_llama().save_pretrained(tmp_path / "teacher")
    (tmp_path / "d.jsonl").write_text('{"text": "a"}\n')
    monkeypatch.chdir(tmp_path)
    one = identity("d.jsonl", "teacher")
    assert one == identity(tmp_path / "d.jsonl", tmp_path / "teacher")
    shard = tmp_path / "teacher" / "model.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    assert one != identity("d.jsonl", "teacher")
