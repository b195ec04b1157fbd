"""Peak memory of a piece of work, on the accelerator or of the process."""

from __future__ import annotations

import sys
from typing import Any

import torch

try:
    import resource
except ImportError:  # not on Windows
    resource = None  # type: ignore[assignment]


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
        """``peak_memory_bytes`` (None where the system does not tell), ``peak_memory_of`` and ``device``."""
        cuda = self.device.type == "cuda"
        return {
            "peak_memory_bytes": self.bytes,
            "peak_memory_of": "CUDA allocator" if cuda else "process (resident)",
            "device": torch.cuda.get_device_name(self.device) if cuda else "cpu",
        }

    def _read(self) -> int | None:
        if self.device.type == "cuda":
            return int(torch.cuda.max_memory_allocated(self.device))
        if resource is None:
            return None
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return int(peak if sys.platform == "darwin" else peak * 1024)
