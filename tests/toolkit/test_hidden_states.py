"""Recording of hidden states: what is recorded, when, and that no hook remains."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from tiny_models import tiny_bert, tiny_llama, tiny_t5
from torch.utils.checkpoint import checkpoint

from hf_optim.toolkit import topology
from hf_optim.toolkit.distillation.hidden_states import (
    Recorder,
    RecorderCallback,
    base_model_of_blocks,
    base_models,
    take_recorded,
)

IDS = torch.randint(3, 60, (2, 7), generator=torch.Generator().manual_seed(0))


def test_block_outputs_are_the_hidden_states_of_transformers():
    model = tiny_llama().eval()
    with Recorder([block.module for block in topology.blocks(model)]) as recorder:
        outputs = model(IDS, output_hidden_states=True)
        found = recorder.take()
        assert recorder.take() == []
    torch.testing.assert_close(found[0], outputs.hidden_states[1])
    torch.testing.assert_close(model.model.norm(found[-1]), outputs.hidden_states[-1])
    with Recorder([block.module for block in topology.blocks(model)]):
        pass
    model(IDS)
    assert recorder.take() == []


def test_base_models_return_what_the_head_reads():
    llama, bert = tiny_llama().eval(), tiny_bert().eval()
    for model in (llama, bert):
        with Recorder(base_models(model)) as recorder:
            outputs = model(IDS, output_hidden_states=True)
            (found,) = recorder.take()
        torch.testing.assert_close(found, outputs.hidden_states[-1])


def test_the_base_model_of_every_block():
    t5 = tiny_t5()
    names = [block.name for block in topology.blocks(t5)]
    assert base_model_of_blocks(t5) == [int("decoder" in name) for name in names]
    assert set(base_model_of_blocks(t5)) == {0, 1}
    assert set(base_model_of_blocks(tiny_llama())) == {0}


def test_a_repeated_forward_of_the_backward_is_not_recorded():
    """Hooks of a module that is checkpointed by its caller run again when the backward recomputes it."""
    layer, x = torch.nn.Linear(4, 4), torch.randn(1, 2, 4, requires_grad=True)
    calls = []
    layer.register_forward_hook(lambda *given: calls.append(1))
    with Recorder([layer]) as recorder:
        loss = checkpoint(lambda x: layer(x).exp(), x, use_reentrant=False).sum()
        (states,) = recorder.take()
        (loss + states.square().sum()).backward()
        assert len(calls) == 2
        assert recorder.take() == []
    expected = torch.autograd.grad(layer(x).exp().sum() + layer(x).square().sum(), x)[0]
    torch.testing.assert_close(x.grad, expected)


def test_the_callback_records_only_within_a_step():
    model, own = tiny_llama(), SimpleNamespace()
    recorder = RecorderCallback(own, lambda: base_models(model))
    model(IDS)
    assert take_recorded(own) == []
    recorder.on_step_begin(None, None, None)
    recorder.on_step_begin(None, None, None)  # the step before failed
    assert len(model.base_model._forward_hooks) == 1
    model(IDS)
    assert len(take_recorded(own)) == 1
    recorder.on_step_end(None, None, None)
    model(IDS)
    assert take_recorded(own) == []
    assert not model.base_model._forward_hooks
