"""Collectives over ranks, and sharded parameters."""

from . import collectives, fsdp
from .fsdp import WholeWeights

__all__ = [
    "WholeWeights",
    "collectives",
    "fsdp",
]
