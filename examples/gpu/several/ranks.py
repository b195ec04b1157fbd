"""What the measurements on several GPUs share: joining the ranks, the link between them, timing, and the JSON file.

A script is started by ``torchrun`` with any number of ranks. ``TINY=1`` runs small shapes on a CPU with gloo.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

TINY = bool(os.environ.get("TINY"))
OUT = Path(os.environ.get("OUT", "."))
CUDA = torch.cuda.is_available() and not TINY
DTYPE = torch.bfloat16 if CUDA else torch.float32


def join(seconds: float = 120.0) -> torch.device:
    """Join the ranks that torchrun has started; a collective that takes longer than ``seconds`` fails.

    NCCL for tensors on GPUs, gloo for those on the host: some counts stay there.
    """
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
    if not CUDA:
        torch.set_num_threads(1)
        dist.init_process_group("gloo", timeout=timedelta(seconds=seconds))
        return torch.device("cpu")
    place = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(place)
    dist.init_process_group("cpu:gloo,cuda:nccl", timeout=timedelta(seconds=seconds), device_id=place)
    return place


def leave() -> None:
    """Wait for the others, and leave the process group, if there is one."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def now() -> float:
    """Return the time in seconds after all work of this GPU."""
    if CUDA:
        torch.cuda.synchronize()
    return time.perf_counter()


def slowest(seconds: float) -> float:
    """Return the largest of the times of all ranks."""
    found = torch.tensor(seconds, dtype=torch.float64)
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return float(found)


def timed(call: Callable[[], Any], in_a_row: int = 20, rounds: int = 5) -> float:
    """Return the seconds of one call, with those of the slowest rank: the least of some rounds of several in a row."""
    for _ in range(2):
        call()
    found = []
    for _ in range(rounds):
        dist.barrier()
        began = now()
        for _ in range(in_a_row):
            call()
        found.append(slowest((now() - began) / in_a_row))
    return min(found)


def on_all(flag: bool) -> bool:
    """Return True if it is True on all ranks."""
    found = torch.tensor(int(flag))
    dist.all_reduce(found, op=dist.ReduceOp.MIN)
    return bool(found)


@functools.cache
def link() -> str:
    """Return what joins the first two GPUs: ``NV18`` and the like are NVLink; ``PIX`` to ``SYS`` are PCIe."""
    if not CUDA:
        return "none (one host's CPU)"
    peer = torch.cuda.device_count() > 1 and torch.cuda.can_device_access_peer(0, 1)
    try:
        table = subprocess.run(["nvidia-smi", "topo", "-m"], capture_output=True, text=True, timeout=20, check=False)
        rows = [line.split() for line in table.stdout.replace("\x1b[4m", "").replace("\x1b[0m", "").splitlines()]
        first = next(row for row in rows if row and row[0] == "GPU0" and "X" in row)
        kind = first[2] if len(first) > 2 else "one GPU"
    except (OSError, StopIteration, subprocess.TimeoutExpired):
        kind = "unknown"
    name = "NVLink" if kind.startswith("NV") else "PCIe"
    return f"{name} ({kind}), peer access {'yes' if peer else 'no'}"


def about() -> dict[str, Any]:
    """Return device, number of ranks, link and versions."""
    import transformers

    found: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if CUDA else "CPU",
        "ranks": dist.get_world_size() if dist.is_initialized() else 1,
        "link": link(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "tiny": TINY,
    }
    if CUDA:
        import triton

        found["triton"] = triton.__version__
        found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
        found["nvlink_multicast"] = os.environ.get("NCCL_NVLS_ENABLE") != "0"
    return found


def write(name: str, results: dict[str, Any]) -> None:
    """Write ``$OUT/NAME.json`` on rank 0; call it after each part, since a later one may fail or run out of time."""
    if not dist.is_initialized() or dist.get_rank() == 0:
        OUT.mkdir(parents=True, exist_ok=True)
        text = json.dumps({**about(), **results}, indent=1)
        (OUT / f"{name}.json").write_text(text + "\n", encoding="utf-8")


def say(*what: Any) -> None:
    """Print on rank 0."""
    if not dist.is_initialized() or dist.get_rank() == 0:
        print(*what, flush=True)
        sys.stdout.flush()
