"""Timing of operators: contenders, cold replays of CUDA graphs, host time, and the ceilings of the device.

The folder of an operator has a module ``bench`` with ``contenders(N, K, M, dtype) -> list[Contender]`` (a layer of
``N`` outputs and ``K`` inputs, ``M`` rows), which this module finds (``operations``) and times (``measure``). Times are
in microseconds. On a CPU the same functions return wall-clock medians.
"""

from __future__ import annotations

import importlib
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

Module = TypeVar("Module", bound=nn.Module)

REPLAYS = 31
MOST_COPIES = 64
# Host time is measured in bursts that fit the launch queue, with a wait after each.
BURST = 8


@dataclass(frozen=True, eq=False)
class Contender:
    """One way to compute a row of the table.

    Attributes:
        name: printed in tables.
        calls: the same work over several copies of the weight, which together are larger than the L2 cache.
        bytes: a lower bound of the bytes read, by the format of the weight.
        flops: multiplications and additions of the product.
        reference: the float64 output expected of ``calls[0]``, or None.
        math: type whose measured matrix rate bounds ``flops``: ``bfloat16`` or ``int8``; empty: that of the operator.
        graph: True if a CUDA graph can hold the call (it does not wait for the device).
        dense: the unquantized product that others are compared with.
        peer: True for an operator of another project.
    """

    name: str
    calls: Sequence[Callable[[], Tensor]]
    bytes: int
    flops: int
    reference: Tensor | None = None
    math: str = ""
    graph: bool = True
    dense: bool = False
    peer: bool = False


class Timing(NamedTuple):
    """Microseconds of one call: the median, the distance of the 10th to the 90th percentile over it, and the least."""

    us: float
    spread: float
    least: float


def device() -> torch.device:
    """Return the device to time operators on: the CUDA device if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def operations() -> list[str]:
    """Return the operators of this package that have a ``bench`` module."""
    return sorted(path.parent.name for path in Path(__file__).parents[1].glob("*/bench.py"))


def bench_of(op: str) -> Any:
    """Return the ``bench`` module of an operator."""
    return importlib.import_module(f"hf_optim_kernels.{op}.bench")


def measure(contender: Contender) -> dict[str, float | None]:
    """Return ``graph_us``, ``spread``, ``eager_us``, ``host_us`` and ``error``; None for what cannot be measured."""
    output = contender.calls[0]()
    error = None if contender.reference is None else relative_error(output, contender.reference)
    del output
    cuda = device().type == "cuda"
    replayed = graph_time(contender.calls) if contender.graph or not cuda else None
    return {
        "graph_us": None if replayed is None else replayed.us,
        "spread": None if replayed is None else replayed.spread,
        "eager_us": eager_time(contender.calls).us,
        "host_us": host_time(contender.calls[0]).us,
        "error": error,
    }


def graph_time(calls: Sequence[Callable[[], object]], replays: int = REPLAYS) -> Timing:
    """Return the time of one call, from replays of a graph of all ``calls`` in sequence (on a CPU: without a graph)."""
    for call in calls:
        call()
    if device().type == "cpu":
        return _wall_time(calls, replays)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    for _ in range(3):
        graph.replay()
    return _summary([_span(graph.replay) / len(calls) for _ in range(replays)])


def eager_time(calls: Sequence[Callable[[], object]], passes: int = 12) -> Timing:
    """Return the time of one call when the host launches them in sequence."""
    for call in calls:
        call()
    if device().type == "cpu":
        return _wall_time(calls, passes)
    turns = max(1, 16 // len(calls))

    def turn() -> None:
        for _ in range(turns):
            for call in calls:
                call()

    turn()
    return _summary([_span(turn) / (turns * len(calls)) for _ in range(passes)])


def host_time(call: Callable[[], object], bursts: int = 24) -> Timing:
    """Return the host time of one call: the time until it returns, while the device works asynchronously."""
    times = []
    for _ in range(bursts):
        _wait()
        start = time.perf_counter()
        for _ in range(BURST):
            call()
        times.append((time.perf_counter() - start) * 1e6 / BURST)
    _wait()
    return _summary(times[bursts // 4 :])


def copy_bandwidth(size: int | None = None) -> float:
    """Return the bytes per microsecond of a large copy on the device, counting reads and writes.

    It is the faster of the runtime's copy (2.7 TB/s on an H200) and of a kernel that adds one (4.2 there).
    """
    size = size or (1 << 30 if device().type == "cuda" else 1 << 26)
    source = torch.randint(0, 255, (size // 4,), dtype=torch.int32, device=device())
    target = torch.empty_like(source)
    ways = (lambda: target.copy_(source), lambda: torch.add(source, 1, out=target))
    return 2 * size / min(map(_time_of_ceiling, ways))


def matmul_rate(math: str = "bfloat16", size: int | None = None) -> float:
    """Return the operations per microsecond (multiplications and additions) of a square product of random numbers.

    Args:
        math: ``int8`` (``torch._int_mm``), or the name of a floating type.
    """
    size = size or (8192 if device().type == "cuda" else 512)
    if math == "int8":
        a, b = (torch.randint(-127, 128, (size, size), dtype=torch.int8, device=device()) for _ in range(2))
        call = lambda: torch._int_mm(a, b.T)  # noqa: E731
    else:
        a, b = (torch.randn(size, size, dtype=getattr(torch, math), device=device()) for _ in range(2))
        call = lambda: torch.mm(a, b.T)  # noqa: E731
    return 2 * size**3 / _time_of_ceiling(call)


def relative_error(output: Tensor, reference: Tensor) -> float:
    """Return the norm of the difference to ``reference`` over its norm; NaN if an output was not written."""
    wanted = reference.double()
    return float((output.double().view_as(wanted) - wanted).norm() / wanted.norm())


def copies_for(size: int) -> int:
    """Return how many weights of ``size`` bytes together have three times the size of the L2 cache; one on a CPU."""
    if device().type == "cpu":
        return 1
    cache = torch.cuda.get_device_properties(device()).L2_cache_size
    return max(2, min(MOST_COPIES, -(-3 * cache // max(1, size))))


def copies_of(tensors: tuple[Tensor, ...]) -> list[tuple[Tensor, ...]]:
    """Return the tensors and clones of them, together larger than the L2 cache."""
    count = copies_for(bytes_of(tensors))
    return [tensors, *(tuple(t.clone() for t in tensors) for _ in range(count - 1))]


def modules_of(module: Module) -> list[Module]:
    """Return a module and copies of it, whose buffers and parameters are together larger than the L2 cache."""
    import copy

    held = [*module.parameters(), *module.buffers()]
    return [module, *(copy.deepcopy(module) for _ in range(copies_for(bytes_of(held)) - 1))]


def dense_contender(x: Tensor, weight: Tensor, math: str = "") -> Contender:
    """Return the library's product of ``x`` [M, in] with a dense weight [out, in]."""
    calls = [partial(nn.functional.linear, x, *copy) for copy in copies_of((weight,))]
    reference = x.double() @ weight.double().T
    return Contender("dense", calls, bytes_of((weight,)), 2 * len(x) * weight.numel(), reference, math, dense=True)


