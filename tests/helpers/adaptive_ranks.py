"""Checks of the adaptive exchange, run by ``test_adaptive_exchange``: ``adaptive_ranks.py OUTPUT WORLD...``."""

from __future__ import annotations

import os
import sys
import time

import forked_ranks
import torch
import torch.distributed as dist
from exchange_ranks import EXPERTS, batch_of, distance, load, run, tiny_mixtral

from hf_optim.toolkit import compat
from hf_optim.toolkit.experts import (
    Exchange,
    Routing,
    attach_exchange,
    attach_routing,
    detach_settings,
    expert_exchange,
    store_exchange,
)
from hf_optim.toolkit.experts.adaptive_layer import run_way, share_counts
from hf_optim.toolkit.experts.exchange import pair_up


def model_path(world):
    path = f"{sys.argv[1]}-model-{world}"
    if dist.get_rank() == 0:
        model = tiny_mixtral(EXPERTS)
        store_exchange(model.config, Exchange(kind="adaptive", ranks_per_node=max(1, world // 2)))
        model.save_pretrained(path)
    dist.barrier()
    return path


def layers_of(model):
    found = [compat.ep_implementation_of(module) for module in model.modules()]
    return [layer for layer in found if layer is not None]


def every_way_gives_the_same(rank, world):
    """Force each way in turn: outputs and gradients against one process, and against each other."""
    from transformers import MixtralForCausalLM

    path, found = model_path(world), {}
    for shared in (True, False) if world > 2 else (True,):
        ids = batch_of(rank, shared)
        alone = MixtralForCausalLM.from_pretrained(path)
        logits, _ = run(alone, ids, False)
        batches = [batch_of(0, True)] if shared else [batch_of(other, False) for other in range(world)]
        for one in batches:
            (alone(input_ids=one, labels=one, use_cache=False).loss / len(batches)).backward()
        grads = {name: parameter.grad for name, parameter in alone.named_parameters()}
        model = load(path, world, shared, optim_config="auto")
        ways = layers_of(model)[0].choices.ways
        for way in ways:
            for layer in layers_of(model):
                layer.choices.ways = (way,)
            out, got = run(model, ids)
            assert len(got) == len(grads)
            found[f"{way} {'shared' if shared else 'own'}"] = [
                float((out - logits).abs().max()),
                distance(got, grads),
            ]
        detach_settings(model)
    return found


def exchanged_rows_are_the_same_to_the_bit(rank, world):
    """An expert that computes rows one by one gives the same bits in every way of exchanging."""
    # Eight ranks do not divide the attention heads, so that each has a batch of its own there.
    model = load(model_path(world), world, world < 8, optim_config="auto")
    layer = layers_of(model)[0]
    generator = torch.Generator().manual_seed(rank)
    hidden = torch.randn(9 * rank, 32, generator=generator)
    index = torch.randn(9 * rank, EXPERTS, generator=generator).topk(2).indices
    index[:3, 1] = EXPERTS  # dropped
    if rank == 1:
        index[:, 0] = 5
    gates = torch.rand(9 * rank, 2, generator=generator)
    layer.experts_forward = lambda rows, numbers, ones: torch.sin(rows) * (numbers + 1 + layer.num_local_experts * rank)
    pairs = pair_up(index, EXPERTS)
    counts, _ = share_counts(pairs, layer.grids["flat"], False)
    results = {
        str(way): run_way(layer, way, pairs, counts, hidden, index, gates)
        for way in layer.choices.ways
        if way.parallelism == "exchange"
    }
    factor = torch.where(index < EXPERTS, index + 1, 0) * gates
    expected = torch.sin(hidden) * factor.sum(1, keepdim=True)
    first = next(iter(results.values()))
    assert torch.allclose(first, expected, atol=1e-5)
    assert all(torch.equal(one, first) for one in results.values())
    detach_settings(model)
    return sorted(results)


def the_choice_is_that_of_the_slowest_rank_on_all_ranks(rank, world):
    """Times are made up: on rank 0 one way is the fastest, on rank 1 another; all take the best of the worst."""
    model = load(model_path(world), world, True)
    attach_exchange(model, Exchange(kind="adaptive", degrees=(1, 2), trials=1))
    layer = layers_of(model)[0]
    # [exchange x1, exchange x2, gather]
    made_up = [[1.0, 3.0, 2.0], [5.0, 3.0, 4.0]][rank % 2]
    ids = batch_of(0, True)
    with torch.no_grad():
        for _ in range(2 * len(layer.choices.ways)):
            model(input_ids=ids, use_cache=False)
        decision = next(iter(layer.choices.decisions.values()))
        assert decision.chosen is None
        assert [len(times) for times in decision.spent] == [1, 1, 1]
        decision.spent = [[seconds] for seconds in made_up]
        model(input_ids=ids, use_cache=False)
    report = expert_exchange(model)
    first = next(iter(report.values()))
    detach_settings(model)
    return [first["choices"][0]["chosen"], first["choices"][0]["milliseconds"], first["choices"][0]["why"]]


def loads_and_sizes_are_decided_apart(rank, world):
    model = load(model_path(world), world, True)
    attach_exchange(model, Exchange(kind="adaptive", degrees=(1,), trials=1))
    with torch.no_grad():
        for _ in range(5):
            model(input_ids=batch_of(0, True), use_cache=False)
            model(input_ids=batch_of(0, True)[:, :3], use_cache=False)
    model(input_ids=batch_of(0, True), labels=batch_of(0, True)).loss.backward()
    choices = next(iter(expert_exchange(model).values()))["choices"]
    text = model.generate(batch_of(0, True)[:, :4], max_new_tokens=6, do_sample=False, eos_token_id=None).tolist()
    detach_settings(model)
    return [
        [[one["pairs"], one["imbalance"], one["training"], one["chosen"] is not None] for one in choices],
        text,
    ]


def gradient_checkpointing_repeats_the_way_of_the_forward(rank, world):
    model = load(model_path(world), world, True)
    attach_exchange(model, Exchange(kind="adaptive", degrees=(1, 2), trials=1))
    model.train()
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable({"use_reentrant": False})
    ids = batch_of(0, True)
    losses = []
    for _ in range(7):
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        losses.append(float(loss.detach()))
    calls = [[d.calls for d in layer.choices.decisions.values()] for layer in layers_of(model)]
    detach_settings(model)
    return [max(losses) - min(losses), calls]


def a_capacity_drops_the_same_in_every_way(rank, world):
    from transformers import MixtralForCausalLM

    path, ids = model_path(world), batch_of(0, True)
    routing = Routing(capacity=1.0, rounding="tutel")
    alone = MixtralForCausalLM.from_pretrained(path)
    attach_routing(alone, routing)
    expected, _ = run(alone, ids, False)
    model = load(path, world, True, optim_config="auto")
    attach_routing(model, routing)
    found = []
    for way in layers_of(model)[0].choices.ways:
        for layer in layers_of(model):
            layer.choices.ways = (way,)
        found.append(float((run(model, ids)[0] - expected).abs().max()))
    detach_settings(model)
    return found


def a_rank_that_dies(rank, world):
    """The last check: one rank ends; every other one gets an error soon, and does not hang."""
    model = load(model_path(world), world, world < 8, optim_config="auto")
    layer = layers_of(model)[0]
    hidden, index, gates = torch.randn(6, 32), torch.arange(12).view(6, 2) % EXPERTS, torch.rand(6, 2)
    pairs = pair_up(index, EXPERTS)
    dist.barrier()
    if rank == world - 1:
        os._exit(3)
    start = time.monotonic()
    try:
        with torch.no_grad():
            for way in layer.choices.ways:
                counts, _ = share_counts(pairs, layer.grids["flat"], False)
                run_way(layer, way, pairs, counts, hidden, index, gates)
    except Exception as error:
        return [type(error).__name__, time.monotonic() - start]
    return ["no error", time.monotonic() - start]


CHECKS = [
    every_way_gives_the_same,
    exchanged_rows_are_the_same_to_the_bit,
    the_choice_is_that_of_the_slowest_rank_on_all_ranks,
    loads_and_sizes_are_decided_apart,
    gradient_checkpointing_repeats_the_way_of_the_forward,
    a_capacity_drops_the_same_in_every_way,
    a_rank_that_dies,
]
OF_EIGHT = [exchanged_rows_are_the_same_to_the_bit, a_rank_that_dies]

if __name__ == "__main__":
    of_world = {2: CHECKS, 4: CHECKS, 8: OF_EIGHT}
    named = {world: {check.__name__: check for check in checks} for world, checks in of_world.items()}
    raise SystemExit(forked_ranks.main(named))
