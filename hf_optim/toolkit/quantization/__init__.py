"""Grids, codebooks, Hessian-based rounding and fake quantization."""

from . import fake_quant
from .activation_rounding import Rounding, RoundingSensitivity, group_by_input
from .bit_budget import allocate_bits, allocate_bits_by_rank, stored_bytes
from .block_reconstruction import BlockExamples, reconstruct_block, trainable_vectors
from .codebooks import fit_codebook, nearest_centroids, outlier_mask
from .fake_quant import LEARNED_SCALES, FakeQuantLinear
from .grids import Grid, GridSpec, fit_group_size, make_grid, qparams_from_range, round_codes
from .hessian import inverse_cholesky
from .least_squares import output_error, reconstruct_weights
from .obq_recursion import quantize_greedily
from .ranges import ASYMMETRIC_INT8, ChannelMinMax, even_groups, group_qparams, optimal_groups, quantize_dequantize

__all__ = [
    "ASYMMETRIC_INT8",
    "LEARNED_SCALES",
    "BlockExamples",
    "ChannelMinMax",
    "FakeQuantLinear",
    "Grid",
    "GridSpec",
    "Rounding",
    "RoundingSensitivity",
    "allocate_bits",
    "allocate_bits_by_rank",
    "even_groups",
    "fake_quant",
    "fit_codebook",
    "fit_group_size",
    "group_by_input",
    "group_qparams",
    "inverse_cholesky",
    "make_grid",
    "nearest_centroids",
    "optimal_groups",
    "outlier_mask",
    "output_error",
    "qparams_from_range",
    "quantize_dequantize",
    "quantize_greedily",
    "reconstruct_block",
    "reconstruct_weights",
    "round_codes",
    "stored_bytes",
    "trainable_vectors",
]
