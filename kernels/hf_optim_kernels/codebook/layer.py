"""Linear layers with a codebook on ``hf_optim::codebook_linear``: supported modules, and their packed form.

This module is an entry point of the group ``hf_optim.kernels``. ``supports`` and ``prepack`` read a codebook module:
``codes()`` (uint8 [out, in]), ``bits``, ``shape``, ``centroids``, and its outliers as ``outliers``, ``outlier_counts``
(per row) and ``outlier_columns``.
"""

from __future__ import annotations

from importlib import util
from typing import Any

import torch
from torch import Tensor, nn

from . import naive, op

NAME = "codebook"
CODEBOOK = True
DTYPES = (torch.float16, torch.bfloat16)
LEAST_WEIGHTS = 1 << 20
# Shapes of inputs whose launch is kept ready; a server's prompts have ever new ones.
MOST_PLANS = 64
READ = ("codes", "bits", "shape", "centroids", "outliers", "outlier_counts", "outlier_columns", "in_features")


def supports(module: Any) -> str | None:
    """Return None if the kernel can run a module, otherwise the reason; ``""`` if it is not a codebook module."""
    if not getattr(module, "holds_codes", False) or not all(hasattr(module, name) for name in READ):
        return ""
    device, dtype = module.centroids.device, module.centroids.dtype
    if device.type != "cuda":
        return f"no kernel for {device.type} devices: the module decodes its weight at every call"
    if util.find_spec("triton") is None:
        return "Triton is not installed"
    if dtype not in DTYPES:
        return f"{str(dtype).removeprefix('torch.')} activations; float16 and bfloat16 are supported"
    size = module.shape[0] * module.shape[1]
    if size < LEAST_WEIGHTS:
        return f"a layer of {size:,} weights is left to PyTorch (from {LEAST_WEIGHTS:,})"
    major, minor = torch.cuda.get_device_capability(device)
    return f"the kernel needs compute capability 8.0, this GPU has {major}.{minor}" if major < 8 else None


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


class CodebookWeight(nn.Module):
    """A weight in the layout of the kernels; it computes ``x W^T + bias``.

    Its outliers, their columns and the bias are the tensors it was given. Nothing of it is in a state dict.
    """

    words: Tensor
    table: Tensor
    registers: Tensor
    values: Tensor
    columns: Tensor
    owners: Tensor
    starts: Tensor
    bias: Tensor | None
    counters: Tensor

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
        from .launch import counters_for
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
            "counters": counters_for(len(codes), codes.device),
        }
        for name, tensor in made.items():
            self.register_buffer(name, tensor, persistent=False)
        self.plans: dict[torch.Size, Any] = {}

    def accepts(self, x: Tensor) -> bool:
        """Whether the kernel is right for this input."""
        return x.dtype == self.dtype and x.device == self.words.device

    def codes(self) -> Tensor:
        """The codes again, uint8 [out, in]."""
        return naive.unpack(self.words, self.width)

    def forward(self, x: Tensor) -> Tensor:
        """``x`` [..., in] -> [..., out]."""
        if torch.compiler.is_compiling() or not x.is_cuda or (x.requires_grad and torch.is_grad_enabled()):
            return op.codebook_linear(x, *self._held(), self.bias, self.counters)
        plan = self.plans.get(x.shape)
        y = plan(x) if plan is not None and x.dtype == self.dtype and x.is_contiguous() else None
        return self._plan(x) if y is None else y

    def _held(self) -> tuple[Tensor, ...]:
        return self.words, self.table, self.registers, self.values, self.columns, self.owners, self.starts

    def _plan(self, x: Tensor) -> Tensor:
        """As ``forward``, for a shape without a plan; makes one where one will do."""
        from . import launch

        if len(self.plans) < MOST_PLANS and x.shape not in self.plans:
            plan = launch.plan_for(x, self._held(), self.bias, self.counters)
            if plan is not None:
                self.plans[x.shape] = plan
        return launch.codebook_linear(x, self._held(), self.bias, self.counters)

    def renew(self) -> None:
        """Forget what holds addresses of the buffers: one of them is another tensor now."""
        self.plans = {}

    def _apply(self, fn: Any, recurse: bool = True) -> CodebookWeight:
        self.renew()
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "plans": {}}
