"""The product of cuSPARSELt through PyTorch: sparse tensor cores, for many rows.

Its compressed weight of 16 bits is the two numbers of every 2:4 group, row after row, followed by its own metadata (one
eighth of that). Where these numbers are those of ``naive.pack`` in the same order, both share one piece of memory: the
kernels read the beginning, and have their own bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .naive import HALF

# Microseconds in which the host creates the descriptors of a call (H100 machine): without a graph, the library only
# pays for products that take longer.
HOST_TIME = 800.0
# Multiply-adds a microsecond of the dense product at its best.
DENSE_RATE = 3.6e8
ROW_MULTIPLE, COLUMN_MULTIPLE = 32, 8 * HALF


def is_available(device: torch.device) -> bool:
    """Return True if cuSPARSELt is available for ``device``."""
    return device.type == "cuda" and bool(torch.backends.cusparselt.is_available())


def share(dense: Tensor, values: Tensor) -> Tensor | None:
    """Return memory [out, any] that begins with ``values`` [out, groups24, 2] and is cuSPARSELt's form of ``dense``.

    Returns None if the library is missing, does not support the shape [out, in], or orders the numbers differently.
    """
    rows, columns = dense.shape
    if rows % ROW_MULTIPLE or columns % COLUMN_MULTIPLE or not is_available(dense.device):
        return None
    try:
        packed = torch._cslt_compress(dense.contiguous()).view(rows, -1)
    except RuntimeError:  # a card or dtype that the library does not support
        return None
    same = torch.equal(packed.flatten()[: values.numel()].view(torch.int16), values.flatten().view(torch.int16))
    return packed if same else None


def is_shared(values: Tensor, bits: Tensor) -> bool:
    """Return True if ``values`` is memory made by ``share``: it then has metadata after its numbers."""
    return values.is_floating_point() and values.numel() > 4 * bits.numel()


def pays(rows: int, out: int, columns: int) -> bool:
    """Return True if the host keeps up: always in a graph, else where the product takes long."""
    return torch.cuda.is_current_stream_capturing() or rows * out * columns > HOST_TIME * DENSE_RATE


def product(x: Tensor, packed: Tensor, bias: Tensor | None, algorithm: int) -> Tensor:
    """Return ``x W^T + bias`` for contiguous ``x`` [rows, in] and memory made by ``share``."""
    rows = x.shape[0]
    padded = torch.nn.functional.pad(x, (0, 0, 0, -rows % 8)) if rows % 8 else x
    try:
        y = torch._cslt_sparse_mm(packed, padded.t(), bias=bias, transpose_result=True, alg_id=algorithm)
    except RuntimeError:
        # Another version of the library has fewer algorithms, and some do not take every shape.
        if not algorithm:
            raise
        y = torch._cslt_sparse_mm(packed, padded.t(), bias=bias, transpose_result=True, alg_id=0)
    return y[:rows]
