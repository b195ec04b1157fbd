"""Exchanges between GPUs in every order: bitwise equal to one all-to-all, then times by size, and the cost model.

    torchrun --nproc-per-node 2 examples/gpu/several/exchange.py

Orders: among all ranks (``flat``), within nodes first, between nodes first, and in 2 and 4 chunks as Tutel does. Nodes
are numbered only: 2 ranks are 1 x 2 and 2 x 1, which have one exchange in every order; 4 and 8 ranks also 2 x 2, 2 x 4
and 4 x 2. So that two ranks, too, time the two exchanges of a hierarchical order, ``two steps of one group`` runs both
of them over all ranks. ``all_to_all_single`` is PyTorch's call alone. Writes ``$OUT/exchange.json``.
"""

from __future__ import annotations

from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from ranks import TINY, join, leave, on_all, say, timed, write

from hf_optim.toolkit.distributed import all_to_all, fit_cost, grid_of, route_from
from hf_optim.toolkit.distributed.exchange import Route
from hf_optim.toolkit.experts.adaptive_layer import run_exchange

ORDERS = ("flat", "intra_first", "inter_first")
SIZES = [2**power for power in range(10, 17 if TINY else 27, 2)]
"""Bytes that a rank sends in all, to itself included."""
EXPERTS = 4
"""Per rank, where rows are exchanged in chunks."""


def grids(world: int) -> list[tuple[int, int]]:
    """Return nodes and ranks per node of every grid."""
    return [(world // local, local) for local in range(1, world + 1) if world % local == 0]


def tables(world: int) -> dict[str, torch.Tensor]:
    """Return rows that each rank has for each: even, uneven, one rank silent, all to one rank, none."""
    uneven = torch.randint(0, 300, (world, world), generator=torch.Generator().manual_seed(0))
    silent, one = uneven.clone(), torch.zeros_like(uneven)
    silent[0] = 0
    one[:, world - 1] = 77
    even = torch.full_like(uneven, 128)
    return {"even": even, "uneven": uneven, "silent": silent, "one": one, "none": torch.zeros_like(uneven)}


def check(device: torch.device) -> dict[str, Any]:
    """Compare rows and gradients of all orders, grids and numbers of chunks with PyTorch's call: bitwise equal or not."""
    world, rank = dist.get_world_size(), dist.get_rank()
    compared, wrong = 0, []
    for name, table in tables(world).items():
        for dtype in (torch.float32, torch.bfloat16):
            random = torch.Generator().manual_seed(rank)
            rows = torch.randn(int(table[rank].sum()), 64, generator=random).to(device, dtype)
            expected = rows.new_empty(int(table[:, rank].sum()), 64)
            dist.all_to_all_single(expected, rows, table[:, rank].tolist(), table[rank].tolist())
            factor = torch.randn(expected.shape, generator=random).to(device, dtype)
            gradient = torch.empty_like(rows)
            dist.all_to_all_single(gradient, factor, table[rank].tolist(), table[:, rank].tolist())
            for nodes, local in grids(world):
                for order in ORDERS:
                    mine = rows.clone().requires_grad_()
                    found, _ = all_to_all(mine, table[rank].to(device), grid_of(None, order, local))
                    found.backward(factor)
                    route = route_from(table.tolist(), grid_of(None, order, local))
                    same = torch.equal(found, expected) and torch.equal(mine.grad, gradient)
                    same = same and torch.equal(route.forth(rows), expected)
                    same = same and torch.equal(route.back(expected), rows)
                    compared += 1
                    if not on_all(bool(same)):
                        wrong.append(f"{name} {dtype} {nodes}x{local} {order}")
    random = torch.Generator().manual_seed(1)
    counts = torch.randint(0, 60, (world, EXPERTS * world), generator=random)
    rows = torch.randn(int(counts[rank].sum()), 64, generator=torch.Generator().manual_seed(rank)).to(device)
    factor = 1.0 + torch.arange(EXPERTS, device=device).float() + EXPERTS * rank
    held: list[Any] = []
    for degree in (1, 2, 4):  # scaling by a power of two and a small integer rounds in no order of rows
        for nodes, local in grids(world):
            for order in ORDERS:
                mine = rows.clone().requires_grad_()
                grid = grid_of(None, order, local)
                out = run_exchange(mine, counts, lambda x, n, w: x * factor[n] * w, EXPERTS, grid, degree)
                out.sum().backward()
                held = held or [out.detach(), mine.grad]
                compared += 1
                if not on_all(torch.equal(out, held[0]) and torch.equal(mine.grad, held[1])):
                    wrong.append(f"{degree} chunks {nodes}x{local} {order}")
    return {"compared": compared, "wrong": wrong}


def times(device: torch.device) -> list[dict[str, Any]]:
    """Return the seconds of each exchange by size: forward alone, and forward with backward."""
    world, rows = dist.get_world_size(), []
    for total in SIZES:
        data = torch.zeros(world, total // 4 // world, device=device)
        out, learned = torch.empty_like(data), data.clone().requires_grad_()
        row_count = 50 if total < 2**22 else 10
        ways: dict[str, tuple[str, int, int, Route]] = {}
        for nodes, local in grids(world):
            for order in ORDERS:
                if order == "flat" and local != world:
                    continue  # the same call in every grid
                if order == "flat" or 1 not in (nodes, local):
                    route = route_from([[1] * world] * world, grid_of(None, order, local))
                    ways[f"{nodes}x{local} {order}"] = order, nodes, local, route
        flat = next(way[3] for way in ways.values())
        ways["two steps of one group"] = "double", 1, world, Route(flat.steps * 2, flat.sent, flat.received)
        plain = timed(lambda out=out, data=data: dist.all_to_all_single(out, data), row_count)
        rows.append({"way": "all_to_all_single", "total": total, "seconds": plain})
        for name, (order, nodes, local, route) in ways.items():

            def both(route: Route = route, x: torch.Tensor = learned) -> None:
                x.grad = None
                route.forth(x).backward(x.detach())

            row = {"way": name, "order": order, "nodes": nodes, "local": local, "total": total, "bytes": total // world}
            row["seconds"] = timed(lambda route=route, data=data: route.forth(data), row_count)
            rows.append({**row, "forward_backward": timed(both, row_count)})
        said = [row for row in rows if row["total"] == total]
        say(f"{total:>9} B " + "  ".join(f"{row['way']} {row['seconds'] * 1e6:.1f} us" for row in said))
    return rows


def predicted(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Fit the model to every second size, and add its prediction to all rows; errors are those of the other sizes."""
    held = [row for row in rows if row.get("order") in ORDERS]
    fitted = set(SIZES[::2])
    cost = fit_cost([row for row in held if row["total"] in fitted], one_link=True)
    for row in held:
        row["predicted"] = cost.seconds(row["order"], row["nodes"], row["local"], row["bytes"])
    errors = [abs(row["predicted"] / row["seconds"] - 1) for row in held if row["total"] not in fitted]
    return {"fit": vars(cost), "sizes_fitted": sorted(fitted), "error_median": median(errors), "error_max": max(errors)}


def main() -> None:
    device = join()
    results: dict[str, Any] = {"checks": check(device)}
    say(f"{results['checks']['compared']} exchanges compared, wrong: {results['checks']['wrong'] or 'none'}")
    write("exchange", results)
    results["times"] = times(device)
    write("exchange", results)
    results["model"] = predicted(results["times"])
    say(f"model: {results['model']}")
    leave()
    if results["checks"]["wrong"]:
        raise SystemExit(f"not bitwise equal: {results['checks']['wrong']}")


if __name__ == "__main__":
    main()
