"""Assignments that no longer change are kept in training: equal results, counts, new choices, checkpointing."""

from __future__ import annotations

import copy
import pickle

import pytest
import tiny_mixtures
import torch

import hf_optim
from hf_optim import ModelError
from hf_optim.toolkit.experts import Buckets, attach_buckets, detach_buckets, expert_buckets
from hf_optim.toolkit.experts.assignments import RECHECK, Batch, skipper_of

IDS = torch.arange(3, 63).reshape(3, 20)


def gates_of(model):
    return [layer.mlp.gate for layer in model.model.layers]


def step(model, ids=IDS, mask=None):
    model.zero_grad()
    out = model(input_ids=ids, attention_mask=mask, labels=ids, use_cache=False)
    out.loss.backward()
    return out.loss.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}


def kept(model):
    return [(entry["sequences_routed"], entry["sequences_kept"]) for entry in expert_buckets(model).values()]


def with_buckets(stable=2, kind="mixtral"):
    model = tiny_mixtures.build(kind).train()
    attach_buckets(model, Buckets(stable=stable))
    return model


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_a_router_is_left_out_once_assignments_are_stable_and_results_stay(kind):
    model = with_buckets(2, kind)
    expected, gradients = step(tiny_mixtures.build(kind).train())
    for number in range(4):
        loss, found = step(model)
        assert torch.equal(loss, expected), number
    assert kept(model) == [(6, 6), (6, 6)]  # two forwards of three sequences are computed
    for name, gradient in gradients.items():
        if "mlp.gate." in name:  # nothing trains the router of a kept sequence
            assert found[name] is None or not found[name].any()
        elif name.startswith("model.layers.1.mlp"):
            assert torch.allclose(found[name], gradient, atol=1e-6), name


def test_new_sequences_are_routed_beside_kept_ones():
    model, plain = with_buckets(1), tiny_mixtures.build("mixtral").train()
    step(model)
    mixed = torch.cat([IDS[:2], IDS[2:] + 7])
    assert torch.allclose(step(model, mixed)[0], step(plain, mixed)[0], atol=1e-6)
    assert kept(model) == [(4, 2), (4, 2)]
    mask = torch.ones_like(mixed)
    mask[0, :5] = 0
    step(model, mixed, mask)  # with other padding it is another sequence
    assert kept(model) == [(5, 4), (5, 4)]


def test_assignments_that_change_are_found_when_they_are_computed_again():
    model = with_buckets(1)
    for _ in range(1 + RECHECK):
        step(model)
    assert kept(model)[0] == (3, 3 * RECHECK)
    with torch.no_grad():
        for gate in gates_of(model):
            gate.weight.neg_()
    step(model)  # all are computed again, and are others now
    assert kept(model)[0] == (6, 3 * RECHECK)
    reference = tiny_mixtures.build("mixtral").train()
    with torch.no_grad():
        for gate in gates_of(reference):
            gate.weight.neg_()
    assert torch.allclose(step(model)[0], step(reference)[0], atol=1e-6)


def test_evaluation_and_generation_compute_every_router():
    model = with_buckets(1)
    step(model)
    step(model)
    before = kept(model)
    model.eval()
    with torch.no_grad():
        model(input_ids=IDS)
        model.generate(IDS[:, :4], max_new_tokens=3)
    assert kept(model) == before


def test_gradient_checkpointing_repeats_what_the_forward_did():
    model = with_buckets(1)
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable({"use_reentrant": False})
    losses = [float(step(model)[0]) for _ in range(4)]
    assert max(losses) - min(losses) < 1e-6
    assert kept(model) == [(3, 9), (3, 9)]


def test_logits_that_were_not_computed_cannot_be_mistaken():
    model = with_buckets(1)
    step(model)
    out = model(input_ids=IDS, labels=IDS, output_router_logits=True, use_cache=False)
    assert bool(out.router_logits[0].isnan().all())
    assert bool(out.loss.isnan())


def test_a_loss_that_needs_all_logits_is_refused():
    model = tiny_mixtures.build("mixtral")
    model.config.output_router_logits = True
    with pytest.raises(ModelError, match=r"step 1 \(dynamoe\).*output_router_logits is set"):
        hf_optim.optimize(model, [{"technique": "dynamoe", "stable": 2}])
    assert skipper_of(gates_of(model)[0]) is None
    assert not model.model._forward_pre_hooks


def test_copies_pickles_and_the_way_back():
    model = with_buckets(1)
    step(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(step(twin)[0], step(tiny_mixtures.build("mixtral").train())[0])
    detach_buckets(model)
    assert type(gates_of(model)[0]) is type(gates_of(tiny_mixtures.build("mixtral"))[0])
    assert not model.model._forward_pre_hooks
    step(model)


def test_a_batch_without_token_ids_has_no_keys():
    batch = Batch()
    batch.note(None, (), {"inputs_embeds": torch.zeros(2, 3, 4)})
    assert batch.keys_of(6) is None
    batch.note(None, (torch.zeros(2, 3, dtype=torch.int64),), {})
    assert batch.keys_of(5) is None
    assert len(set(batch.keys_of(6))) == 1
