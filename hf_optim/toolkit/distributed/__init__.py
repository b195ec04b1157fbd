"""Collectives over ranks, and parameters sharded by FSDP2."""

from . import collectives, fsdp
from .fsdp import FullWeights

__all__ = [
    "FullWeights",
    "collectives",
    "fsdp",
]
