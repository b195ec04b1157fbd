"""Quantizing inside of the norm that makes the rows (ZeroQuant, 2206.01861, section 4.3).

A norm and the packed weights that read its output share a ``Handoff``. Where quantizing takes a launch of its own, the
norm makes its output, the codes and the scales in one kernel, and a packed weight that is called with that very tensor
takes the codes. Whatever else a packed weight is called with, it quantizes itself. The codes are those of the unfused
layer, but where the rounding of the norm's own sums differs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from . import naive, op

# Of norms without any of these nothing is known.
EPSILONS = ("variance_epsilon", "eps", "epsilon")


class Handoff:
    """What a norm made last, until every packed weight has taken it.

    Attributes:
        readers: how many packed weights there are.
        held: the norm's output, its version, codes, scales, zero points, and a bit for each packed weight that has not
            taken them yet; None when there is nothing to take. One tuple, so that another thread sees all or nothing of
            it.
    """

    def __init__(self, readers: int) -> None:
        self.readers = readers
        self.held: tuple[Tensor, int, Tensor, Tensor, Tensor, int] | None = None

    def give(self, row: Tensor, codes: Tensor, scale: Tensor, zero: Tensor) -> None:
        """Leave what belongs to ``row`` [..., in]."""
        self.held = (row, _version(row), codes, scale, zero, (1 << self.readers) - 1)

    def take(self, x: Tensor, bit: int) -> tuple[Tensor, Tensor, Tensor] | None:
        """Codes, scales and zero points of ``x``, or None where they are of another tensor or ``x`` was written to."""
        held = self.held
        if held is None or held[0] is not x or held[1] != _version(x) or not held[5] & bit:
            return None
        waiting = held[5] & ~bit
        self.held = (*held[:5], waiting) if waiting else None
        return held[2:5]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "held": None}


def _version(x: Tensor) -> int:
    # Tensors of inference mode have none.
    return 0 if x.is_inference() else x._version


class NormQuantizer:
    """Makes the output of a norm together with its codes.

    Attributes:
        fused_op: ``quantize.RMS_NORM`` or ``quantize.LAYER_NORM``.
        eps: of the norm.
        float8, symmetric, dtype: of the packed weights' inputs.
        least: the fewest rows for which it pays.
    """

    def __init__(
        self, fused_op: int, eps: float, float8: bool, symmetric: bool, dtype: torch.dtype, least: int, handoff: Handoff
    ) -> None:
        self.fused_op, self.eps, self.float8, self.symmetric = fused_op, eps, float8, symmetric
        self.dtype, self.least, self.handoff = dtype, least, handoff

    def __call__(self, norm: nn.Module, x: Tensor) -> Tensor | None:
        """The output of ``norm`` for ``x`` [..., in]; None where the norm had better make it itself."""
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
    """What makes a norm's output for ``packed_weights`` (``layer.PackedWeight``), all of which read it.

    None for packed weights whose inputs are quantized to grids of their own or to different ones, and for a norm that
    is neither an RMSNorm nor a LayerNorm; which of these it is shows in what it computes.
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
    """``quantize.RMS_NORM`` or ``quantize.LAYER_NORM`` and the epsilon, or None: asked of the module on random rows."""
    from .quantize import LAYER_NORM, RMS_NORM

    weight, bias = norm._parameters.get("weight"), norm._parameters.get("bias")
    eps = next((getattr(norm, name) for name in EPSILONS if isinstance(getattr(norm, name, None), float)), None)
    if weight is None or eps is None or weight.shape != (columns,):
        return None
    if any(t.dtype != dtype or t.device != device for t in (weight, bias) if t is not None):
        return None
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 3, columns, generator=generator)
    # In a row as small as the root of epsilon, a wrong epsilon shows.
    x = (x * torch.tensor([1.0, 30.0, eps**0.5])[:, None] + 0.1 * x.new_tensor([1.0, 30.0, 0.0])[:, None]).to(
        device, dtype
    )
    try:
        y = type(norm).forward(norm, x)
    except Exception:  # it wants other inputs than [batch, rows, columns]
        return None
    if bias is None and _equal(y, naive.rms_norm(x, weight, eps)):
        return RMS_NORM, eps
    return (LAYER_NORM, eps) if _equal(y, naive.layer_norm(x, weight, bias, eps)) else None


def _equal(y: Any, wanted: Tensor) -> bool:
    """But for the last place, since the order of sums may differ."""
    if not isinstance(y, Tensor) or y.shape != wanted.shape or y.dtype != wanted.dtype:
        return False
    step = torch.finfo(wanted.dtype).eps
    return bool(((y - wanted).abs() <= 4 * step * (wanted.abs() + step)).all())
