"""How bytes get to the device: by copies on a stream of their own from pinned memory, or not at all on a CPU.

Everything that a device does on its own is behind this interface, so that what surrounds it runs, and is tested, where
there is no such device.
"""

from __future__ import annotations

import contextlib
import math
import mmap
import time
from typing import Any, Protocol

import torch
from torch import Tensor

from .files import PRIVATE, aligned_memory

MOST_AHEAD = 4
SAMPLE = 64 << 20


class Link(Protocol):
    """The way from host memory to a device.

    A *ticket* stands for a copy, a *mark* for a position in the work of the device; both may be None, which is over.
    """

    device: torch.device
    host_is_device: bool

    def slot(self, size: int) -> Tensor:
        """Return memory of the device, uint8, zeros."""
        ...

    def host(self, size: int) -> Tensor:
        """Return host memory that copies start from, uint8."""
        ...

    def mark(self) -> Any:
        """Return a mark behind the work that the device was given so far."""
        ...

    def copy(self, target: Tensor, source: Tensor, after: Any) -> Any:
        """Begin to copy host memory to the device once the mark ``after`` is reached; return a ticket."""
        ...

    def wait(self, ticket: Any) -> None:
        """Make the work that the device is given next wait for a copy. The host does not wait."""
        ...

    def finish(self, ticket: Any) -> None:
        """Wait on the host until a copy is over, so that its source may be written to."""
        ...


class CpuLink:
    """The device is the host: weights are read from disk right into the buffers that the model computes with."""

    host_is_device = True

    def __init__(self) -> None:
        self.device = torch.device("cpu")

    def slot(self, size: int) -> Tensor:
        return aligned_memory(size)

    def host(self, size: int) -> Tensor:
        return aligned_memory(size)

    def mark(self) -> Any:
        return None

    def copy(self, target: Tensor, source: Tensor, after: Any) -> Any:
        target.copy_(source)
        return None

    def wait(self, ticket: Any) -> None:
        return None

    def finish(self, ticket: Any) -> None:
        return None


class CudaLink:
    """Copies from pinned memory on a side stream of a CUDA device."""

    host_is_device = False

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)

    def slot(self, size: int) -> Tensor:
        return torch.zeros(size, dtype=torch.uint8, device=self.device)

    def host(self, size: int) -> Tensor:
        return pinned_memory(size)

    def mark(self) -> Any:
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self.device))
        return event

    def copy(self, target: Tensor, source: Tensor, after: Any) -> Any:
        event = torch.cuda.Event()
        with torch.cuda.stream(self.stream):
            if after is not None:
                self.stream.wait_event(after)
            target.copy_(source, non_blocking=True)
            event.record(self.stream)
        return event

    def wait(self, ticket: Any) -> None:
        if ticket is not None:
            torch.cuda.current_stream(self.device).wait_event(ticket)

    def finish(self, ticket: Any) -> None:
        if ticket is not None:
            ticket.synchronize()


class _Pinned(mmap.mmap):
    """Pages that CUDA was told of, until they are freed."""

    address: int | None = None

    def __del__(self) -> None:
        if self.address is not None:
            torch.cuda.cudart().cudaHostUnregister(self.address)


def pinned_memory(size: int) -> Tensor:
    """Return pinned host memory, uint8. torch's own allocator would round the size up to a power of two."""
    pages = _Pinned(-1, max(size, 1), flags=PRIVATE)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):
            pages.madvise(mmap.MADV_HUGEPAGE)
    memory = torch.frombuffer(pages, dtype=torch.uint8)
    if int(torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), len(memory), 0)):
        return torch.empty(size, dtype=torch.uint8, pin_memory=True)
    pages.address = memory.data_ptr()
    return memory[:size]


def link_to(device: torch.device) -> Link | None:
    """Return the link to a device; None for one that none is written for."""
    if device.type == "cpu":
        return CpuLink()
    return CudaLink(device) if device.type == "cuda" else None


def measure_link(link: Link, size: int = SAMPLE) -> tuple[float, float]:
    """Return the bytes a second of copies from host memory to the device, and of reads of the device's memory."""
    source, target = link.host(size), link.slot(size)
    times = []
    for _ in range(3):
        started = time.perf_counter()
        link.finish(link.copy(target, source, link.mark()))
        times.append(time.perf_counter() - started)
    rate = size / min(times)
    return rate, _memory_rate(target)


def _memory_rate(memory: Tensor) -> float:
    other = torch.empty_like(memory)
    times = []
    for _ in range(3):
        if memory.is_cuda:
            torch.cuda.synchronize(memory.device)
        started = time.perf_counter()
        other.copy_(memory)
        if memory.is_cuda:
            torch.cuda.synchronize(memory.device)
        times.append(time.perf_counter() - started)
    return 2 * len(memory) / min(times)


def blocks_ahead(gap: float, block: float, memory_rate: float, link_rate: float, waits: bool) -> int:
    """Return how many blocks have to be fetched ahead so that the link never stands still.

    Args:
        gap: bytes that the device reads, at most, between the ends of two streamed blocks (the head, resident blocks).
        block: bytes of a streamed block.
        memory_rate, link_rate: bytes a second of the device's memory, and of the link or disk.
        waits: the host waits for a block before it asks for another one, as it does for reads from disk.
    """
    needed = math.ceil((gap / memory_rate) / (block / link_rate))
    return min(MOST_AHEAD, max(1, needed) + int(waits))
