"""Layers that hold compressed weights alone, and the readers of checkpoints that have them."""

from .kernel import Kernel
from .packed_linear import KernelWarning, PackedLinear

__all__ = ["Kernel", "KernelWarning", "PackedLinear"]
