"""Tensors that are kept for later calls are of use to all of them, whatever mode the first call was in."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from hf_optim.toolkit.attention import HeadPatterns, Pattern, kept_tensors
from hf_optim.toolkit.attention.attend import _lists
from hf_optim.toolkit.attention.cached_tokens import expiries
from hf_optim.toolkit.attention.flash_plan import plan_of
from hf_optim.toolkit.attention.global_tokens import whole_layout
from hf_optim.toolkit.attention.head_patterns import _whole_mask
from hf_optim.toolkit.attention.layout import layouts
from hf_optim.toolkit.attention.terms import Band
from hf_optim_plugins.attention._big_bird_pattern import NeighboursAndRandom, block_table

CPU = torch.device("cpu")
PATTERN = Pattern((Band(3, 0),), True)
HEADS = HeadPatterns.of([PATTERN] * 2, 2)
MAKERS = {
    "layouts": (layouts, lambda: layouts((PATTERN,), (0, 0), 64, 32, CPU)),
    "lists": (_lists, lambda: _lists(HEADS, 64, CPU)),
    "plan": (plan_of, lambda: plan_of(whole_layout(1, 64, 64, CPU), 0, 64, 64)),
    "whole_layout": (whole_layout, lambda: whole_layout(1, 64, 64, CPU)),
    "mask": (_whole_mask, lambda: _whole_mask(HEADS, 9, CPU)),
    "expiries": (expiries, lambda: expiries(HEADS, 9)),
    "block_table": (block_table, lambda: block_table(NeighboursAndRandom(16, 2, 4), 12)),
}
MODES = {
    "trace": lambda: FakeTensorMode(allow_non_fake_inputs=True),
    "inference": torch.inference_mode,
    "device": lambda: torch.device("meta"),
}


def tensors(value):
    if isinstance(value, torch.Tensor):
        return [value]
    parts = vars(value).values() if hasattr(value, "__dict__") else value if isinstance(value, (tuple, list)) else ()
    return [tensor for part in parts for tensor in tensors(part)]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("maker", MAKERS)
def test_a_first_call_in_a_mode_leaves_ordinary_tensors(maker, mode):
    function, call = MAKERS[maker]
    for each, _ in MAKERS.values():
        each.cache_clear()
    with MODES[mode]():
        try:
            call()
        except Exception:  # a trace has no values to decide by
            assert mode == "trace"
    found = tensors(call())
    assert found
    for tensor in found:
        assert type(tensor) is torch.Tensor
        assert tensor.device == CPU
        assert not tensor.is_inference()
    function.cache_clear()


def test_what_was_made_is_kept():
    calls = []

    @kept_tensors(4)
    def made(size):
        calls.append(size)
        return torch.ones(size)

    assert made(3) is made(3)
    assert calls == [3]
