"""The memory of a training step, predicted on fake tensors, against what autograd keeps in a real one."""

from __future__ import annotations

import pytest
import torch
from tiny_models import TINY, tiny_llama, tiny_mixtral

from hf_optim.training.step_memory import measure_step

VOCABULARY, WIDTH = 4096, 4


def wide(**changes):
    return tiny_llama(vocab_size=VOCABULARY, hidden_size=64, intermediate_size=128, **changes)


def kept_for_backward(model, batch, tokens):
    """Return the bytes of the storages that autograd keeps of a real forward, without those of the weights."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)  # held, so that no address is used twice
        return tensor

    ids = torch.zeros(batch, tokens, dtype=torch.long)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = model.train()(input_ids=ids, labels=ids).loss
    loss.backward()
    return sum(size for size, _ in kept.values())


def test_it_is_what_autograd_keeps_and_the_gradients():
    model = wide()
    found = measure_step(wide().to("meta"), 4, 32)
    assert found.exact
    assert found.gradients == sum(p.numel() for p in model.parameters()) * WIDTH
    kept = kept_for_backward(model, 4, 32)
    # At the beginning of the backward pass the logits have a gradient of their own.
    logits = 4 * 32 * VOCABULARY * WIDTH
    assert kept <= found.peak <= kept + 3 * logits + found.gradients
    assert found.peak > 2 * logits


def test_it_grows_with_the_batch_and_shrinks_with_checkpointing():
    model = wide(num_hidden_layers=3).to("meta")
    small, large = (measure_step(model, batch, 32).peak for batch in (2, 8))
    assert 3 * small < large < 4.2 * small
    assert measure_step(model, 8, 32, checkpointing=True).peak < large
    accumulated = measure_step(model, 2, 32, batches=4)
    assert accumulated.peak >= small + accumulated.gradients // 2


def test_a_teacher_adds_its_logits():
    model = wide().to("meta")
    logits = 8 * 32 * VOCABULARY * WIDTH
    alone, taught = measure_step(model, 8, 32).peak, measure_step(model, 8, 32, teacher=model).peak
    assert logits / 2 < taught - alone < 3 * logits


@pytest.mark.many(every=4)
@pytest.mark.parametrize("family", sorted(set(TINY) - {"mixtral"}))
def test_every_family_runs_on_fake_tensors_with_a_loss(family):
    found = measure_step(TINY[family]().to("meta"), 2, 16)
    assert found.exact
    assert found.peak > found.gradients


def test_a_model_whose_forward_depends_on_values_is_estimated_from_its_configuration():
    found = measure_step(tiny_mixtral().to("meta"), 2, 16)
    assert not found.exact
    assert found.peak > found.gradients > 0
