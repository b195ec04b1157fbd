"""Grids, codebooks, Hessian-based rounding and fake quantization."""

from . import fake_quant
from .activation_rounding import Rounding, RoundingShift, shared_inputs
from .bit_budget import cheapest_bits, ranked_bits, stored_bytes
from .block_reconstruction import Lessons, imitate, vectors_of
from .codebooks import make_codebook, nearest, outlier_mask
from .fake_quant import STEPS, FakeQuantLinear
from .grids import Grid, GridSpec, fit_group_size, make_grid, round_codes, scale_of_range
from .hessian import inverse_factor
from .least_squares import output_error, reconstruct
from .obq_recursion import quantize_greedily
from .ranges import GRID, ChannelMinMax, even_groups, fitted_groups, group_grids, rounded_to

__all__ = [
    "GRID",
    "STEPS",
    "ChannelMinMax",
    "FakeQuantLinear",
    "Grid",
    "GridSpec",
    "Lessons",
    "Rounding",
    "RoundingShift",
    "cheapest_bits",
    "even_groups",
    "fake_quant",
    "fit_group_size",
    "fitted_groups",
    "group_grids",
    "imitate",
    "inverse_factor",
    "make_codebook",
    "make_grid",
    "nearest",
    "outlier_mask",
    "output_error",
    "quantize_greedily",
    "ranked_bits",
    "reconstruct",
    "round_codes",
    "rounded_to",
    "scale_of_range",
    "shared_inputs",
    "stored_bytes",
    "vectors_of",
]
