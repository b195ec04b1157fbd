"""Quantize in the norm that computes the rows (ZeroQuant, 2206.01861, section 4.3).

A norm and the packed weights that read its output share a ``Handoff``. Where quantizing takes a separate launch, the
norm computes its output, the codes and the scales in one kernel, and a packed weight that is called with that tensor
takes the codes. With any other input a packed weight quantizes by itself. The codes are those of the unfused layer, up
to the rounding of the norm's own sums.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from . import naive, op

# Norms without any of these attributes are not fused.
EPSILONS = ("variance_epsilon", "eps", "epsilon")


class Handoff:
    """The last output of a norm and its codes, until every packed weight has taken them.

    Attributes:
        readers: the number of packed weights.
        held: the norm's output, its version, codes, scales, zero points, and a bit per packed weight that has not taken
            them yet; None if there is nothing to take. One tuple, so that another thread sees all of it or nothing.
    """

    def __init__(self, readers: int) -> None:
        self.readers = readers
        self.held: tuple[Tensor, int, Tensor, Tensor, Tensor, int] | None = None

    def give(self, row: Tensor, codes: Tensor, scale: Tensor, zero: Tensor) -> None:
        """Store the codes of ``row`` [..., in]."""
        self.held = (row, _version(row), codes, scale, zero, (1 << self.readers) - 1)

    def take(self, x: Tensor, bit: int) -> tuple[Tensor, Tensor, Tensor] | None:
        """Return codes, scales and zero points of ``x``; None if they are of another tensor, or ``x`` was modified."""
        held = self.held
        if held is None or held[0] is not x or held[1] != _version(x) or not held[5] & bit:
            return None
        waiting = held[5] & ~bit
        self.held = (*held[:5], waiting) if waiting else None
        return held[2:5]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "held": None}


def _version(x: Tensor) -> int:
    # Tensors of inference mode have no version.
    return 0 if x.is_inference() else x._version


class NormQuantizer:
    """A norm that computes the codes of its output as well.

    Attributes:
        fused_op: ``quantize.RMS_NORM`` or ``quantize.LAYER_NORM``.
        eps: of the norm.
        float8, symmetric, dtype: of the packed weights' inputs.
        least: the fewest rows for which fusing pays.
    """

    def __init__(
        self, fused_op: int, eps: float, float8: bool, symmetric: bool, dtype: torch.dtype, least: int, handoff: Handoff
    ) -> None:
        self.fused_op, self.eps, self.float8, self.symmetric = fused_op, eps, float8, symmetric
        self.dtype, self.least, self.handoff = dtype, least, handoff

    def __call__(self, norm: nn.Module, x: Tensor) -> Tensor | None:
        """Return the output of ``norm`` for ``x`` [..., in]; None where the norm itself should compute it."""
        if torch.compiler.is_compiling() or x.numel() < self.least * x.shape[-1] or x.dtype != self.dtype:
            return None
        held: Any = norm._parameters
        weight, bias = held["weight"], held.get("bias")
        if torch.is_grad_enabled() and any(t.requires_grad for t in (x, weight, bias) if t is not None):
            return None
        if x.device != weight.device or not op.on_triton(x, x.dtype) or torch.is_autocast_enabled(x.device.type):
            return None
        from .quantize import quantize_rows

        codes, scale, zero, row = quantize_rows(
            x, self.float8, self.symmetric, fused_op=self.fused_op, second=weight, third=bias, eps=self.eps, keep=True
        )
        self.handoff.give(row, codes, scale, zero)
        return row


@torch.no_grad()
def fuse(norm: nn.Module, packed_weights: Sequence[Any]) -> NormQuantizer | None:
    """Return the fused norm of ``packed_weights`` (``layer.PackedWeight``), all of which read its output.

    Returns None if the packed weights have static or different input grids, or the norm is neither an RMSNorm nor a
    LayerNorm, by the numbers it computes.
    """
    first = packed_weights[0]
    kinds = {(o.float8, o.symmetric, o.dtype, o.weight.device, o.weight.shape[1]) for o in packed_weights}
    if len(kinds) > 1 or any(o.input_scale is not None for o in packed_weights):
        return None
    found = norm_kind(norm, first.weight.shape[1], first.dtype, first.weight.device)
    if found is None:
        return None
    from .tiles import MOST_DECODE_ROWS

    handoff = Handoff(len(packed_weights))
    for index, packed_weight in enumerate(packed_weights):
        packed_weight.handoff, packed_weight.bit = handoff, 1 << index
    return NormQuantizer(*found, first.float8, first.symmetric, first.dtype, MOST_DECODE_ROWS + 1, handoff)


def norm_kind(norm: nn.Module, columns: int, dtype: torch.dtype, device: torch.device) -> tuple[int, float] | None:
    """Return ``quantize.RMS_NORM`` or ``LAYER_NORM`` and the epsilon, by outputs for random rows, or None."""
    from .quantize import LAYER_NORM, RMS_NORM

    weight, bias = norm._parameters.get("weight"), norm._parameters.get("bias")
    eps = next((getattr(norm, name) for name in EPSILONS if isinstance(getattr(norm, name, None), float)), None)
    if weight is None or eps is None or weight.shape != (columns,):
        return None
    if any(t.dtype != dtype or t.device != device for t in (weight, bias) if t is not None):
        return None
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 3, columns, generator=generator)
    # A row as small as the root of epsilon reveals a wrong epsilon.
    x = (x * torch.tensor([1.0, 30.0, eps**0.5])[:, None] + 0.1 * x.new_tensor([1.0, 30.0, 0.0])[:, None]).to(
        device, dtype
    )
    try:
        y = type(norm).forward(norm, x)
    except Exception:  # it takes other inputs than [batch, rows, columns]
        return None
    if bias is None and _equal(y, naive.rms_norm(x, weight, eps)):
        return RMS_NORM, eps
    return (LAYER_NORM, eps) if _equal(y, naive.layer_norm(x, weight, bias, eps)) else None


def _equal(y: Any, wanted: Tensor) -> bool:
    """Return True if ``y`` equals ``wanted`` up to the last place, since the order of sums may differ."""
    if not isinstance(y, Tensor) or y.shape != wanted.shape or y.dtype != wanted.dtype:
        return False
    step = torch.finfo(wanted.dtype).eps
    return bool(((y - wanted).abs() <= 4 * step * (wanted.abs() + step)).all())
