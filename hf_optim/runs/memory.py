"""Memory of this process: how much it may use, uses now, and used at most."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import sys
from pathlib import Path
from typing import Any

import torch

try:
    import resource
except ImportError:  # not on Windows
    resource = None  # type: ignore[assignment]


def host_memory() -> int | None:
    """Return the bytes of memory this process may use (of the machine, or of its control group), or None if unknown."""
    limits = []
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            limits.append(int(Path(path).read_text()))
        except (OSError, ValueError):  # not on this system, or "max"
            continue
    with contextlib.suppress(OSError, ValueError, AttributeError):
        limits.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    return min(limits) if limits else None


def free_memory(device: torch.device) -> int | None:
    """Return the bytes that a device has left (of a CPU: the machine, or the control group); None if unknown."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    free = []
    with contextlib.suppress(OSError, ValueError, IndexError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        free += [1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
    with contextlib.suppress(OSError, ValueError, IndexError):
        group = Path("/sys/fs/cgroup")
        used = int((group / "memory.current").read_text())
        # Pages of files are given up when memory is needed.
        cached = [line for line in (group / "memory.stat").read_text().splitlines() if line.startswith("file ")]
        used -= sum(int(line.split()[1]) for line in cached)
        free.append(int((group / "memory.max").read_text()) - used)
    return max(0, min(free)) if free else None


def resident() -> dict[str, int]:
    """Return the resident bytes of this process: ``anonymous``, and ``file`` (pages of mapped files). Linux only."""
    found = {}
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            name, _, rest = line.partition(":")
            if name in ("RssAnon", "RssFile"):
                found[{"RssAnon": "anonymous", "RssFile": "file"}[name]] = int(rest.split()[0]) * 1024
    return found


# glibc's mallopt parameter, and the value that it starts with.
_M_MMAP_THRESHOLD, _MAPPED_BYTES = -3, 128 * 1024


def map_large_blocks() -> None:
    """Let freed tensors return to the operating system, from now on. Without effect where the allocator is not glibc's.

    glibc maps large blocks one by one, but raises the size from which it does so, to 32 MiB, as such blocks are freed;
    smaller ones then stay resident, scattered over its arenas.
    """
    if (mallopt := _of_glibc("mallopt")) is not None:
        mallopt(_M_MMAP_THRESHOLD, _MAPPED_BYTES)


def release_freed_pages() -> None:
    """Return the pages of freed memory to the operating system, also those inside the arenas of glibc."""
    if (trim := _of_glibc("malloc_trim")) is not None:
        trim(0)


@functools.cache
def _of_glibc(name: str) -> Any:
    if not sys.platform.startswith("linux"):
        return None
    library = ctypes.CDLL(None)
    return getattr(library, name, None) if hasattr(library, "gnu_get_libc_version") else None


class PeakMemory:
    """Measure peak memory between ``start`` and ``stop``, or inside a ``with`` block.

    On a CUDA device this is the peak of its allocator, in bytes. On the CPU it is the peak resident size of the whole
    process so far: the operating system keeps one high-water mark, so earlier work may be included.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        on_cuda = torch.cuda.is_available() and (device is None or device.type == "cuda")
        self.device = device if device is not None and on_cuda else torch.device("cuda" if on_cuda else "cpu")
        self.bytes: int | None = None

    def start(self) -> PeakMemory:
        """Reset the peak."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        return self

    def stop(self) -> None:
        """Read the peak."""
        if self.device.type == "cuda":
            self.bytes = int(torch.cuda.max_memory_allocated(self.device))
        else:
            self.bytes = high_water()

    def __enter__(self) -> PeakMemory:
        return self.start()

    def __exit__(self, *exception: Any) -> None:
        self.stop()

    def metrics(self) -> dict[str, Any]:
        """Return ``peak_memory_bytes``, ``peak_memory_of``, ``peak_host_bytes`` and ``device``; None where unknown."""
        cuda = self.device.type == "cuda"
        return {
            "peak_memory_bytes": self.bytes,
            "peak_memory_of": "CUDA allocator" if cuda else "process (resident)",
            "peak_host_bytes": high_water(),
            "device": torch.cuda.get_device_name(self.device) if cuda else "cpu",
        }


def high_water() -> int | None:
    """Return the peak resident size of the process so far, in bytes."""
    # On Linux ru_maxrss of a child process begins with the size of the process that started it, even after exec.
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])
    if resource is None:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else peak * 1024)
