"""The environment of a benchmark: timing tools, device, versions, and the time limit."""

from __future__ import annotations

import datetime
import importlib
import importlib.metadata
import shutil
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ...errors import OptimError
from ...trust.bounds import first_line
from . import peers
from .results import Results

KERNELS = "hf_optim_kernels"
PACKAGES = ("torch", "triton", "transformers", "compressed-tensors", "hf-optim")


@dataclass
class Deadline:
    """The time after which no new measurement starts; never if ``seconds`` is None."""

    seconds: float | None
    start: float

    @classmethod
    def after(cls, seconds: float | None) -> Deadline:
        """Return the deadline that many seconds from now."""
        return cls(seconds, time.monotonic())

    def has_passed(self) -> bool:
        """Return True if the time is over."""
        return self.seconds is not None and time.monotonic() - self.start > self.seconds


def timing_tools() -> Any:
    """Return the module of the kernel package that times operators. Raises ``OptimError`` if it is not installed."""
    try:
        return importlib.import_module(f"{KERNELS}.common.benchmark")
    except ImportError as error:
        raise OptimError(f"cannot import the package {KERNELS}: {error}") from error


def start_results(command: str) -> Results:
    """Return results without rows: device and versions, and the ceilings of the device, measured now."""
    tools = timing_tools()
    ceilings = {"copy": tools.copy_bandwidth()}
    for math in ("bfloat16", "int8"):
        ceilings[math] = tools.matmul_rate(math)
    now = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d")
    versions = package_versions(peers.installed_packages())
    return Results(device_name(), driver_version(), versions, ceilings, now, command)


def device_name() -> str:
    """Return the name of the CUDA device, or of the processor with its number of threads."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = "CPU"
    return f"{name}, {torch.get_num_threads()} threads"


def driver_version() -> str:
    """Return the version of the CUDA driver, or an empty string."""
    if not torch.cuda.is_available() or shutil.which("nvidia-smi") is None:
        return ""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    output = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    return output.split()[0] if output.split() else ""


def package_versions(more: Sequence[str] = ()) -> dict[str, str]:
    """Return the versions of the installed packages among ``PACKAGES`` and ``more``."""
    found = {}
    for name in (*PACKAGES, *more):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def short_error(error: Exception) -> str:
    """Return an error as one short line."""
    return first_line(error, 200, typed=True)