def calls_of(module: nn.Module, x: Tensor) -> list[Callable[[], Tensor]]:
    """Return calls of a module and of its copies on ``x``, without a gradient."""
    return [partial(_infer, copy, x) for copy in modules_of(module)]


def _infer(module: nn.Module, x: Tensor) -> Tensor:
    with torch.inference_mode():
        return module(x)


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of tensors."""
    return sum(t.numel() * t.element_size() for t in tensors)


def weight_of(found: Any, dtype: torch.dtype, bits: int, group_size: int, **more: Any) -> Any:
    """Return a weight as ``supports`` and ``prepack`` of an operator read it, with given codes.

    Args:
        found: with the attributes of ``hf_optim.compressed.weights.Codes``.
        more: attributes of ``hf_optim.compressed.weights.QuantizedWeight`` that are not those of a plain integer
            weight.
    """
    about = {
        "name": "layer",
        "shape": tuple(found.codes.shape),
        "dtype": dtype,
        "device": found.codes.device,
        "kind": "int",
        "bits": bits,
        "group_size": group_size,
        "symmetric": found.zero is None,
        "ordered": found.order is not None,
        "inputs": None,
        "sparse24": False,
        "bias": None,
        "codes": lambda: found,
    }
    return SimpleNamespace(**{**about, **more})


def codes_of(codes: Tensor, scale: Tensor | None, zero: Tensor | None = None) -> Any:
    """Return codes with the attributes of ``hf_optim.compressed.weights.Codes``."""
    return SimpleNamespace(codes=codes, scale=scale, zero=zero, order=None, input_scale=None, input_zero=None)


def _span(work: Callable[[], object]) -> float:
    """Return the microseconds between two events around ``work``."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    work()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e3


def _wall_time(calls: Sequence[Callable[[], object]], passes: int) -> Timing:
    times = []
    for _ in range(passes):
        start = time.perf_counter()
        for call in calls:
            call()
        times.append((time.perf_counter() - start) * 1e6 / len(calls))
    return _summary(times)


def _summary(times: Sequence[float]) -> Timing:
    median = statistics.median(times)
    tenths = statistics.quantiles(times, n=10) if len(times) > 1 else [median, median]
    return Timing(median, (tenths[-1] - tenths[0]) / median if median else 0.0, min(times))


def _time_of_ceiling(call: Callable[[], object]) -> float:
    """Return the microseconds of a call that shows what the device can do at most.

    On a CPU this is the fastest of all: other processes take time from the rest, and a ceiling below what the
    contenders reach in a quiet moment would be none.
    """
    timing = graph_time([call])
    return timing.least if device().type == "cpu" else timing.us


def _wait() -> None:
    if device().type == "cuda":
        torch.cuda.synchronize()
