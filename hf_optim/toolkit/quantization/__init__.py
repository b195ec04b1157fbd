"""Grids, codebooks, Hessian-based rounding and fake quantization."""

from . import activation_rounding, bit_budget, block_reconstruction, codebooks, fake_quant, float4
from .cache_size import CacheLayer, CacheSize, cache_layers, cache_size, layer_patterns
from .grids import Grid, GridSpec, fit_group_size, group_by_scale, make_grid, qparams_from_range, round_codes
from .group_fit import adjusted_groups, adjusted_message, stored_bits
from .hessian import damped, descent_factor, inverse_cholesky
from .key_values import KeyValueScheme, scheme_of, set_scheme
from .learned_rounding import LearnedRounding
from .least_squares import output_error, reconstruct_weights
from .obq_recursion import quantize_greedily
from .ranges import ASYMMETRIC_INT8, ChannelMinMax, even_groups, group_qparams, optimal_groups, quantize_dequantize
from .scale_refit import refit_scales
from .scales import storable_scale
from .signed_descent import ProjectedAdam, SignedDescent

__all__ = [
    "ASYMMETRIC_INT8",
    "CacheLayer",
    "CacheSize",
    "ChannelMinMax",
    "Grid",
    "GridSpec",
    "KeyValueScheme",
    "LearnedRounding",
    "ProjectedAdam",
    "SignedDescent",
    "activation_rounding",
    "adjusted_groups",
    "adjusted_message",
    "bit_budget",
    "block_reconstruction",
    "cache_layers",
    "cache_size",
    "codebooks",
    "damped",
    "descent_factor",
    "even_groups",
    "fake_quant",
    "fit_group_size",
    "float4",
    "group_by_scale",
    "group_qparams",
    "inverse_cholesky",
    "layer_patterns",
    "make_grid",
    "optimal_groups",
    "output_error",
    "qparams_from_range",
    "quantize_dequantize",
    "quantize_greedily",
    "reconstruct_weights",
    "refit_scales",
    "round_codes",
    "scheme_of",
    "set_scheme",
    "storable_scale",
    "stored_bits",
]
