"""Exchanges between ranks: grids, routes, and what real ranks (gloo) find in ``helpers/exchange_ranks.py``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from hf_optim import ModelError
from hf_optim.toolkit import compat
from hf_optim.toolkit.distributed import Grid, messages, ranks_per_node, route_from, shape_of
from hf_optim.toolkit.experts import Exchange, experts_per_rank, register_exchanges, unregister_exchanges

SCRIPT = Path(__file__).parents[1] / "helpers" / "exchange_ranks.py"
REGISTRY = pytest.mark.skipif(compat.VERSION < (5, 23), reason="transformers has exchanges between ranks since 5.23")


# -- grids ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, None),
        ({"LOCAL_SIZE": "4"}, 4),
        ({"LOCAL_WORLD_SIZE": "8", "LOCAL_SIZE": "4"}, 8),
        ({"SLURM_NTASKS_PER_NODE": "2"}, 2),
        ({"OMPI_COMM_WORLD_LOCAL_SIZE": " 2 "}, 2),
    ],
)
def test_launchers_state_the_ranks_of_a_node(environment, expected):
    assert ranks_per_node(environment) == expected


@pytest.mark.parametrize("value", ["0", "-1", "eight", "1e9", "9" * 30, "2\x1b[31m"])
def test_a_wrong_environment_is_refused_by_name(value):
    with pytest.raises(ModelError, match="LOCAL_WORLD_SIZE must be the ranks per node") as caught:
        ranks_per_node({"LOCAL_WORLD_SIZE": value})
    assert "\x1b" not in str(caught.value)


def test_shapes_of_groups():
    assert [shape_of(8, per) for per in (None, 1, 2, 4, 8, 16)] == [(1, 8), (8, 1), (4, 2), (2, 4), (1, 8), (1, 8)]
    with pytest.raises(ModelError, match="8 ranks exchange tokens and a node has 3"):
        shape_of(8, 3)
    with pytest.raises(ModelError, match="3 ranks do not divide the 8 experts"):
        experts_per_rank(8, 3)


def test_a_rank_sends_as_many_messages_as_the_two_steps_have_partners():
    assert messages(16, 8, "flat") == 127
    assert messages(16, 8, "intra_first") == messages(16, 8, "inter_first") == 7 + 15


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"kind": "ring"}, "kind must be one of"),
        ({"order": "random"}, "order must be one of"),
        ({"ranks_per_node": 0}, "ranks_per_node must be an integer"),
        ({"timeout": float("nan")}, "timeout must be above 0"),
        ({"timeout": 0.0}, "timeout must be above 0"),
        ({"degrees": []}, "degrees must be a list of 1 to 8"),
        ({"degrees": [2, 2]}, "degrees must differ"),
        ({"degrees": [0]}, "a degree must be an integer"),
        ({"trials": 0}, "trials must be an integer"),
    ],
)
def test_wrong_settings(fields, text):
    with pytest.raises(ValueError, match=text):
        Exchange(**fields)


@REGISTRY
def test_names_for_stock_loading_are_registered_and_taken_away():
    from transformers.distributed.expert_parallel import EPImplementationInterface

    names = register_exchanges()
    assert set(names) <= set(EPImplementationInterface())
    unregister_exchanges()
    assert not set(names) & set(EPImplementationInterface())


# -- routes, simulated in one process ---------------------------------------------------------------------------------
def simulate(table, grids, rows):
    """Run the routes of all ranks at once: a step of every rank, then the next."""
    routes = [route_from(table, grid) for grid in grids]
    assert len({len(route.steps) for route in routes}) == 1
    for steps in zip(*(route.steps for route in routes), strict=True):
        if steps[0].group is None:
            parts = [one.split(list(step.blocks)) for one, step in zip(rows, steps, strict=True)]
            rows = [torch.cat([part[i] for i in step.order]) for part, step in zip(parts, steps, strict=True)]
            continue
        sent = [
            dict(zip(step.group, one.split(list(step.send)), strict=True))
            for one, step in zip(rows, steps, strict=True)
        ]
        for rank, step in enumerate(steps):
            assert tuple(len(sent[other][rank]) for other in step.group) == step.receive
        rows = [torch.cat([sent[other][rank] for other in step.group]) for rank, step in enumerate(steps)]
    return rows


@pytest.mark.parametrize("order", ["flat", "intra_first", "inter_first"])
@pytest.mark.parametrize(("nodes", "local"), [(2, 2), (3, 2), (2, 4), (4, 2), (5, 3)])
def test_routes_bring_every_row_to_its_rank_in_the_order_of_senders(nodes, local, order):
    size = nodes * local
    table = torch.randint(0, 4, (size, size), generator=torch.Generator().manual_seed(size)).tolist()
    table[1] = [0] * size
    grids = [
        Grid(
            order, nodes, local, rank, tuple(range(size)),
            tuple(range(rank // local * local, rank // local * local + local)), tuple(range(rank % local, size, local)),
        )
        for rank in range(size)
    ]  # fmt: skip
    rows = [
        torch.tensor([[rank, to, i] for to in range(size) for i in range(table[rank][to])]).view(-1, 3)
        for rank in range(size)
    ]
    for rank, found in enumerate(simulate(table, grids, rows)):
        assert found.tolist() == [[s, rank, i] for s in range(size) for i in range(table[s][rank])]
    partners = {grid.messages for grid in grids}
    assert partners == {size - 1 if order == "flat" else local - 1 + nodes - 1}


# -- real ranks -------------------------------------------------------------------------------------------------------
def ranks(python, folder, world):
    done = python.script(SCRIPT, folder / "found", world)
    assert done.status == 0, done.err[-2000:]
    return json.loads((folder / f"found-{world}.json").read_text())


def check(found, world, with_models=True):
    """Assert what the checks of all ranks found."""

    def of(name):
        assert all("error" not in one for one in found[name]), found[name]
        return [one["found"] for one in found[name]]

    shapes = len([n for n in range(1, world + 1) if world % n == 0])
    assert of("equal_to_flat") == [shapes * 4 * 2] * world
    of("rows_come_from_the_right_rank")
    made = [0, 3, 1] if world == 2 else [2, 1, world // 2 - 1 + 1]  # two ranks form no grid and need no sub-groups
    assert of("sub_groups_are_made_once") == [made] * world
    assert of("the_environment_gives_the_grid") == [[[2, world // 2]] * 2] * world
    for one in found["nodes_that_differ_are_refused"]:
        assert "ModelError: nodes have different numbers of ranks" in one["error"]
    assert max(of("experts_of_a_plain_module")) < 1e-4
    for kind, seconds in of("a_rank_that_does_not_answer")[:-1]:
        assert kind == "RankError"
        assert seconds < 15
    *others, dead = found["a_rank_that_dies"]
    assert dead == {"error": "ended"}
    for one in others:
        kind, _, seconds = one["found"]
        assert kind == "RankError", one
        assert seconds < 30  # the timeout of the group is 10
    if compat.VERSION < (5, 23) or not with_models:
        return
    for rank in of("models_of_transformers"):
        for batch in ("shared", "own"):
            result = rank[batch]
            assert result["logits"] < 1e-4
            assert result["gradients"] < 1e-4
            assert result["stock"] < 1e-5
            assert result["compared"] == 21
            assert result["restored"], batch
            assert result["clean"], batch
            assert result["text"], batch
            assert result["report"]["nodes"] == 2
    for report in of("a_checkpoint_loads_with_its_exchange"):
        assert report["order"] == ("flat" if world == 2 else "inter_first")
    for rank in of("a_capacity_is_kept_before_the_exchange"):
        assert all(apart < 1e-4 and dropped > 0 for apart, dropped in rank)
    for one in found["ranks_that_do_not_divide_the_experts"]:
        assert "ModelError" in one["error"]
        assert f"5 experts across {world}" in one["error"]


def test_two_ranks(python, tmp_path):
    check(ranks(python, tmp_path, 2), 2)


@pytest.mark.slow
def test_four_ranks(python, tmp_path):
    check(ranks(python, tmp_path, 4), 4)


@pytest.mark.slow
def test_eight_ranks(python, tmp_path):
    check(ranks(python, tmp_path, 8), 8, with_models=False)
