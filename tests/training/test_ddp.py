"""Everything that trains, under DDP: two ranks on the CPU stay one model, and learn what one rank learns."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import HELPERS
from ddp_worker import EXACT, OWN, train, whole
from safetensors.torch import load_file

WORKER = HELPERS / "ddp_worker.py"


@pytest.fixture(scope="module")
def ranks(tmp_path_factory, python) -> Path:
    home = tmp_path_factory.mktemp("ddp")
    done = python.ranks(WORKER, home)
    assert done.status == 0, done.out[-1000:] + done.err[-5000:]
    return home


@pytest.mark.many
@pytest.mark.parametrize("name", EXACT)
def test_two_ranks_learn_what_one_learns_from_their_batches_together(ranks, tmp_path, name):
    two = load_file(ranks / f"{name}.safetensors")
    one = whole(train(EXACT[name], tmp_path, per_device_train_batch_size=4))
    assert two.keys() == one.keys()
    for key, tensor in one.items():
        torch.testing.assert_close(two[key], tensor, rtol=1e-3, atol=2e-5, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize("name", OWN)
def test_ranks_of_different_losses_stay_one_model(ranks, name):
    found = load_file(ranks / f"{name}.safetensors")
    masks = [mask for key, mask in found.items() if key.startswith("mask of ")]
    assert sum(int((~mask).sum()) for mask in masks) == pytest.approx(sum(m.numel() for m in masks) / 2, rel=1e-2)
