"""What the packed experts of a GPU and of a CPU share: their interface, and the mixture of any activation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..common.codes import Codes
from . import naive

UP, DOWN = "up", "down"
# Counters of a module of experts where kernels run: the tiles of one launch that programs may share, and pairs whose
# shares a tile may have.
SEMAPHORES = 1 << 14


class ExpertsBase(nn.Module):
    """The experts of a mixture layer with packed matrices.

    Attributes:
        count: E.
        dtype: of the model.
        label: what they run on.
    """

    count: int
    dtype: torch.dtype
    label: str

    def accepts(self, x: Tensor) -> bool:
        """Return True if ``x`` is floating, and on the device of the codes."""
        return x.is_floating_point() and x.device == self._buffers["up_packed"].device  # type: ignore[union-attr]

    def pairs(self, x: Tensor, experts: Tensor, side: str) -> Tensor:
        """Return the product of each pair with one of its expert's matrices: see ``naive.expert_linear``."""
        raise NotImplementedError

    def codes(self, side: str, expert: int) -> list[Codes]:
        """Return the codes of an expert's matrix, part by part, bitwise identical to those it was packed from."""
        raise NotImplementedError

    def forward(
        self,
        hidden: Tensor,
        experts: Tensor,
        weights: Tensor,
        activation: Callable[[Tensor], Tensor],
        norm: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        """Return the output of the mixture layer, [T, d] in the dtype of ``hidden``.

        Args:
            hidden: [T, d].
            experts: int64 [T, k]; numbers from E on stand for "computed by none".
            weights: [T, k].
            activation: the gate or the activation, from the first product [T k, out] to the input of the second.
            norm: applied to the outputs of experts, before they are weighted.
        """
        inner = activation(self.pairs(hidden, experts, UP))
        out = self.pairs(inner, experts, DOWN)
        return naive.combine(out if norm is None else norm(out), weights, hidden.dtype)


def describe(weight: Any) -> str:
    """Return the bits of experts and what they share scales in, for a label."""
    matrix = weight.up
    kinds = sorted({_kind(one) for one in (weight.up, weight.down)})
    text = "/".join(kinds)
    if matrix.group_size < matrix.shape[1] and matrix.kind != "float4":
        text += f", groups of {matrix.group_size}"
    return text if matrix.inputs is None else f"{text}, {matrix.inputs.type} inputs"


def _kind(matrix: Any) -> str:
    if matrix.kind == "float4":
        return "NVFP4" if matrix.group_size == 16 else "MXFP4"
    return "float8" if matrix.kind == "float" else f"{matrix.bits}-bit"


def zeros_of(part: Any, bits: int) -> Tensor:
    """Return the zero points of a part, uint8 [rows, groups]; those of a symmetric grid where it has none."""
    if part.zero is None:
        return torch.full(part.scale.shape, 2 ** (bits - 1), dtype=torch.uint8, device=part.scale.device)
    return part.zero.to(torch.uint8)
