"""Building quantization schemes of compressed-tensors, which is imported at the first call."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from torch import nn

from .float4 import FORMATS

if TYPE_CHECKING:
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    from ..toolkit.quantization.grids import GridSpec


def weight_args(
    bits: int = 8,
    *,
    type: Literal["int", "float"] = "int",
    strategy: Literal["tensor", "channel", "group"] = "channel",
    group_size: int | None = None,
    symmetric: bool = True,
) -> QuantizationArgs:
    """Build the ``QuantizationArgs`` of weights. ``group_size`` applies to the strategy ``group`` only."""
    from compressed_tensors.quantization import QuantizationArgs

    return QuantizationArgs(
        num_bits=bits,
        type=type,
        strategy=strategy,
        group_size=group_size if strategy == "group" else None,
        symmetric=symmetric,
    )


def activation_args(
    type: Literal["int8", "fp8", "int4"], static: bool = False, symmetric: bool = True
) -> QuantizationArgs:
    """Build the ``QuantizationArgs`` of inputs: dynamic scales per token, or one calibrated scale per tensor."""
    from compressed_tensors.quantization import QuantizationArgs

    return QuantizationArgs(
        num_bits=4 if type == "int4" else 8,
        type="float" if type == "fp8" else "int",
        strategy="tensor" if static else "token",
        dynamic=not static,
        symmetric=symmetric,
    )


def scheme(
    bits: int | None = 8,
    type: Literal["int", "float"] = "int",
    strategy: Literal["tensor", "channel", "group"] = "channel",
    group_size: int | None = None,
    symmetric: bool = True,
    activations: Literal["int8", "fp8", "int4"] | None = None,
    static: bool = False,
    symmetric_activations: bool = True,
) -> QuantizationScheme:
    """Build a quantization scheme for linear layers, with the storage format that compressed-tensors infers for it.

    Asymmetric weights are an exception: compressed-tensors would pack their zero points, and transformers (5.17 to 5.24
    with compressed-tensors 0.20) then rejects the checkpoint, so their codes are stored one per byte.

    Args:
        bits: of the weights, 2 to 8; None leaves the weights unquantized.
        type, strategy, group_size, symmetric: of the weights, see ``weight_args``.
        activations: the type to which inputs are quantized, or None.
        static: one calibrated scale per module for the inputs, instead of one per token.
        symmetric_activations: False adds a zero point to the grid of the inputs.
    """
    from compressed_tensors.compressors.format import infer_module_format
    from compressed_tensors.config import CompressionFormat
    from compressed_tensors.quantization import QuantizationScheme

    weights = bits and weight_args(bits, type=type, strategy=strategy, group_size=group_size, symmetric=symmetric)
    inputs = activations and activation_args(activations, static, symmetric_activations)
    made = QuantizationScheme(targets=["Linear"], weights=weights or None, input_activations=inputs or None)
    made.format = infer_module_format(nn.Linear, made)
    if made.format == CompressionFormat.pack_quantized and not symmetric:
        # transformers cannot load packed zero points: their shape differs from the one it prepares.
        made.format = CompressionFormat.naive_quantized
    return made


def float4_scheme(format: str) -> QuantizationScheme:
    """Build the scheme of weights of 4-bit floats with inputs as they are: ``"nvfp4"`` (NVFP4A16) or ``"mxfp4"``."""
    from compressed_tensors.config import CompressionFormat
    from compressed_tensors.quantization import preset_name_to_scheme

    made: QuantizationScheme = preset_name_to_scheme(f"{format.upper()}A16", ["Linear"])
    made.format = CompressionFormat(FORMATS[format])
    return made


def scheme_of(
    spec: GridSpec | None,
    activations: Literal["int8", "fp8", "int4"] | None = None,
    static: bool = False,
    symmetric_activations: bool = True,
) -> QuantizationScheme:
    """Build the scheme of weights on a grid (None: unquantized weights); for the other arguments see ``scheme``."""
    inputs = (activations, static, symmetric_activations)
    if spec is not None and spec.is_float4:
        return float4_scheme(spec.type)
    if spec is None:
        return scheme(None, "int", "channel", None, True, *inputs)
    return scheme(spec.bits, spec.type, spec.strategy, spec.group_size, spec.symmetric, *inputs)  # type: ignore[arg-type]


def embedding_scheme(scheme: QuantizationScheme) -> QuantizationScheme:
    """Return the scheme of linear layers for an embedding: its inputs are indices, its codes are not packed."""
    from compressed_tensors.config import CompressionFormat

    changes: dict[str, object] = {"input_activations": None, "format": CompressionFormat.naive_quantized}
    return scheme.model_copy(update=changes, deep=True)
