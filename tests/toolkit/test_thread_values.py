"""What modules leave for each other in a forward, where several threads run one model."""

from __future__ import annotations

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from hf_optim.toolkit.modules import Inlet, ThreadValue
from hf_optim_plugins.sparsity._sparse_qkv_modules import Handed


def elsewhere(function, *args):
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function, *args).result()


def inlet():
    module = Inlet(True)
    return module, module.take


def handed():
    module = Handed(2)
    return module.held.leave, lambda: module(torch.zeros(1, 2))


@pytest.mark.parametrize("make", [inlet, handed])
def test_a_thread_takes_what_it_left_itself(make):
    leave, take = make()
    mine, theirs = torch.ones(1, 2), torch.zeros(1, 2)

    def other():
        leave(theirs)
        return take()

    leave(mine)
    assert elsewhere(other) is theirs
    assert take() is mine


def test_a_value_is_taken_once_and_no_copy_has_it():
    value = ThreadValue()
    value.leave(torch.ones(1))
    assert copy.deepcopy(value).is_empty()
    assert pickle.loads(pickle.dumps(value)).is_empty()
    assert value.take() is not None
    assert value.take() is None
    assert value.is_empty()


def test_it_is_traced_as_one_graph():
    module = Inlet(True)

    def forward(x):
        nothing = module(x)
        return module.take() * 2 + nothing.sum()

    x = torch.ones(2, 3)
    assert torch.equal(torch.compile(forward, backend="eager", fullgraph=True)(x), 2 * x)
    assert module.kept.is_empty()
