"""Dense linear layers of a captured step of one row, on a kernel for such products.

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

from .gated_layers import activation_of, on_one_row

KERNEL = "hf_optim_kernels.dense_row.op"
PRODUCTS, GATES, JOINED = PARTS = ("products", "gates", "joined")
"""What a launch computes: the product of a layer; a gate, its values and their activation; layers that read the same
row, in compiled steps alone."""
# Which parts captured steps use; the others need the first.
USED: frozenset[str] = frozenset({PRODUCTS, GATES, JOINED})
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
    changes = _changes(model) if rows == 1 and _available(model) else []
    before = [type(module) for module, _ in changes]
    try:
        for module, kind in changes:
            module.__class__ = kind
        yield
    finally:
        for (module, _), kind in zip(changes, before, strict=True):
            module.__class__ = kind


def kernel() -> Any:
    """Return the module of the operators, imported at the first call; None without Triton or the kernels' package."""
    if not _KERNEL and all(util.find_spec(name) is not None for name in ("triton", KERNEL.partition(".")[0])):
        _KERNEL.append(importlib.import_module(KERNEL))
    return _KERNEL[0] if _KERNEL else None


def runs_on(device: torch.device) -> bool:
    """Return True for a GPU that the kernel was written for."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= CAPABILITY


def _available(model: Any) -> bool:
    return PRODUCTS in USED and runs_on(model.device) and kernel() is not None


def _changes(model: nn.Module) -> list[tuple[nn.Module, type[nn.Module]]]:
    """Return modules with the classes that they have in a step."""
    found: list[tuple[nn.Module, type[nn.Module]]] = []
    for module in model.modules():
        if _takes(module):
            found.append((module, OneRowLinear))
        elif GATES in USED and (act := activation_of(module, _takes)) is not None:
            kind: Any = type(module)
            found.append((module, on_one_row(kind, act, _KERNEL[0])))
    return found


def _takes(module: nn.Module) -> bool:
    # A subclass, or a layer with a forward of its own, computes something else; so does a weight that is not a tensor
    # of plain numbers (of torchao, say, or a DTensor).
    if type(module) is not nn.Linear or "forward" in vars(module):
        return False
    if type(module.weight) not in (Tensor, nn.Parameter) or module.weight.is_meta:
        return False
    return _KERNEL[0].unsupported(module.weight, module.bias) is None
