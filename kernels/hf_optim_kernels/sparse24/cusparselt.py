"""The product of cuSPARSELt, by way of PyTorch: sparse tensor cores, for many rows.

Its compressed weight of 16 bits is the two numbers of every four, row after row, followed by its own metadata (one
eighth of that). Where these numbers are those of ``naive.pack`` in the same order, one piece of memory serves both:
the kernels read the beginning and have their own bits beside it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .naive import HALF

# A call makes all descriptors anew, which takes the host so long (microseconds, H100 machine): without a graph the
# product has to take longer than that for the library to pay.
HOST_TIME = 800.0
# Multiply-adds a microsecond of the dense product at its best.
DENSE_RATE = 3.6e8
ROW_MULTIPLE, COLUMN_MULTIPLE = 32, 8 * HALF


def available(device: torch.device) -> bool:
    """Whether cuSPARSELt is there for ``device``."""
    return device.type == "cuda" and bool(torch.backends.cusparselt.is_available())


def share(dense: Tensor, values: Tensor) -> Tensor | None:
    """Memory [out, any] that begins with ``values`` [out, fours, 2] and is cuSPARSELt's form of ``dense`` [out, in].

    None where the library is missing, does not serve the shape, or orders the numbers in another way.
    """
    rows, columns = dense.shape
    if rows % ROW_MULTIPLE or columns % COLUMN_MULTIPLE or not available(dense.device):
        return None
    try:
        packed = torch._cslt_compress(dense.contiguous()).view(rows, -1)
    except RuntimeError:  # a card or type the library does not know
        return None
    same = torch.equal(packed.flatten()[: values.numel()].view(torch.int16), values.flatten().view(torch.int16))
    return packed if same else None


def shared(values: Tensor, bits: Tensor) -> bool:
    """Whether ``values`` is memory made by ``share``: it then has metadata after its numbers."""
    return values.is_floating_point() and values.numel() > 4 * bits.numel()


def pays(rows: int, out: int, columns: int) -> bool:
    """Whether the host keeps up: in a graph always, else where the product is long."""
    return torch.cuda.is_current_stream_capturing() or rows * out * columns > HOST_TIME * DENSE_RATE


def product(x: Tensor, packed: Tensor, bias: Tensor | None, algorithm: int) -> Tensor:
    """``x W^T + bias`` for contiguous ``x`` [rows, in] and memory made by ``share``."""
    rows = x.shape[0]
    padded = torch.nn.functional.pad(x, (0, 0, 0, -rows % 8)) if rows % 8 else x
    y = torch._cslt_sparse_mm(packed, padded.t(), bias=bias, transpose_result=True, alg_id=algorithm)
    return y[:rows]
