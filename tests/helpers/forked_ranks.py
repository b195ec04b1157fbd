"""Run functions on several gloo ranks that are forked from one process, so that imports are paid for once.

A script calls ``main(checks)``: for each world size given on the command line it forks the ranks, calls every check of
them in turn, and writes ``OUTPUT-<world>.json``: name of the check -> what each rank returned, or its error.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

TIMEOUT = 15
IMPORTED = (
    "hf_optim.lifecycle.loading",
    "hf_optim.compressed.packed.loader",
    "transformers.models.mixtral.modeling_mixtral",
    "transformers.distributed.expert_parallel",
    "transformers.distributed.fsdp",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
)
"""What ranks would import one by one."""


def main(checks: Mapping[int, Mapping[str, Callable[..., Any]]]) -> int:
    output, *worlds = sys.argv[1:]
    for name in IMPORTED:
        with contextlib.suppress(ImportError):  # not in every version
            importlib.import_module(name)
    torch.set_num_threads(1)
    for world in map(int, worlds):
        with tempfile.TemporaryDirectory() as folder:
            children = [_fork(rank, world, checks[world], Path(folder)) for rank in range(world)]
            for child in children:
                os.waitpid(child, 0)
            found = [
                json.loads(path.read_text()) if (path := Path(folder, f"{rank}.json")).exists() else {}
                for rank in range(world)
            ]
        by_check = {name: [one.get(name, {"error": "ended"}) for one in found] for name in checks[world]}
        Path(f"{output}-{world}.json").write_text(json.dumps(by_check))
    return 0


def _fork(rank: int, world: int, checks: Mapping[str, Callable[..., Any]], folder: Path) -> int:
    child = os.fork()
    if child:
        return child
    found: dict[str, Any] = {}
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
    try:
        store = dist.FileStore(str(folder / "store"), world)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=TIMEOUT))
        for name, check in checks.items():
            try:
                start = time.process_time()
                found[name] = {"found": check(rank, world)}
                found[name]["seconds"] = round(time.process_time() - start, 3)
            except Exception as error:
                found[name] = {"error": f"{type(error).__name__}: {error}", "trace": traceback.format_exc()[-3000:]}
            (folder / f"{rank}.json").write_text(json.dumps(found))
    finally:
        os._exit(0)
