"""Checks of exchanges between ranks, run by ``test_exchanges``: ``exchange_ranks.py OUTPUT WORLD...``."""

from __future__ import annotations

import os
import sys
import time
from datetime import timedelta

import forked_ranks
import torch
import torch.distributed as dist
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from hf_optim.toolkit import compat
from hf_optim.toolkit.distributed import all_to_all, grid_of, route_from
from hf_optim.toolkit.experts import (
    Exchange,
    Routing,
    attach_exchange,
    attach_routing,
    detach_settings,
    exchange_experts,
    exchange_of,
    expert_exchange,
    expert_load,
    store_exchange,
)

ORDERS = ("flat", "intra_first", "inter_first")
EXPERTS = 8


def tables(world):
    """Yield (name, rows that each rank has for each): usual, a rank that sends nothing, all rows to one rank, none."""
    usual = torch.randint(0, 5, (world, world), generator=torch.Generator().manual_seed(0))
    silent = usual.clone()
    silent[0] = 0
    one = torch.zeros_like(usual)
    one[:, 1] = 7
    return {"usual": usual, "silent": silent, "one": one, "none": torch.zeros_like(usual)}


def equal_to_flat(rank, world):
    """Compare both orders with the flat exchange, forward and backward, for every shape of the grid."""
    compared = 0
    for local in (n for n in range(1, world + 1) if world % n == 0):
        for table in tables(world).values():
            start = torch.randn(int(table[rank].sum()), 3, generator=torch.Generator().manual_seed(rank))
            results = {}
            for order in ORDERS:
                grid = grid_of(None, order, local)
                rows = start.clone().requires_grad_()
                out, received = all_to_all(rows, table[rank], grid)
                assert received.tolist() == table[:, rank].tolist()
                factors = torch.arange(out.numel()).view_as(out) * (rank + 1.0)
                (out * factors).sum().backward()
                results[order] = out.detach(), rows.grad
                known = route_from(table.tolist(), grid)
                assert torch.equal(known.forth(start), out)
                assert torch.equal(known.back(out.detach()), start)
                half = all_to_all(start.bfloat16(), table[rank], grid)[0]
                assert torch.equal(half, out.detach().bfloat16())
            for order in ORDERS[1:]:
                assert all(map(torch.equal, results[order], results["flat"])), (order, local)
                compared += 1
    return compared


