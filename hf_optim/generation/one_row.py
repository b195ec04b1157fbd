"""Dense linear layers of a captured step of one row, on a kernel for such products (off until it is timed: ``USED``).

A step of a dense model is a read of its weights, and a library's product of one row reads small ones at little more
than half of the bandwidth. Products of more rows are the library's.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import util
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

KERNEL = "hf_optim_kernels.dense_row.op"
# Whether captured steps use it: not timed on a device yet.
USED = False
# The GPUs that it was written for.
CAPABILITY = (9, 0)
_KERNEL: list[Any] = []  # the module, imported once; torch.compile cannot trace an import


class OneRowLinear(nn.Linear):
    """An ``nn.Linear`` whose product of one row runs on the kernel."""

    def forward(self, input: Tensor) -> Tensor:
        """Return ``input W^T + bias``, ``[..., in]`` to ``[..., out]``."""
        if input.numel() == self.in_features and input.dtype == self.weight.dtype:
            return _KERNEL[0].dense_row(input, self.weight, self.bias)  # type: ignore[no-any-return]
        return F.linear(input, self.weight, self.bias)


@contextmanager
def one_row(model: nn.Module, rows: int) -> Iterator[None]:
    """Let plain linear layers of a model run on the kernel inside the context, if a step has one row and ``USED``.

    Layers of another class, in other dtypes than 16 bits, or small ones are left as they are.
    """
    changed = [module for module in model.modules() if _takes(module)] if rows == 1 and _available(model) else []
    try:
        for module in changed:
            module.__class__ = OneRowLinear
        yield
    finally:
        for module in changed:
            module.__class__ = nn.Linear


def _available(model: Any) -> bool:
    if not USED or not runs_on(model.device) or util.find_spec("triton") is None:
        return False
    if not _KERNEL:
        _KERNEL.append(importlib.import_module(KERNEL))
    return True


def runs_on(device: torch.device) -> bool:
    """Return True for a GPU that the kernel was written for."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= CAPABILITY


def _takes(module: nn.Module) -> bool:
    # A subclass, or a layer with a forward of its own, computes something else; so does a weight that is not a tensor
    # of plain numbers (of torchao, say, or a DTensor).
    if type(module) is not nn.Linear or "forward" in vars(module):
        return False
    if type(module.weight) not in (Tensor, nn.Parameter) or module.weight.is_meta:
        return False
    return _KERNEL[0].unsupported(module.weight, module.bias) is None
