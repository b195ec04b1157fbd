"""Quantized weights in the format of compressed-tensors, which transformers reads natively.

In memory, a quantized module has the state that stock transformers gives it after reloading the checkpoint: the
dequantized weight in ``module.weight``, the parameter ``weight_scale`` (and ``weight_zero_point``), the attribute
``quantization_scheme``, the status ``DECOMPRESSED``, and a forward that quantizes the activations if the scheme
includes them. Weights are packed in ``save_pretrained``, through the hook of transformers for quantized models
(``attach_quantizer``).
"""

from .codec import scheme_on
from .outlier_columns import set_outlier_threshold
from .quantizer import attach_quantizer, detach_quantizer
from .schemes import activation_args, scheme, scheme_of, weight_args
from .state import clear, dump_module_state, input_quantizer, load_module_state, quantized_modules, store
from .storability import has_stacked_weights, storable
from .zero_point_packing import pack_zero_points

__all__ = [
    "activation_args",
    "attach_quantizer",
    "clear",
    "detach_quantizer",
    "dump_module_state",
    "has_stacked_weights",
    "input_quantizer",
    "load_module_state",
    "pack_zero_points",
    "quantized_modules",
    "scheme",
    "scheme_of",
    "scheme_on",
    "set_outlier_threshold",
    "storable",
    "store",
    "weight_args",
]
