"""Linear layers with a codebook on ``hf_optim::codebook_linear``: supported modules, and their packed form.

This module is an entry point of the group ``hf_optim.kernels``. ``supports`` and ``prepack`` read a codebook module:
``codes()`` (uint8 [out, in]), ``bits``, ``shape``, ``centroids``, and its outliers as ``outliers``, ``outlier_counts``
(per row) and ``outlier_columns``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..common.launch_plan import PlannedLinear
from ..common.support import unsupported_device, unsupported_dtype
from . import naive, op

NAME = "codebook"
CODEBOOK = True
DTYPES = (torch.float16, torch.bfloat16)
LEAST_WEIGHTS = 1 << 20
READ = ("codes", "bits", "shape", "centroids", "outliers", "outlier_counts", "outlier_columns", "in_features")


def supports(module: Any) -> str | None:
    """Return None if the kernel can run a module, otherwise the reason; ``""`` if it is not a codebook module."""
    if not getattr(module, "holds_codes", False) or not all(hasattr(module, name) for name in READ):
        return ""
    device, dtype = module.centroids.device, module.centroids.dtype
    if device.type != "cuda":
        return f"no kernel for {device.type} devices: the module decodes its weight at every call"
    size = module.shape[0] * module.shape[1]
    if size < LEAST_WEIGHTS:
        return f"a layer of {size:,} weights is left to PyTorch (packed from {LEAST_WEIGHTS:,})"
    return unsupported_dtype(dtype, DTYPES) or unsupported_device(device)


def prepack(module: Any) -> CodebookWeight:
    """Return the packed form of a supported module."""
    bias = module.bias
    return CodebookWeight(
        module.codes(),
        module.centroids,
        module.bits,
        module.outliers,
        module.outlier_counts,
        module.outlier_columns,
        None if bias is None else bias.detach(),
    )


class CodebookWeight(PlannedLinear):
    """A weight in the layout of the kernels; it computes ``x W^T + bias``.

    Its buffers are the fields of ``naive.PackedTensors``; outliers, their columns and the bias are the tensors it was
    given. None of them is in a state dict.
    """

    words: Tensor

    def __init__(
        self,
        codes: Tensor,
        centroids: Tensor,
        bits: int,
        outliers: Tensor,
        counts: Tensor,
        columns: Tensor,
        bias: Tensor | None,
    ) -> None:
        super().__init__()
        from .launch import semaphores_for
        from .lookup import MOST_BITS, tables

        self.bits, self.width, self.dtype = bits, codes.shape[1], centroids.dtype
        self.label = f"codebook{bits} Triton"
        starts = nn.functional.pad(counts.long().cumsum(0), (1, 0))
        short = bits <= MOST_BITS and centroids.dtype in DTYPES
        made = {
            "words": naive.pack(codes, bits),
            "table": centroids,
            "registers": tables(centroids, centroids.dtype) if short else centroids.new_zeros(8, dtype=torch.int32),
            "values": outliers,
            "columns": columns,
            "owners": naive.rows_of(starts, len(outliers)).int(),
            "starts": starts.int(),
            "bias": bias,
            "semaphores": semaphores_for(len(codes), codes.device),
        }
        for name, tensor in made.items():
            self.register_buffer(name, tensor, persistent=False)

    def codes(self) -> Tensor:
        """Return the codes, uint8 [out, in]."""
        return naive.unpack(self.words, self.width)

    def forward(self, x: Tensor) -> Tensor:
        """Return the product for ``x`` [..., in]: [..., out]."""
        if torch.compiler.is_compiling() or (x.requires_grad and torch.is_grad_enabled()):
            return op.codebook_linear(x, *self.tensors())
        return self.planned(x)

    def compute(self, x: Tensor) -> Tensor:
        """See ``PlannedLinear``."""
        return op.linear(x, self.tensors())

    def tensors(self) -> naive.PackedTensors:
        """Return the arguments of the operator after the input."""
        held: Any = self._buffers
        return naive.PackedTensors(*(held[name] for name in naive.PackedTensors._fields))
