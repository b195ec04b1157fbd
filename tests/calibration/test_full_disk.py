"""A full disk in the journal of blocks and in spilled activations is an error that names folder, room and remedy."""

from __future__ import annotations

import re
import resource

import pytest
import torch
from tiny_models import tiny_llama

from hf_optim import CheckpointError, optimize, run_of
from hf_optim.calibration.block_journal import BlockJournal
from hf_optim.calibration.streamed.activation_store import ActivationStore


@pytest.fixture
def small_disk():
    """A file may not grow beyond 1 KB, which stands for a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 10, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_block_of_the_journal_on_a_full_disk(tmp_path, small_disk):
    model = optimize(tiny_llama(), "magnitude")
    run = run_of(model)
    journal = BlockJournal(tmp_path / "journal", resume=False)
    with pytest.raises(CheckpointError, match=r"disk is full.*the block model\.layers\.0 was not written") as caught:
        journal.save(run, run.recipe.steps[0], "model.layers.0")
    assert str(tmp_path / "journal") in str(caught.value)
    assert re.search(r"\d [GM]B free", str(caught.value))
    assert str(caught.value).endswith("; free some space and add --resume")
    assert [path.name for path in (tmp_path / "journal").iterdir()] == ["journal.json"]


def test_the_header_of_a_journal_on_a_full_disk(tmp_path, small_disk):
    model = optimize(tiny_llama(), {"steps": ["magnitude"], "description": "x" * 5000})
    run = run_of(model)
    journal = BlockJournal(tmp_path / "journal", resume=False)
    with pytest.raises(CheckpointError, match=r"disk is full.*journal\.json was not written to .*[GM]B free"):
        journal.save(run, run.recipe.steps[0], "model.layers.0")
    assert not list((tmp_path / "journal").iterdir())


def test_activations_on_a_full_disk(tmp_path, small_disk):
    store = ActivationStore(torch.device("cpu"), tmp_path)
    with pytest.raises(
        CheckpointError, match=r"disk is full.*activations of batch 3 was not written.*4.1 kB needed"
    ) as caught:
        store.put(3, (torch.zeros(1024), None))
    assert str(tmp_path) in str(caught.value)
