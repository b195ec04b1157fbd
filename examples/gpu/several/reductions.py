"""Sums of small tensors over GPUs: by NCCL, and in one launch through mapped memory; equal or not, and times by size.

    torchrun --nproc-per-node 2 examples/gpu/several/reductions.py

Each rank has ``[tokens, width]`` in bfloat16, as behind a layer that is cut by columns. Seconds of one call, launched
by the host and in a replayed graph of 20 calls. With two ranks both ways add the same two numbers, so the results must
be equal to the bit; with more, NCCL may add in another order. Gathers, too, are compared. Writes
``$OUT/reductions.json``.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from ranks import CUDA, join, leave, on_all, say, timed, write

from hf_optim.toolkit.distributed.peer_memory import fits, peer_memory
from hf_optim.toolkit.distributed.tensor_parts import gather_over_ranks

WIDTHS, TOKENS = ((2048, 4096, 8192), (1, 8, 64, 1024)) if CUDA else ((64,), (1, 8))
IN_A_GRAPH = 20


def replayed(call: Callable[[], Any]) -> float:
    """Return the seconds of one call in a replayed graph of several."""
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    dist.barrier()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(IN_A_GRAPH):
            call()
    return timed(graph.replay, 10) / IN_A_GRAPH


def row_of(x: torch.Tensor, peers: Any) -> dict[str, Any]:
    """Time and compare the sums of one tensor."""
    mine = x.clone()
    ways: dict[str, Callable[[], Any]] = {"nccl": lambda: dist.all_reduce(mine)}
    row: dict[str, Any] = {"tokens": x.shape[0], "width": x.shape[1], "bytes": x.nbytes}
    if peers is not None and fits(x):
        ways["one_launch"] = lambda: peers.sum(x)
        plain = x.clone()
        dist.all_reduce(plain)
        row["equal"] = on_all(torch.equal(peers.sum(x), plain))
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x)
    row["gather_equal"] = on_all(torch.equal(gather_over_ranks(x), torch.cat(parts, dim=-1)))
    for way, call in ways.items():
        row[f"{way}_seconds"] = timed(call, 50)
        if CUDA:
            row[f"{way}_replayed_seconds"] = replayed(call)
    return row


def main() -> None:
    device = join()
    peers = peer_memory(device)
    results: dict[str, Any] = {"mapped_memory": peers is not None, "rows": []}
    say(f"mapped memory: {'yes' if peers is not None else 'no'}")
    generator = torch.Generator().manual_seed(dist.get_rank())
    try:
        for width in WIDTHS:
            for tokens in TOKENS:
                x = torch.randn(tokens, width, generator=generator).to(device, torch.bfloat16)
                results["rows"].append(row_of(x, peers))
                say(results["rows"][-1])
                write("reductions", results)
    except Exception:
        results["error"] = traceback.format_exc()[-600:]
        say(results["error"])
    write("reductions", results)
    leave()
    if wrong := [row for row in results["rows"] if not (row.get("equal", True) and row["gather_equal"])]:
        raise SystemExit(f"not equal: {wrong}")


if __name__ == "__main__":
    main()
