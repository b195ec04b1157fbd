"""Times every operator on every shape, beside the dense product and the peers that are installed."""

from __future__ import annotations

import datetime
import gc
import importlib
import importlib.metadata
import logging
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from ...errors import OptimError
from . import peers as peering
from .results import Results, Row

log = logging.getLogger(__name__)

KERNELS = "hf_optim_kernels"
SHAPES = ((14336, 4096), (4096, 4096), (4096, 14336))
ROWS = (1, 16, 64, 256, 1024, 4096, 8192)
QUICK_SHAPES = ((4096, 4096),)
QUICK_ROWS = (1, 16, 256)
CPU_ROWS = (1, 16, 64)
VERSIONS = ("torch", "triton", "transformers", "compressed-tensors", "hf-optim")


@dataclass
class Deadline:
    """When to begin nothing new; ``seconds`` None: never."""

    seconds: float | None
    begun: float

    @classmethod
    def of(cls, seconds: float | None) -> Deadline:
        return cls(seconds, time.monotonic())

    def passed(self) -> bool:
        return self.seconds is not None and time.monotonic() - self.begun > self.seconds


def benching() -> Any:
    """The kernel package's module of timing tools. Raises ``OptimError`` where the package is not installed."""
    try:
        return importlib.import_module(f"{KERNELS}.common.benchmark")
    except ImportError as error:
        raise OptimError(f"the package {KERNELS} cannot be imported: {error}") from error


def start(command: str) -> Results:
    """Results without rows: the device, the versions and the ceilings measured now."""
    tools = benching()
    ceilings = {"copy": tools.copy_bandwidth()}
    for math in ("bfloat16", "int8"):
        ceilings[math] = tools.matmul_rate(math)
    now = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d")
    return Results(device_name(), driver(), versions(peering.packages()), ceilings, now, command)


def run_ops(
    results: Results,
    ops: Sequence[str],
    shapes: Sequence[tuple[int, int]],
    rows: Sequence[int],
    dtype: torch.dtype = torch.bfloat16,
    with_peers: bool = False,
    deadline: Deadline | None = None,
) -> None:
    """Append the rows of operators to ``results``; what the deadline leaves no time for goes to ``left_out``."""
    deadline = deadline or Deadline.of(None)
    for op in ops:
        for N, K in shapes:
            for M in rows:
                if deadline.passed():
                    results.left_out.append(f"{op} {N}x{K} with {M} rows")
                    continue
                for row in _place(op, N, K, M, dtype, with_peers, results.ceilings):
                    results.rows.append(row)
                    log.info("%s", _line(row))


def tune_ops(
    results: Results,
    ops: Sequence[str],
    shapes: Sequence[tuple[int, int]],
    rows: Sequence[int],
    dtype: torch.dtype,
    deadline: Deadline,
) -> None:
    """Let the operators that can find their fastest tiles on this device and keep them in the user's cache."""
    for op in ops:
        tune: Callable[..., str] | None = getattr(benching().bench_of(op), "tune", None)
        if tune is None:
            continue
        for N, K in shapes:
            for M in rows:
                if deadline.passed():
                    results.left_out.append(f"tuning of {op} {N}x{K} with {M} rows")
                else:
                    log.info("%s %dx%d M=%d: %s", op, N, K, M, tune(N, K, M, dtype))


def _place(
    op: str, N: int, K: int, M: int, dtype: torch.dtype, with_peers: bool, ceilings: dict[str, float]
) -> Iterator[Row]:
    """The rows of one operator on one layer with one number of rows."""
    tools = benching()
    about: dict[str, Any] = {"op": op, "N": N, "K": K, "M": M, "dtype": str(dtype).removeprefix("torch.")}
    torch.manual_seed(0)
    math = "bfloat16"
    try:
        bench = tools.bench_of(op)
        math = getattr(bench, "MATH", math)
        found = bench.contenders(N, K, M, dtype)
    except Exception as error:
        yield Row(**about, contender=op, role="ours", failure=explain(error))
        found = []
    has_dense = any(_is_dense(c) for c in found)
    while found:
        one = found.pop(0)
        role = "dense" if _is_dense(one) else "peer" if one.peer else "ours"
        build: Callable[[], Any] = partial(_same, one)
        yield _measured(about, one.name, role, build, math, ceilings)
        del one, build
    wanted = [p for p in peering.peers_for(op) if (not has_dense if p.dense else with_peers)]
    chosen = [p for p in wanted if not p.missing()]
    if not chosen:
        return
    task = peering.Problem.random(op, N, K, M, dtype, tools.device())
    for peer in chosen:
        build = partial(peer.contender, task, tools)
        yield _measured(about, peer.name, peer.role, build, math, ceilings)


def _measured(
    about: dict[str, Any], name: str, role: Any, build: Callable[[], Any], math: str, ceilings: dict[str, float]
) -> Row:
    """A row of measured times, or of the reason why there are none."""
    try:
        one = build()
        floor = max(one.bytes / ceilings["copy"], one.flops / ceilings[one.math or math])
        times = benching().measure(one)
        return Row(**about, contender=name, role=role, bytes=one.bytes, flops=one.flops, floor_us=floor, **times)
    except Exception as error:
        log.debug("%s failed", name, exc_info=True)
        return Row(**about, contender=name, role=role, failure=explain(error))
    finally:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _same(one: Any) -> Any:
    return one


def _is_dense(one: Any) -> bool:
    return bool(one.dense) or one.name == "dense"


def explain(error: Exception) -> str:
    """An error in one short line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


def _line(row: Row) -> str:
    head = f"{row.op} {row.N}x{row.K} M={row.M} {row.contender}"
    if row.failure:
        return f"{head}: {row.failure}"
    shown = [f"{n} {v:.1f}" for n, v in (("graph", row.graph_us), ("eager", row.eager_us), ("host", row.host_us)) if v]
    return f"{head}: {', '.join(shown)} us"


def device_name() -> str:
    """The CUDA device, or what the processor calls itself."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = "CPU"
    return f"{name}, {torch.get_num_threads()} threads"


def driver() -> str:
    """Version of the CUDA driver; empty without one."""
    if not torch.cuda.is_available() or shutil.which("nvidia-smi") is None:
        return ""
    ask = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    told = subprocess.run(ask, capture_output=True, text=True, check=False).stdout
    return told.split()[0] if told.split() else ""


def versions(more: Sequence[str] = ()) -> dict[str, str]:
    """Versions of the packages that are installed."""
    found = {}
    for name in (*VERSIONS, *more):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
