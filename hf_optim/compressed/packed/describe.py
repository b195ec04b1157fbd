"""Describing the weight of a layer for kernels (``QuantizedWeight``), from its scheme or its 2:4 pattern."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from ..codes import group_size_of, is_sparse24, recover_codes
from ..float4 import float4_format
from ..weights import Codes, InputQuantization, QuantizedWeight

if TYPE_CHECKING:
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

OFFLOADED = "its weight is offloaded"


def scheme_unsupported_reason(scheme: QuantizationScheme) -> str:
    """Return why a layer with this ``QuantizationScheme`` cannot be described for kernels, or ``""``."""
    weights, inputs = scheme.weights, scheme.input_activations
    if weights is None:
        return "its weights are not quantized"
    if scheme.output_activations is not None:
        return "its outputs are quantized"
    if float4_format(weights):
        return "" if inputs is None else "inputs of 4-bit floats"
    if weights.strategy not in ("tensor", "channel", "group"):
        return f"scales per {_plain(weights.strategy)}"
    fits = weights.num_bits == 8 and bool(weights.symmetric) if weights.type == "float" else 2 <= weights.num_bits <= 8
    if not fits:
        return f"{weights.num_bits}-bit {_plain(weights.type)} codes"
    if inputs is None:
        return ""
    strategy = "token" if inputs.dynamic is True else "tensor"
    if inputs.num_bits != 8 or inputs.dynamic not in (True, False) or inputs.strategy != strategy:
        return f"inputs quantized to {inputs.num_bits} bits per {_plain(inputs.strategy)}"
    return ""


def describe_weight(
    name: str,
    shape: tuple[int, int],
    scheme: QuantizationScheme,
    scale: Tensor,
    bias: Tensor | None,
    codes: Callable[[], Codes],
    *,
    ordered: bool = False,
    sparse24: bool = False,
    outliers: float | None = None,
) -> QuantizedWeight:
    """Describe a quantized weight. ``scheme_unsupported_reason`` must be ``""`` for its scheme.

    Args:
        name: qualified name of the layer.
        shape: ``[out, in]``.
        scheme: how weights and inputs are quantized.
        scale: its dtype and device are those of the weight; of 4-bit floats, a tensor in the dtype of the model.
        bias: ``[out]``, or None.
        codes, ordered, sparse24: see ``QuantizedWeight``.
        outliers: threshold for outlier decomposition; ignored unless the weight has the form that
            ``QuantizedWeight.outliers`` requires.
    """
    args = scheme.weights
    return QuantizedWeight(
        name=name,
        shape=shape,
        dtype=scale.dtype,
        device=scale.device,
        kind=weight_kind(args),
        bits=args.num_bits,
        group_size=group_size_of(args, shape[1]),
        symmetric=bool(args.symmetric),
        ordered=ordered,
        inputs=input_quantization(scheme),
        sparse24=sparse24,
        bias=None if bias is None else bias.detach(),
        codes=codes,
        outliers=outliers if _allows_outlier_decomposition(scheme) and not ordered else None,
    )


def input_quantization(scheme: QuantizationScheme) -> InputQuantization | None:
    """Return how a scheme quantizes inputs, or None."""
    inputs = scheme.input_activations
    if inputs is None:
        return None
    return InputQuantization(
        "float8" if inputs.type == "float" else "int8", inputs.dynamic is True, bool(inputs.symmetric)
    )


def _allows_outlier_decomposition(scheme: QuantizationScheme) -> bool:
    args = scheme.weights
    plain = args.type == "int" and args.num_bits == 8 and bool(args.symmetric) and args.strategy != "group"
    return plain and scheme.input_activations is None


def describe_module(
    name: str, module: nn.Linear, look_for_24: bool, outliers: float | None = None
) -> QuantizedWeight | str:
    """Describe the weight of a layer in memory.

    Args:
        name: qualified name of the layer.
        module: the layer, in the decoded state (see ``state``) or not quantized.
        look_for_24: check the weight for the 2:4 pattern.
        outliers: see ``describe_weight``.

    Returns:
        The description, or the reason why no kernel can run the layer; ``""`` if it is not compressed.
    """
    scheme: Any = getattr(module, "quantization_scheme", None)
    weight = module._parameters.get("weight")
    if scheme is None and not look_for_24:
        return ""
    if weight is None:
        return "its weight is not a parameter" if scheme is not None else ""
    if scheme is None:
        return _describe_dense(name, module, weight.detach())
    if weight.is_meta:
        return OFFLOADED
    if reason := scheme_unsupported_reason(scheme):
        return reason
    scale: Any = getattr(module, "weight_scale", None)
    if scale is None:
        return "it has no weight_scale"
    if scale.dtype != weight.dtype and not float4_format(scheme.weights):
        return f"its scales are {scale.dtype}, its weight is {weight.dtype}"
    g_idx = getattr(module, "weight_g_idx", None)
    size = group_size_of(scheme.weights, weight.shape[1])
    plain = g_idx is None or bool((g_idx.long() == torch.arange(len(g_idx), device=g_idx.device) // size).all())
    return describe_weight(
        name,
        (weight.shape[0], weight.shape[1]),
        scheme,
        weight.detach(),
        module.bias,
        # Holds the dense weight, so it must not be kept after prepacking.
        lambda: recover_codes(module),
        ordered=not plain,
        sparse24=look_for_24 and plain and is_sparse24(weight.detach()),
        outliers=outliers,
    )


def _describe_dense(name: str, module: nn.Linear, weight: Tensor) -> QuantizedWeight | str:
    if weight.is_meta or not weight.is_floating_point() or not is_sparse24(weight):
        return ""
    return QuantizedWeight(
        name=name,
        shape=(weight.shape[0], weight.shape[1]),
        dtype=weight.dtype,
        device=weight.device,
        kind="dense",
        bits=weight.element_size() * 8,
        group_size=weight.shape[1],
        symmetric=True,
        ordered=False,
        inputs=None,
        sparse24=True,
        bias=None if module.bias is None else module.bias.detach(),
        codes=lambda: Codes(weight, None, None),
    )


def weight_kind(args: QuantizationArgs) -> Literal["int", "float", "float4"]:
    """Return the kind of a quantized weight, as ``QuantizedWeight`` names it."""
    if args.type != "float":
        return "int"
    return "float4" if args.num_bits == 4 else "float"


def _plain(value: Any) -> Any:
    return getattr(value, "value", value)
