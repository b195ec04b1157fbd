"""Weights in host memory or on disk, fetched into a ring of buffers on the device while the model computes."""

from .cache import OnHost, Ring, host_cache
from .classes import STATE, find_state, stored_weights
from .door import offload, offload_plan, place, require_offloadable, restore_weights
from .files import OpenFile, Piece
from .plan import OffloadPlan, make_plan
from .sizes import parse_size, show_size
from .tensors import ALIGNMENT

__all__ = [
    "ALIGNMENT",
    "STATE",
    "OffloadPlan",
    "OnHost",
    "OpenFile",
    "Piece",
    "Ring",
    "find_state",
    "host_cache",
    "make_plan",
    "offload",
    "offload_plan",
    "parse_size",
    "place",
    "require_offloadable",
    "restore_weights",
    "show_size",
    "stored_weights",
]
