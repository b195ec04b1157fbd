"""The door to the kernels of sparse feed-forward layers: used where they are installed, in inference on a GPU.

This file is stored beside checkpoints, so it imports only torch.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

SPARSE_FFN_KERNEL = "hf_optim_kernels.sparse_ffn.layer"  # where it is installed
SPARSE_FFN_DEVICES = ("cuda",)

_sparse_ffn_kernels: list[Any] = []
"""The module of the kernels, or None if it is not installed; nothing before it was looked for."""


def find_sparse_ffn_kernel() -> Any:
    """Return the module of the kernels; None if it is not installed."""
    if not _sparse_ffn_kernels:
        try:
            _sparse_ffn_kernels.append(importlib.import_module(SPARSE_FFN_KERNEL))
        except ImportError:
            _sparse_ffn_kernels.append(None)
    return _sparse_ffn_kernels[0]


if torch.cuda.is_available():
    find_sparse_ffn_kernel()  # nothing can be imported while a graph is traced


def by_kernel(ffn: Any, x: Tensor) -> Tensor | None:
    """Return the output ``[T, out]`` of a ``SparseFFN`` for ``x`` ``[T, in]``; None if no kernel computes it."""
    if x.device.type not in SPARSE_FFN_DEVICES or torch.is_grad_enabled():
        return None
    module = find_sparse_ffn_kernel()
    return None if module is None else module.compute(ffn, x)
