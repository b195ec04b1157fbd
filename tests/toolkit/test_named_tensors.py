"""Tensors by name in the state of a step: a mapping over attributes that checkpoints save one by one."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from hf_optim.toolkit.checkpoint import NamedTensors


def test_it_is_a_view_of_the_attributes_with_its_prefix():
    state = SimpleNamespace(masks=3, other=torch.zeros(1))
    masks = NamedTensors(state, "mask")
    assert len(masks) == 0
    masks["layers.0.proj"] = torch.ones(2)
    assert vars(state).keys() == {"masks", "other", "mask.layers.0.proj"}
    setattr(state, "mask.b", torch.zeros(2))  # as reading a checkpoint does
    assert list(masks) == ["layers.0.proj", "b"]
    assert "b" in masks
    assert torch.equal(masks["layers.0.proj"], torch.ones(2))
    del masks["b"]
    masks.clear()
    assert vars(state).keys() == {"masks", "other"}
    with pytest.raises(KeyError):
        masks["b"]
