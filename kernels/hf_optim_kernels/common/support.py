"""The devices and dtypes that kernels support, and the reasons given for others."""

from __future__ import annotations

import os
from collections.abc import Iterable
from importlib import util

import torch
from torch import Tensor

ATTENTION_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def can_run_triton(x: Tensor) -> bool:
    """Return True if Triton kernels can run on ``x``: on a CUDA device, or interpreted."""
    return x.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a dtype without ``torch.``."""
    return str(dtype).removeprefix("torch.")


def unsupported_dtype(dtype: torch.dtype, supported: Iterable[torch.dtype]) -> str | None:
    """Return why inputs of ``dtype`` are not supported; None if they are."""
    names = [dtype_name(each) for each in supported]
    if dtype_name(dtype) in names:
        return None
    return f"{dtype_name(dtype)} inputs are not supported, only {', '.join(names)}"


def unsupported_attention(query: Tensor, key: Tensor, value: Tensor, largest_head: int) -> str | None:
    """Return why kernels of attention do not take [B, H, N, D] tensors: their dtypes, head or GPU; None if they do."""
    if query.dtype not in ATTENTION_DTYPES or key.dtype != query.dtype or value.dtype != query.dtype:
        return f"{query.dtype} queries, {key.dtype} keys and {value.dtype} values"
    if max(query.shape[3], value.shape[3]) > largest_head:
        return f"heads of {max(query.shape[3], value.shape[3])}"
    if query.is_cuda and torch.cuda.get_device_capability(query.device) < (8, 0):
        return "a compute capability below 8.0"
    return None


def unsupported_device(
    device: torch.device, capability: tuple[int, int] = (8, 0), subject: str = "the kernel"
) -> str | None:
    """Return why Triton kernels that need a compute capability do not run on ``device``; None if they do.

    Args:
        subject: what needs the capability, for the message.
    """
    if device.type != "cuda":
        return f"no kernel for {device.type} devices"
    if util.find_spec("triton") is None:
        return "Triton is not installed"
    held = torch.cuda.get_device_capability(device)
    if held >= capability:
        return None
    return f"{subject} needs compute capability {capability[0]}.{capability[1]}, this GPU has {held[0]}.{held[1]}"
