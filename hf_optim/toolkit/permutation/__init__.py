"""Permutations, rotations and scales of channels that do not change what a model computes."""

from . import folding, orthogonal, rotating, scale_bounds
from .column_search import kept_sum, kept_sum_row_wise, search_permutation
from .permutation_sites import SITE_KINDS, Site, find_sites

__all__ = [
    "SITE_KINDS",
    "Site",
    "find_sites",
    "folding",
    "kept_sum",
    "kept_sum_row_wise",
    "orthogonal",
    "rotating",
    "scale_bounds",
    "search_permutation",
]
