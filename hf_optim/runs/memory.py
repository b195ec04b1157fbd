"""Peak memory of a piece of work, on the accelerator or of the process."""

from __future__ import annotations

import contextlib
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
    """Bytes of memory that this process may use: of the machine, or of its control group; None where unknown."""
    limits = []
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            limits.append(int(Path(path).read_text()))
        except (OSError, ValueError):  # not on this system, or "max"
            continue
    with contextlib.suppress(OSError, ValueError, AttributeError):
        limits.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    return min(limits) if limits else None


def resident() -> dict[str, int]:
    """Resident bytes of this process now: ``anonymous`` (its own) and ``file`` (pages of mapped files); Linux only."""
    found = {}
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            name, _, rest = line.partition(":")
            if name in ("RssAnon", "RssFile"):
                found[{"RssAnon": "anonymous", "RssFile": "file"}[name]] = int(rest.split()[0]) * 1024
    return found


class PeakMemory:
    """Context manager: how much memory was in use at most.

    On a CUDA device, the peak of its allocator inside the ``with`` block, in bytes. On the CPU, the peak resident size
    of the whole process so far: the operating system keeps one high-water mark, so earlier work may be in it.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        on_cuda = torch.cuda.is_available() and (device is None or device.type == "cuda")
        self.device = device if device is not None and on_cuda else torch.device("cuda" if on_cuda else "cpu")

    def __enter__(self) -> PeakMemory:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        return self

    def __exit__(self, *exception: Any) -> None:
        self.bytes = self._read()

    def figures(self) -> dict[str, Any]:
        """``peak_memory_bytes``, ``peak_memory_of``, ``peak_host_bytes`` and ``device``; None for what is not told."""
        cuda = self.device.type == "cuda"
        return {
            "peak_memory_bytes": self.bytes,
            "peak_memory_of": "CUDA allocator" if cuda else "process (resident)",
            "peak_host_bytes": _high_water(),
            "device": torch.cuda.get_device_name(self.device) if cuda else "cpu",
        }

    def _read(self) -> int | None:
        if self.device.type == "cuda":
            return int(torch.cuda.max_memory_allocated(self.device))
        return _high_water()


def _high_water() -> int | None:
    """The peak resident size of the process so far."""
    if resource is None:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else peak * 1024)
