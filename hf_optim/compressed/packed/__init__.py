"""Packed layers, which hold only a compressed weight and run on kernels: making, loading, fusing and undoing them."""

from .kernel import Kernel
from .packed_linear import KernelWarning, PackedLinear

__all__ = ["Kernel", "KernelWarning", "PackedLinear"]
