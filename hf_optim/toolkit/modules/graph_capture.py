"""CUDA graphs: work over fixed buffers is captured, and a capture that fails leaves the device usable."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

# Eager runs before a capture: libraries allocate their workspaces and Triton compiles its kernels in these.
WARM_UPS = 2

# The allocator of pinned memory keeps a pointer to a graph whose capture could not be ended.
_UNENDED: list[Any] = []


class CaptureError(Exception):
    """A step could not be compiled or captured; the message says why."""


class CaptureMemoryError(CaptureError):
    """There is not enough memory to capture a step, or to check it."""


def has_graphs(device: torch.device) -> bool:
    """Return True if work on a device can be captured."""
    return device.type == "cuda"


def capture(
    run: Callable[[], None], restore: Callable[[], None], device: torch.device, pool: Any = None
) -> tuple[Callable[[], None], Any]:
    """Capture a function over fixed buffers; return its replay, and the pool of the graph's memory.

    Args:
        run: works on ``device`` alone and returns nothing.
        restore: puts the buffers that ``run`` changes back; called after each run before the capture.
        device: a CUDA device. Its random generator has its state from before the call afterwards.
        pool: of an earlier graph, which never runs at the same time.

    Raises ``CaptureError``. Whatever is raised, the device can be used afterwards, but ``pool`` for no other capture.
    """
    random, stream = random_state(device), _stream(device)
    pool = new_pool(device) if pool is None else pool
    try:
        captured = _record(run, restore, device, pool)
        set_random_state(device, random)
        return captured
    except torch.OutOfMemoryError:
        _end_capture(device, random, pool, stream)
        reason = None
    except Exception as error:
        _end_capture(device, random, pool, stream)
        reason = str(error) if isinstance(error, CaptureError) else _describe(error)
    except BaseException:  # interrupted
        _end_capture(device, random, pool, stream)
        raise
    # Outside of the handlers: an exception keeps the frames, and with them the memory, of what failed.
    if reason is None:
        raise CaptureMemoryError(f"out of memory while the step was captured on {device}")
    raise CaptureError(reason)


def _record(
    run: Callable[[], None], restore: Callable[[], None], device: torch.device, pool: Any
) -> tuple[Callable[[], None], Any]:
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(WARM_UPS):
            run()
            restore()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    # Other threads may use the device meanwhile: only this one must not do what a capture forbids.
    reason, is_full = "", False
    try:
        with uncollected(), torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            try:
                run()
            except Exception as error:
                reason, is_full = _describe(error), isinstance(error, torch.OutOfMemoryError)
                raise
    except BaseException:
        _UNENDED.append(graph)
        # Ending the capture has failed too, and its error hides the reason.
        if is_full:
            raise torch.OutOfMemoryError(reason) from None
        if reason:
            raise CaptureError(reason) from None
        raise
    return graph.replay, graph.pool()


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """Hold garbage collection back: a graph or a tensor that it frees in a capture would invalidate the capture."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def new_pool(device: torch.device) -> Any:
    """Return a new pool for the memory of graphs; None on a device without graphs."""
    return torch.cuda.graph_pool_handle() if device.type == "cuda" else None


def _end_capture(device: torch.device, random: Tensor, pool: Any, stream: Any) -> None:
    """Leave the device as before a capture into ``pool`` that failed.

    Its current stream is ``stream`` again, which ``torch.cuda.graph`` forgets when a capture cannot be ended, and its
    random generator has the state ``random``. The generator stays as captures use it, and then cannot even be read,
    until a capture succeeds: an empty one does.
    """
    if stream is not None:
        torch.cuda.set_stream(stream)
    _release(device, pool)
    with contextlib.suppress(RuntimeError), torch.cuda.device(device):
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with (
            uncollected(),
            torch.cuda.graph(graph, stream=torch.cuda.Stream(device), capture_error_mode="thread_local"),
        ):
            torch.zeros(1, device=device)
        torch.cuda.set_rng_state(random, device)


def _release(device: torch.device, pool: Any) -> None:
    """End what a failed capture left begun: allocations still go to its pool.

    Pinned memory has an allocator with such a state of its own, which nothing ends: no later capture can use the pool.
    """
    index = torch.cuda.current_device() if device.index is None else device.index
    with contextlib.suppress(RuntimeError, AttributeError):  # it had not begun, or had ended
        torch._C._cuda_endAllocateToPool(index, pool)
        torch._C._cuda_releasePool(index, pool)


def _stream(device: torch.device) -> Any:
    return torch.cuda.current_stream(device) if device.type == "cuda" else None


def random_state(device: torch.device) -> Tensor:
    """Return the state of a device's random generator."""
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def set_random_state(device: torch.device, state: Tensor) -> None:
    """Put a device's random generator in a state."""
    if device.type == "cuda":
        torch.cuda.set_rng_state(state, device)
    else:
        torch.set_rng_state(state)
