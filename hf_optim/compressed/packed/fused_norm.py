"""Norms that quantize their output for the layers that read it.

Which layers read a norm is found by tracing, as in ``fused_projections``. If all of them are on a kernel that supports
it, the class of the norm is changed to ``QuantizingNorm``: the same module, whose forward tries the kernel first.
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
    """A norm that also quantizes its output, where the kernel of its readers expects this to be faster."""

    _former: type[nn.Module]
    _fused: Callable[[nn.Module, Tensor], Tensor | None]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the output of the norm, equal up to rounding."""
        if len(args) == 1 and not kwargs:
            output = self._fused(self, args[0])
            if output is not None:
                return output
        return self._former.forward(self, *args, **kwargs)

    def unfuse(self) -> None:
        """Restore the norm's own class."""
        self.__class__ = self.__dict__.pop(FORMER)
        del self.__dict__[FUSED]


def fuse_norms(model: nn.Module, traced: Trace | None = None) -> None:
    """Let the norms of a model quantize for the packed layers that read them, where the kernel supports it.

    Args:
        model: the model; norms are changed in place.
        traced: a trace of the model with its packed layers; None traces the model if necessary.
    """
    ready = [m for m in model.modules() if isinstance(m, PackedLinear) and _can_fuse(m) and m.packing.norm is None]
    if not ready:
        return
    traced = traced or trace_packed(model)
    for group in find_norm_groups(traced) if traced is not None else ():
        _fuse(group)


def _can_fuse(layer: nn.Module) -> bool:
    """Return True if a layer is on a kernel that can take quantized inputs from a norm."""
    return isinstance(layer, PackedLinear) and not layer.packing.failure and hasattr(_whole_weight(layer), "fuse")


def _whole_weight(layer: PackedLinear) -> Any:
    """Return the packed weight of a layer, or the fused weight of which it is a slice."""
    packed_weight = layer._modules[PACKED_WEIGHT]
    return packed_weight.fused if isinstance(packed_weight, FusedSlice) else packed_weight


def _fuse(group: NormGroup) -> None:
    norm: Any = group.module
    layers: list[Any] = list(group.linears.values())
    replaced = "forward" in norm.__dict__ or "_old_forward" in norm.__dict__
    if replaced or isinstance(norm, QuantizingNorm) or not layers or not all(_can_fuse(layer) for layer in layers):
        return
    packed_weights = list({id(_whole_weight(layer)): _whole_weight(layer) for layer in layers}.values())
    if len({type(packed_weight) for packed_weight in packed_weights}) > 1:
        return
    fused = packed_weights[0].fuse(norm, packed_weights)
    if fused is None:
        return
    norm.__dict__[FORMER], norm.__dict__[FUSED] = type(norm), fused
    norm.__class__ = QuantizingNorm
    for layer in layers:
        layer.packing.norm = norm
