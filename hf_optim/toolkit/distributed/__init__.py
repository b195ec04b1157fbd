"""Collectives over ranks, and sharded parameters."""

from . import collectives, fsdp
from .fsdp import FullWeights

__all__ = [
    "FullWeights",
    "collectives",
    "fsdp",
]
