"""A rank that is killed in a collective ends all others in time, and their message names it.

    python examples/gpu/several/dead_rank.py --ranks 2

Starts the ranks itself, without torchrun, which would end the others at once. Each watches the others as a model
divided among ranks does (``hf_optim.toolkit.distributed.liveness``). After some all-reduces the last rank kills itself
with SIGKILL while the others wait in the next one. The limit of the process group is ten minutes, so nothing else ends
them. A second round stops the rank (SIGSTOP) instead: a process that hangs. Writes ``$OUT/dead-rank.json``.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from ranks import CUDA, TINY, join, say, write

LIMIT = 5.0
"""Seconds without a sign of a rank after which it has ended."""
GRACE = 20.0
"""Seconds beyond the limit within which every rank must have ended."""


def work(how: str) -> None:
    """Run one rank; the last one ends, or stops, while the others wait for it."""
    from hf_optim.toolkit.distributed.liveness import guarded, watch_ranks

    device = join(600.0)
    rank, last = dist.get_rank(), dist.get_world_size() - 1
    watch_ranks(LIMIT)
    x = torch.ones(1 << 16, device=device)
    for _ in range(5):
        dist.all_reduce(x)
    if CUDA:
        torch.cuda.synchronize()
    dist.barrier()
    if rank == last:
        time.sleep(2.0)  # the others are in their collective by now
        print(f"ends at {time.time():.3f}", flush=True)
        os.kill(os.getpid(), signal.SIGKILL if how == "killed" else signal.SIGSTOP)
    print("waits", flush=True)

    def collective() -> None:
        dist.all_reduce(x)
        if CUDA:
            torch.cuda.synchronize()

    guarded(collective)
    print("came back from the collective", flush=True)


def once(ranks: int, how: str, folder: Path) -> dict[str, Any]:
    """Start the ranks, wait for all but the last, and return how each ended, when, and with which message."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {**os.environ, "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1"}
    common |= {"MASTER_PORT": str(port), "NCCL_NVLS_ENABLE": "0", "PYTHONUNBUFFERED": "1"}
    children, outputs = [], []
    for rank in range(ranks):
        outputs.append(folder / f"{how}-{rank}.txt")
        with outputs[-1].open("w") as file:
            command = [sys.executable, __file__, "--ranks", str(ranks), "--work", how]
            environment = {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            children.append(subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT))
    last = ranks - 1
    gone: float | None = None
    ended: dict[int, float] = {}
    patience = time.monotonic() + 120.0  # to start
    while len(ended) < last and time.monotonic() < patience:
        time.sleep(0.1)
        said = [line for line in outputs[last].read_text().splitlines() if line.startswith("ends at ")]
        if gone is None and said:
            gone = float(said[0].removeprefix("ends at "))
            patience = time.monotonic() + LIMIT + GRACE
        for rank in range(last):
            if rank not in ended and children[rank].poll() is not None:
                ended[rank] = time.time()
    survivors = []
    for rank, child in enumerate(children):
        if rank < last:
            lines = outputs[rank].read_text().splitlines()
            named = [line for line in lines if f"rank {last} of {ranks}" in line]
            after = round(ended[rank] - gone, 2) if rank in ended and gone is not None else None
            entry = {"rank": rank, "status": child.poll(), "seconds_after": after, "message": (named or [""])[-1][:400]}
            survivors.append({**entry, "last_lines": lines[-3:]})
        if child.poll() is None:
            child.kill()
        child.wait()
    named_and_in_time = [
        bool(one["message"]) and one["status"] not in (0, None) and one["seconds_after"] is not None
        for one in survivors
    ]
    return {"how": how, "rank": last, "survivors": survivors, "all_ended_and_named_it": all(named_and_in_time)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--work", choices=("killed", "stopped"), help="used by the script itself")
    args = parser.parse_args()
    if args.work:
        work(args.work)
        return
    results: dict[str, Any] = {"backend": "nccl" if CUDA else "gloo", "ranks_started": args.ranks, "limit_s": LIMIT}
    results |= {"grace_s": GRACE, "cases": []}
    with tempfile.TemporaryDirectory() as folder:
        for how in ("killed",) if TINY else ("killed", "stopped"):
            results["cases"].append(once(args.ranks, how, Path(folder)))
            say(results["cases"][-1])
            write("dead-rank", results)
    if not all(case["all_ended_and_named_it"] for case in results["cases"]):
        raise SystemExit("a rank did not end in time, or did not name the one that ended")


if __name__ == "__main__":
    main()
