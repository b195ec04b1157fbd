"""Quantization schemes in the words of compressed-tensors, which is imported when first needed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from torch import nn

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
    """How weights are quantized, in compressed-tensors' words. ``group_size`` belongs to the strategy ``group``."""
    from compressed_tensors.quantization import QuantizationArgs

    return QuantizationArgs(
        num_bits=bits,
        type=type,
        strategy=strategy,
        group_size=group_size if strategy == "group" else None,
        symmetric=symmetric,
    )


def activation_args(type: Literal["int8", "fp8"], static: bool = False, symmetric: bool = True) -> QuantizationArgs:
    """How inputs are quantized: per token with scales made on the fly, or per tensor with one calibrated scale."""
    from compressed_tensors.quantization import QuantizationArgs

    return QuantizationArgs(
        num_bits=8,
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
    activations: Literal["int8", "fp8"] | None = None,
    static: bool = False,
    symmetric_activations: bool = True,
) -> QuantizationScheme:
    """A quantization scheme for linear layers, with the storage format that compressed-tensors chooses for it.

    Asymmetric weights are the exception: compressed-tensors would pack their zero points, and transformers (5.17 to
    5.23 with compressed-tensors 0.20) then refuses the checkpoint, so their codes are stored one to a byte.

    Args:
        bits: of the weights, 2 to 8; None leaves the weights as they are.
        type, strategy, group_size, symmetric: of the weights, see ``weight_args``.
        activations: None, or the type to which inputs are quantized.
        static: one calibrated scale per module for the inputs, instead of one per token.
        symmetric_activations: False adds a zero point to the inputs' grid.
    """
    from compressed_tensors.compressors.format import infer_module_format
    from compressed_tensors.config import CompressionFormat
    from compressed_tensors.quantization import QuantizationScheme

    weights = bits and weight_args(bits, type=type, strategy=strategy, group_size=group_size, symmetric=symmetric)
    inputs = activations and activation_args(activations, static, symmetric_activations)
    made = QuantizationScheme(targets=["Linear"], weights=weights or None, input_activations=inputs or None)
    made.format = infer_module_format(nn.Linear, made)
    if made.format == CompressionFormat.pack_quantized and not symmetric:
        # transformers does not find packed zero points again: their shape differs from the one it prepares.
        made.format = CompressionFormat.naive_quantized
    return made


def scheme_of(
    spec: GridSpec | None,
    activations: Literal["int8", "fp8"] | None = None,
    static: bool = False,
    symmetric_activations: bool = True,
) -> QuantizationScheme:
    """The scheme of weights on a grid (None: weights as they are), see ``scheme``."""
    inputs = (activations, static, symmetric_activations)
    if spec is None:
        return scheme(None, "int", "channel", None, True, *inputs)
    return scheme(spec.bits, spec.type, spec.strategy, spec.group_size, spec.symmetric, *inputs)  # type: ignore[arg-type]
