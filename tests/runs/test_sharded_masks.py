"""Masks under FSDP2 and DDP: two ranks on the CPU, in processes of their own; and the pieces, on one."""

from __future__ import annotations

import pytest
import torch
from conftest import HELPERS
from tiny_models import tiny_llama

from hf_optim.toolkit.distributed import fsdp

WORKER = HELPERS / "shard_worker.py"


@pytest.mark.slow
def test_masks_follow_the_shards(tmp_path, python):
    done = python.ranks(WORKER, tmp_path)
    assert done.status == 0, done.out[-1000:] + done.err[-5000:]
    for check in ("magnitude", "resumption", "guard", "agreement", "stock_trainer"):
        assert f"check_{check}" in done.out


def test_without_shards_nothing_is_copied():
    model = tiny_llama()
    name = "model.layers.0.mlp.up_proj.weight"
    parameter = model.get_parameter(name)
    assert not fsdp.has_sharded_parameters(model)
    assert fsdp.full_tensor(parameter) is parameter
    assert fsdp.local_shard(parameter) is parameter
    mask = torch.ones_like(parameter, dtype=torch.bool)
    assert fsdp.shard_like(mask, parameter) is mask
    weights = fsdp.FullWeights(model, [name])
    assert dict(weights).keys() == {name}
    assert weights[name].data_ptr() == parameter.data_ptr()
    with pytest.raises(AttributeError):
        fsdp.FullWeights(model, ["nothing"])["nothing"]
