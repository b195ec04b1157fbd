"""Which weights of a module are not finite."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


@torch.no_grad()
def nonfinite_tensors(module: nn.Module) -> list[str]:
    """Return the names of the parameters and buffers of ``module`` that hold NaN or infinity, in their order.

    Infinities are accepted in buffers that no checkpoint stores, since masks hold them. Integers and tensors without
    data (on the meta device) are skipped. Every tensor is read once.
    """
    transient = {
        f"{prefix}.{key}" if prefix else key
        for prefix, part in module.named_modules()
        for key in part._non_persistent_buffers_set
    }
    names: list[str] = []
    flags: list[torch.Tensor] = []
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        flag = _is_finite(tensor, name in transient)
        if flag is not None:
            names.append(name)
            flags.append(flag)
    # One synchronization for all tensors of a device.
    finite: dict[int, bool] = {}
    for device in {flag.device for flag in flags}:
        numbers = [number for number, flag in enumerate(flags) if flag.device == device]
        finite |= dict(zip(numbers, torch.stack([flags[number] for number in numbers]).tolist(), strict=True))
    return [name for number, name in enumerate(names) if not finite[number]]


def _is_finite(tensor: Any, allow_infinity: bool) -> torch.Tensor | None:
    """Return a flag on the device of the tensor; None if it has no floating-point data."""
    tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    if not (tensor.is_floating_point() or tensor.is_complex()) or tensor.is_meta or not tensor.numel():
        return None
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    if tensor.element_size() == 1:  # float8 has no comparisons
        tensor = tensor.to(torch.float16 if tensor.dtype == torch.float8_e4m3fn else torch.float32)
    low, high = torch.aminmax(tensor.detach())
    ends = torch.stack((low, high))
    return ~ends.isnan().any() if allow_infinity else ends.isfinite().all()


def nonfinite(tensor: torch.Tensor) -> bool:
    """Return True if a tensor holds NaN or infinity; False for integers and tensors without data."""
    flag = _is_finite(tensor, allow_infinity=False)
    return flag is not None and not bool(flag)