def rows_come_from_the_right_rank(rank, world):
    """The flat exchange itself: row i of the block from rank s for rank d holds (s, d, i)."""
    table = tables(world)["usual"]
    rows = [[rank, to, i] for to in range(world) for i in range(int(table[rank, to]))]
    for order in ORDERS:
        out, _ = all_to_all(torch.tensor(rows).float().view(-1, 3), table[rank], grid_of(None, order, world // 2))
        assert out.tolist() == [[s, rank, i] for s in range(world) for i in range(int(table[s, rank]))]


def sub_groups_are_made_once(rank, world):
    made, new_group = [], dist.new_group
    dist.new_group = lambda *args, **kwargs: made.append(args) or new_group(*args, **kwargs)
    try:
        grids = [grid_of(None, "intra_first", world // 2, timeout=7.0) for _ in range(3)]
    finally:
        dist.new_group = new_group
    return [len(made), len({id(grid) for grid in grids}), grids[0].messages]


def the_environment_gives_the_grid(rank, world):
    found = []
    for name in ("LOCAL_SIZE", "LOCAL_WORLD_SIZE"):
        os.environ[name] = str(world // 2)
        found.append([(grid := grid_of(None, "intra_first")).nodes, grid.local])
        del os.environ[name]
    return found


def nodes_that_differ_are_refused(rank, world):
    os.environ["LOCAL_WORLD_SIZE"] = "1" if rank else str(world)
    try:
        grid_of(None, "intra_first")
    finally:
        del os.environ["LOCAL_WORLD_SIZE"]


# -- experts ----------------------------------------------------------------------------------------------------------
def layer_of_a_process(rank):
    """Return weights of E experts and this rank's tokens, choices and gates; rank 0 has no tokens, 1 one favourite."""
    generator = torch.Generator().manual_seed(0)
    up, down = torch.randn(EXPERTS, 6, 5, generator=generator), torch.randn(EXPERTS, 5, 6, generator=generator)
    generator.manual_seed(1 + rank)
    tokens = 9 * rank
    hidden = torch.randn(tokens, 6, generator=generator)
    index = torch.randn(tokens, EXPERTS, generator=generator).topk(2).indices
    if rank == 1:
        index[:, 0], index[:, 1] = 3, EXPERTS  # the second choice is dropped
    return up, down, hidden, index, torch.rand(tokens, 2, generator=generator)


def naive(up, down, hidden, index, gates):
    out = torch.zeros_like(hidden)
    for expert in range(EXPERTS):
        y = torch.relu(hidden @ up[expert]) @ down[expert]
        out = out + y * (gates * (index == expert)).sum(1, keepdim=True)
    return out


def experts_of_a_plain_module(rank, world):
    """``exchange_experts`` needs no transformers: compare with one process, forward and all gradients."""
    own = EXPERTS // world
    results = {}
    for order in ORDERS:
        up, down, hidden, index, gates = layer_of_a_process(rank)
        part = [w[rank * own : (rank + 1) * own].clone().requires_grad_() for w in (up, down)]
        inputs = [hidden.requires_grad_(), gates.requires_grad_()]

        def compute(rows, numbers, ones, part=part):
            products = torch.einsum("ri,eio->reo", rows, part[0]).relu()
            return torch.einsum("rei,eio->reo", products, part[1])[torch.arange(len(rows)), numbers[:, 0]] * ones

        out = exchange_experts(hidden, index, gates, compute, own, grid_of(None, order, world // 2))
        (out * torch.arange(6)).sum().backward()
        results[order] = [out.detach(), *(t.grad for t in (*inputs, *part))]
    for order in ORDERS[1:]:
        assert all(map(torch.equal, results[order], results["flat"])), order
    for weight in (up, down):
        weight.requires_grad_()
    everyone = [layer_of_a_process(other)[2:] for other in range(world)]
    whole = [naive(up, down, *one) for one in everyone]
    sum((out * torch.arange(6)).sum() for out in whole).backward()
    expected = [whole[rank].detach(), up.grad[rank * own : (rank + 1) * own], down.grad[rank * own : (rank + 1) * own]]
    pairs = zip((results["flat"][i] for i in (0, 3, 4)), expected, strict=True)
    return max(float((a - b).abs().max()) if a.numel() else 0.0 for a, b in pairs)


def tiny_mixtral(experts):
    """Return a Mixtral of two layers; importing ``tiny_mixtures`` would take longer than all checks."""
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 128, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 8, "max_position_embeddings": 64}
    return MixtralForCausalLM(MixtralConfig(**sizes, **heads, num_local_experts=experts)).eval()


def model_path(world):
    path = f"{sys.argv[1]}-model-{world}"
    if dist.get_rank() == 0:
        model = tiny_mixtral(EXPERTS)
        store_exchange(model.config, Exchange(order="inter_first", ranks_per_node=max(1, world // 2)))
        model.save_pretrained(path)
    dist.barrier()
    return path


def load(path, world, shared, implementation="all_to_all", **kwargs):
    from transformers import MixtralForCausalLM
    from transformers.distributed import DistributedConfig

    sizes = {"tp_size": world} if shared else {"fsdp_size": world}
    placed = DistributedConfig(ep_size=world, ep_implementation=implementation, **sizes)
    return MixtralForCausalLM.from_pretrained(path, distributed_config=placed, **kwargs)


def batch_of(rank, shared):
    return torch.arange(3, 43).reshape(2, 20) + (0 if shared else rank)


def run(model, ids, backward=True):
    model.zero_grad()
    out = model(input_ids=ids, labels=ids, use_cache=False)
    grads = {}
    if backward:
        out.loss.backward()
        for name, parameter in model.named_parameters():
            grad = parameter.grad
            if grad is not None:
                grads[name] = grad.full_tensor() if hasattr(grad, "full_tensor") else grad
    logits = out.logits.detach()
    return logits.full_tensor() if hasattr(logits, "full_tensor") else logits, grads


def distance(found, expected):
    return max([0.0, *(float((found[name] - expected[name]).abs().max()) for name in expected if name in found)])


def models_of_transformers(rank, world):
    """Stock expert parallelism with our exchange against one process, and against its own all-to-all."""
    from transformers import MixtralForCausalLM

    if compat.VERSION < (5, 23):
        return None
    path, found = model_path(world), {}
    for shared in (True, False):
        ids = batch_of(rank, shared)
        alone = MixtralForCausalLM.from_pretrained(path)
        logits, _ = run(alone, ids)
        alone.zero_grad()
        batches = [batch_of(other, shared) for other in (range(1) if shared else range(world))]
        for one in batches:  # FSDP averages over the ranks with other batches
            (alone(input_ids=one, labels=one, use_cache=False).loss / len(batches)).backward()
        grads = {name: parameter.grad for name, parameter in alone.named_parameters()}
        model = load(path, world, shared)
        stock = run(model, ids)
        results = {}
        for order in ORDERS:
            names = attach_exchange(model, Exchange(order=order, ranks_per_node=max(1, world // 2)))
            assert len(names) == 2, names
            results[order] = run(model, ids)
        for order in ORDERS[1:]:
            assert torch.equal(results[order][0], results["flat"][0]), order
            assert all(torch.equal(grad, results["flat"][1][name]) for name, grad in results[order][1].items()), order
        report = expert_exchange(model)
        greedy = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
        same_text = model.generate(ids[:, :6], **greedy).tolist() == alone.generate(ids[:, :6], **greedy).tolist()
        assert "hf_optim_hierarchical" in registered()
        detach_settings(model)
        again = run(model, ids)
        found["shared" if shared else "own"] = {
            "logits": float((results["flat"][0] - logits).abs().max()),
            "gradients": distance(results["flat"][1], grads),
            "compared": len(results["flat"][1]),
            "stock": float((results["flat"][0] - stock[0]).abs().max()),
            "restored": bool(torch.equal(again[0], stock[0])),
            "clean": "hf_optim_hierarchical" not in registered() and exchange_of(model) is None,
            "report": next(iter(report.values())),
            "text": same_text,
        }
    return found


def registered():
    from transformers.distributed.expert_parallel import EPImplementationInterface

    return list(EPImplementationInterface())


def a_checkpoint_loads_with_its_exchange(rank, world):
    if compat.VERSION < (5, 23):
        return None
    model = load(model_path(world), world, True, optim_config="auto")
    found = next(iter(expert_exchange(model).values()))
    detach_settings(model)
    return found


def a_capacity_is_kept_before_the_exchange(rank, world):
    """Every rank has the batch: the capacity counts and drops what one process drops, under a priority, too."""
    from transformers import MixtralForCausalLM

    if compat.VERSION < (5, 23):
        return None
    path, ids = model_path(world), batch_of(0, True)
    found = []
    for routing in (Routing(capacity=0.5), Routing(capacity=0.5, priority="top1", renormalize=True)):
        model, alone = load(path, world, True), MixtralForCausalLM.from_pretrained(path)
        attach_exchange(model, Exchange(ranks_per_node=max(1, world // 2)))
        for one in (model, alone):
            attach_routing(one, routing)
        with torch.no_grad():
            apart = float((run(model, ids, False)[0] - run(alone, ids, False)[0]).abs().max())
        loads = [[(load.chosen, load.dropped) for load in expert_load(one).values()] for one in (model, alone)]
        assert loads[0] == loads[1]
        found.append([apart, sum(map(sum, (dropped for _, dropped in loads[0])))])
        detach_settings(model)
        assert "hf_optim" in ALL_EXPERTS_FUNCTIONS  # that of ``alone``
    return found


def ranks_that_do_not_divide_the_experts(rank, world):
    if compat.VERSION < (5, 23):
        return None
    path = model_path(world) + "-odd"
    if rank == 0:
        tiny_mixtral(5).save_pretrained(path)
    dist.barrier()
    load(path, world, True, optim_config="auto")


def a_rank_that_does_not_answer(rank, world):
    """One rank is late: the others get an error after the timeout of their group."""
    group = dist.new_group(list(range(world)), timeout=timedelta(seconds=2))
    grid = grid_of(group, "intra_first", max(1, world // 2), timeout=2.0)
    counts, start = torch.ones(world, dtype=torch.int64), time.monotonic()
    all_to_all(torch.zeros(world, 1), counts, grid)
    if rank == world - 1:
        time.sleep(4)
    try:
        all_to_all(torch.zeros(world, 1), counts, grid)
    except Exception as error:
        return [type(error).__name__, time.monotonic() - start]
    return ["no error", time.monotonic() - start]


def a_rank_that_dies(rank, world):
    """The last check: one rank ends; every other one gets an error soon, and does not hang."""
    group = dist.new_group(list(range(world)), timeout=timedelta(seconds=10))
    grid = grid_of(group, "intra_first", max(1, world // 2), timeout=10.0)
    counts = torch.ones(world, dtype=torch.int64)
    all_to_all(torch.zeros(world, 1), counts, grid)
    if rank == world - 1:
        os._exit(3)
    start = time.monotonic()
    try:
        for _ in range(3):
            all_to_all(torch.zeros(world, 1), counts, grid)
    except Exception as error:
        return [type(error).__name__, str(error)[:80], time.monotonic() - start]
    return ["no error", "", time.monotonic() - start]


CHECKS = [
    rows_come_from_the_right_rank,
    equal_to_flat,
    sub_groups_are_made_once,
    the_environment_gives_the_grid,
    nodes_that_differ_are_refused,
    experts_of_a_plain_module,
    models_of_transformers,
    a_checkpoint_loads_with_its_exchange,
    a_capacity_is_kept_before_the_exchange,
    ranks_that_do_not_divide_the_experts,
    a_rank_that_does_not_answer,
    a_rank_that_dies,
]
PLAIN = [check for check in CHECKS if check not in (models_of_transformers, a_capacity_is_kept_before_the_exchange)]

if __name__ == "__main__":
    by_world = {world: {check.__name__: check for check in (PLAIN if world == 8 else CHECKS)} for world in (2, 4, 8)}
    raise SystemExit(forked_ranks.main(by_world))
