"""Permute the channels of a model without changing what it computes."""

from . import folding
from .column_search import kept_by_rows, kept_sum, search
from .permutation_sites import KINDS, Site, sites

__all__ = [
    "KINDS",
    "Site",
    "folding",
    "kept_by_rows",
    "kept_sum",
    "search",
    "sites",
]
