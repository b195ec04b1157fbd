"""Norms that quantize for the layers that read them.

Which layers read a norm is found by tracing, as in ``joining``. Where all of them are on a kernel that can do it, the
norm's class is changed to ``QuantizingNorm``: the same module, whose forward asks the kernel first.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from ...toolkit.topology.graph import Trace
from ...toolkit.topology.norm_groups import NormGroup, find_norm_groups
from .fused_projections import trace_packed
from .packed_linear import PACKED_WEIGHT, PackedLinear
from .shared_output import FusedSlice

FORMER, FUSED = "_former", "_fused"


class QuantizingNorm(nn.Module):
    """A norm that makes the codes of its output beside it, where its kernel says that this pays."""

    _former: type[nn.Module]
    _fused: Callable[[nn.Module, Tensor], Tensor | None]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the norm computes, to rounding."""
        if len(args) == 1 and not kwargs:
            output = self._fused(self, args[0])
            if output is not None:
                return output
        return self._former.forward(self, *args, **kwargs)

    def unfuse(self) -> None:
        """Give the norm its own class back."""
        self.__class__ = self.__dict__.pop(FORMER)
        del self.__dict__[FUSED]


def fuse_norms(model: nn.Module, wiring: Trace | None = None) -> None:
    """Let the norms of a model quantize for the packed layers that read them, where these can take it.

    Args:
        wiring: a trace of the model with its packed layers; None makes one, if it is needed.
    """
    ready = [m for m in model.modules() if isinstance(m, PackedLinear) and _fuses(m) and m.packing.norm is None]
    if not ready:
        return
    wiring = wiring or trace_packed(model)
    for group in find_norm_groups(wiring) if wiring is not None else ():
        _fuse(group)


def _fuses(layer: nn.Module) -> bool:
    return isinstance(layer, PackedLinear) and not layer.packing.failure and hasattr(_prepacked(layer), "fuse")


def _prepacked(layer: PackedLinear) -> Any:
    packed_weight = layer._modules[PACKED_WEIGHT]
    return packed_weight.fused if isinstance(packed_weight, FusedSlice) else packed_weight


def _fuse(group: NormGroup) -> None:
    norm: Any = group.module
    layers: list[Any] = list(group.linears.values())
    own = "forward" in norm.__dict__ or "_old_forward" in norm.__dict__
    if own or isinstance(norm, QuantizingNorm) or not layers or not all(_fuses(layer) for layer in layers):
        return
    packed_weights = list({id(_prepacked(layer)): _prepacked(layer) for layer in layers}.values())
    if len({type(packed_weight) for packed_weight in packed_weights}) > 1:
        return
    made = packed_weights[0].fuse(norm, packed_weights)
    if made is None:
        return
    norm.__dict__[FORMER], norm.__dict__[FUSED] = type(norm), made
    norm.__class__ = QuantizingNorm
    for layer in layers:
        layer.packing.norm = norm
