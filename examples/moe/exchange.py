"""Time exchanges between ranks: all ranks at once, within nodes first, between nodes first; fit a model, simulate it.

    python examples/moe/exchange.py --output model_cards/moe/exchange

Forks 2, 4 and 8 ranks (gloo, on this machine, so that "nodes" are only numbered as such), exchanges 1 KiB to 8 MiB of
each rank in every order, fits ``hf_optim.toolkit.distributed.ExchangeCost`` to the times, and applies the model to
clusters of up to 2,048 ranks, with the fitted constants and with assumed ones of a GPU cluster. Two minutes on two CPU
cores.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from datetime import timedelta
from pathlib import Path
from statistics import median
from typing import Any

import exchange_page
import torch
import torch.distributed as dist

from hf_optim.toolkit.distributed import ExchangeCost, Grid, fit_cost, grid_of, messages, route_from

GRIDS = ((2, 1), (2, 2), (2, 4), (4, 2))
TOTALS = [2**k for k in range(10, 24)]
"""Bytes that a rank sends in all, to itself included: 1 KiB to 8 MiB."""

IN_A_ROW = 8
"""Exchanges of a round, for parts below 2 MiB; two from there on."""

ORDERS = ("flat", "intra_first", "inter_first")
SIMULATED = (8, 16, 32, 64, 128, 256, 512, 1024, 2048)
PER_NODE = 8
ASSUMED = ExchangeCost(
    collective=10e-6, message_inside=2e-6, byte_inside=1 / 300e9, message_between=5e-6, byte_between=1 / 25e9,
    byte_moved=1 / 1000e9,
)  # fmt: skip
"""Not measured: 10 us a collective, 2 and 5 us a message, 300 GB/s within and 25 GB/s between nodes,
1 TB/s of memory."""


def timed(grid: Grid, rows: torch.Tensor, rounds: int) -> float:
    """Return the time of one exchange, in seconds: the best of some rounds of several exchanges in a row.

    Of a round the slowest rank counts. With more ranks than cores, most of the spread is the scheduler's.
    """
    each = len(rows) // grid.size
    route = route_from([[each] * grid.size] * grid.size, grid)
    found = []
    in_a_row = IN_A_ROW if rows.numel() < 2**19 else 2
    for number in range(rounds + 1):
        dist.barrier()
        start = time.perf_counter()
        for _ in range(in_a_row):
            route.forth(rows)
        spent = torch.tensor((time.perf_counter() - start) / in_a_row, dtype=torch.float64)
        dist.all_reduce(spent, op=dist.ReduceOp.MAX)
        if number:
            found.append(float(spent))
    return min(found)


def measure(nodes: int, local: int, rounds: int) -> list[dict[str, Any]]:
    """Return the times of one grid, as one of its ranks."""
    size, found = nodes * local, []
    grids = {order: grid_of(None, order, local) for order in ORDERS}
    for total in TOTALS:
        rows = torch.zeros(total // 4, dtype=torch.float32).view(size, -1)
        for order in ORDERS if 1 not in (nodes, local) else ORDERS[:1]:
            seconds = timed(grids[order], rows.view(size, -1), rounds)
            found.append(
                {
                    "order": order,
                    "nodes": nodes,
                    "local": local,
                    "total": total,
                    "bytes": total // size,
                    "seconds": seconds,
                }
            )
    return found


def on_ranks(nodes: int, local: int, rounds: int) -> list[dict[str, Any]]:
    """Fork the ranks of a grid, and return what rank 0 measures."""
    world = nodes * local
    with tempfile.TemporaryDirectory() as folder:
        children = []
        for rank in range(world):
            child = os.fork()
            if not child:
                store = dist.FileStore(f"{folder}/store", world)
                dist.init_process_group(
                    "gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=120)
                )
                found = measure(nodes, local, rounds)
                if rank == 0:
                    Path(folder, "found.json").write_text(json.dumps(found))
                os._exit(0)
            children.append(child)
        for child in children:
            os.waitpid(child, 0)
        return json.loads(Path(folder, "found.json").read_text())


def simulated(cost: ExchangeCost) -> list[dict[str, Any]]:
    """Return for each number of ranks the messages, and the bytes of a rank above which one exchange is faster."""
    rows = []
    for ranks in SIMULATED:
        nodes = max(1, ranks // PER_NODE)
        crossing = cost.crossing(nodes, PER_NODE) if nodes > 1 else None
        rows.append(
            {
                "ranks": ranks,
                "messages_flat": messages(nodes, PER_NODE, "flat"),
                "messages_hierarchical": messages(nodes, PER_NODE, "intra_first"),
                "crossing_total": None if crossing is None else crossing * ranks,
                "seconds": {
                    order: {str(total): cost.seconds(order, nodes, PER_NODE, total / ranks) for total in (2**20, 2**26)}
                    for order in ORDERS[:2]
                },
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("model_cards/moe/exchange"))
    parser.add_argument("--rounds", type=int, default=12, help="rounds of exchanges per size")
    parser.add_argument("--refit", action="store_true", help="do not measure: fit the times in exchange.json again")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows, cores, rounds = [], os.cpu_count() or 1, args.rounds
    if args.refit:
        held = json.loads((args.output / "exchange.json").read_text(encoding="utf-8"))
        rows, cores, rounds = held["measured"], held["cores"], held["rounds"]
    else:
        for nodes, local in GRIDS:
            rows += on_ranks(nodes, local, args.rounds)
            print(f"{nodes} x {local} measured", flush=True)
    results = {"rounds": rounds, **fitted(rows, cores)}
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "exchange.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    exchange_page.write(args.output)


def fitted(rows: list[dict[str, Any]], cores: int) -> dict[str, Any]:
    """Return the record: times with those of the fitted model, its constants, and what it says of larger clusters.

    Ranks that share a core work one after the other, so the constants are those of a rank with a core of its own.
    """

    def waiting(row: dict[str, Any]) -> float:
        return max(1.0, row["nodes"] * row["local"] / cores)

    cost = fit_cost([{**row, "seconds": row["seconds"] / waiting(row)} for row in rows], one_link=True)
    for row in rows:
        row["fitted"] = waiting(row) * cost.seconds(row["order"], row["nodes"], row["local"], row["bytes"])
    errors = [abs(row["fitted"] / row["seconds"] - 1) for row in rows]
    return {
        "cores": cores,
        "measured": rows,
        "fit": vars(cost),
        "fit_error_median": median(errors),
        "assumed": vars(ASSUMED),
        "ranks_per_node": PER_NODE,
        "simulated_fitted": simulated(cost),
        "simulated_assumed": simulated(ASSUMED),
    }


if __name__ == "__main__":
    main()
