"""Time each operator on each shape, against the dense product and the installed peers."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch

from . import peers
from .environment import Deadline, short_error, timing_tools
from .results import OpResult, Results

log = logging.getLogger(__name__)

# Layers (out, in), and numbers of input rows.
SHAPES = ((14336, 4096), (4096, 4096), (4096, 14336))
ROWS = (1, 16, 64, 256, 1024, 4096, 8192)
QUICK_SHAPES = ((4096, 4096),)
QUICK_ROWS = (1, 16, 256)
CPU_ROWS = (1, 16, 64)


def run_ops(
    results: Results,
    ops: Sequence[str],
    shapes: Sequence[tuple[int, int]],
    rows: Sequence[int],
    dtype: torch.dtype = torch.bfloat16,
    with_peers: bool = False,
    deadline: Deadline | None = None,
    keep: Callable[[], object] = lambda: None,
) -> None:
    """Append a row per operator, shape, number of rows and contender to ``results``, and call ``keep`` after each.

    Measurements that the deadline leaves no time for are named in ``results.left_out``.
    """
    deadline = deadline or Deadline.after(None)
    for op in ops:
        for N, K in shapes:
            for M in rows:
                if deadline.has_passed():
                    results.left_out.append(f"{op} {N}x{K} with {M} rows")
                    continue
                for row in _time_contenders(op, N, K, M, dtype, with_peers, results.ceilings):
                    results.rows.append(row)
                    log.info("%s", _log_line(row))
                    keep()


def tune_ops(
    results: Results,
    ops: Sequence[str],
    shapes: Sequence[tuple[int, int]],
    rows: Sequence[int],
    dtype: torch.dtype,
    deadline: Deadline,
) -> None:
    """Tune the tile sizes of the operators that support it, and keep the fastest in the user's cache."""
    for op in ops:
        tunables: Callable[..., list[Any]] | None = getattr(timing_tools().bench_of(op), "tunables", None)
        if tunables is None:
            continue
        for N, K in shapes:
            found = [] if deadline.has_passed() else tunables(N, K, dtype)
            for M in rows:
                if deadline.has_passed():
                    results.left_out.append(f"tuning of {op} {N}x{K} with {M} rows")
                    continue
                for tunable in found:
                    if tunable.any_rows and max(rows) != M:
                        continue
                    log.info("%s %dx%d M=%d: %s", op, N, K, M, tunable.tune(M))


def _time_contenders(
    op: str, N: int, K: int, M: int, dtype: torch.dtype, with_peers: bool, ceilings: dict[str, float]
) -> Iterator[OpResult]:
    """Yield the rows of one operator for one layer and one number of input rows."""
    tools = timing_tools()
    key: dict[str, Any] = {"op": op, "N": N, "K": K, "M": M, "dtype": str(dtype).removeprefix("torch.")}
    torch.manual_seed(0)
    math = "bfloat16"
    try:
        bench = tools.bench_of(op)
        math = getattr(bench, "MATH", math)
        contenders = bench.contenders(N, K, M, dtype)
    except Exception as error:
        yield OpResult(**key, contender=op, role="ours", failure=short_error(error))
        contenders = []
    has_dense = any(_is_dense(c) for c in contenders)
    while contenders:
        # Popped, so that its tensors are freed before the next one is timed.
        contender = contenders.pop(0)
        role = "dense" if _is_dense(contender) else "peer" if contender.peer else "ours"
        build: Callable[[], Any] = partial(_identity, contender)
        yield _time_one(key, contender.name, role, build, math, ceilings)
        del contender, build
    wanted = [p for p in peers.peers_for(op) if (not has_dense if p.dense else with_peers)]
    available = [p for p in wanted if not p.missing()]
    if not available:
        return
    problem = peers.MatmulProblem.random(op, N, K, M, dtype, tools.device())
    for peer in available:
        build = partial(peer.contender, problem, tools)
        yield _time_one(key, peer.name, peer.role, build, math, ceilings)


def _time_one(
    key: dict[str, Any], name: str, role: Any, build: Callable[[], Any], math: str, ceilings: dict[str, float]
) -> OpResult:
    """Return a row with the times of a contender, or with the reason why there are none."""
    try:
        contender = build()
        floor = max(contender.bytes / ceilings["copy"], contender.flops / ceilings[contender.math or math])
        work = {"bytes": contender.bytes, "flops": contender.flops, "floor_us": floor}
        return OpResult(**key, contender=name, role=role, **work, **timing_tools().measure(contender))
    except Exception as error:
        log.debug("%s failed", name, exc_info=True)
        return OpResult(**key, contender=name, role=role, failure=short_error(error))
    finally:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _identity(contender: Any) -> Any:
    return contender


def _is_dense(contender: Any) -> bool:
    return bool(contender.dense) or contender.name == "dense"


def _log_line(row: OpResult) -> str:
    head = f"{row.op} {row.N}x{row.K} M={row.M} {row.contender}"
    if row.failure:
        return f"{head}: {row.failure}"
    if not torch.cuda.is_available():
        return f"{head}: {row.graph_us or 0:,.1f} us"
    times = (("graph", row.graph_us), ("eager", row.eager_us), ("host", row.host_us))
    return f"{head}: {', '.join(f'{name} {time:,.1f}' for name, time in times if time)} us"
