"""Quantized values of one module: packing, dequantization and checks through compressed-tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..errors import ModelError
from .float4 import float4_format, pack_float4

if TYPE_CHECKING:
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme


def pack(local: Mapping[str, torch.Tensor], scheme: QuantizationScheme) -> dict[str, torch.Tensor] | None:
    """Compress the tensors of one module; return None if decompressing them does not reproduce its weight.

    Tensors on the meta device have no values to compare.

    Args:
        local: the tensors of the module, by local name.
        scheme: its quantization scheme.
    """
    if scheme.weights is None:
        return dict(local)
    if "weight_g_idx" in local:
        return None
    if float4_format(scheme.weights):
        return pack_float4(local, scheme)
    from compressed_tensors.compressors import BaseCompressor

    compressor = BaseCompressor.get_value_from_registry(str(getattr(scheme.format, "value", scheme.format)))
    wide = {key: value.float() if key in ("weight", "weight_scale") else value for key, value in local.items()}
    packed = compressor.compress(wide, scheme)
    packed["weight_scale"] = local["weight_scale"]
    if local["weight"].is_meta:
        return packed
    decoded = compressor.decompress(packed, scheme)["weight"]
    return packed if torch.equal(decoded, local["weight"]) else None


def check_fit(
    weight: torch.Tensor,
    scheme: QuantizationScheme,
    codes: torch.Tensor | None,
    scale: torch.Tensor | None,
    zero_point: torch.Tensor | None,
) -> None:
    """Raise ``ModelError`` unless codes and scales fit ``scheme`` and a weight ``[out, in]``."""
    args = scheme.weights
    if codes is None or scale is None or (zero_point is None) != bool(args.symmetric):
        raise ModelError(
            "quantized weights need codes and scales, and a zero point if and only if the grid is asymmetric"
        )
    rows, columns = weight.shape
    shape: tuple[int, ...] = {"tensor": (1,), "channel": (rows, 1)}.get(args.strategy, ())
    if args.strategy == "group":
        shape = (rows, columns // args.group_size)
    if codes.shape != weight.shape or scale.shape != shape:
        raise ModelError(
            f"codes {tuple(codes.shape)} and scale {tuple(scale.shape)} do not fit a weight of {rows} x {columns} "
            f"with strategy {args.strategy}: the scale must be {shape}"
        )
    if not torch.equal(scale.to(weight.dtype).to(scale.dtype), scale):
        raise ModelError(f"the scale is not exact in the weight's dtype {weight.dtype}; round it before quantizing")


def dequantize(
    codes: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor | None,
    args: QuantizationArgs,
    like: torch.Tensor,
) -> torch.Tensor:
    """Return the values of codes in the dtype of ``like``, as stock transformers has them after loading."""
    from compressed_tensors.quantization.lifecycle import forward

    zero_point = None if zero_point is None else zero_point.to(like.device)
    return forward.dequantize(x_q=codes.to(like.device), scale=scale.to(like), zero_point=zero_point, args=args)


class _StraightThrough(torch.autograd.Function):
    """Return the value of the second argument with the gradient of the first."""

    @staticmethod
    def forward(ctx: Any, inputs: torch.Tensor, quantized: torch.Tensor) -> torch.Tensor:
        return quantized.view_as(quantized)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradients[0], None


def quantize_input(module: nn.Module, input: torch.Tensor) -> torch.Tensor:
    """Quantize the input of a layer as its scheme specifies; gradients pass straight through."""
    from compressed_tensors.quantization.lifecycle.forward import forward_quantize

    quantized = forward_quantize(module, input, "input", scheme_on(module).input_activations)
    return _StraightThrough.apply(input, quantized) if torch.is_grad_enabled() and input.requires_grad else quantized


def scheme_on(module: nn.Module) -> Any:
    """Return the ``QuantizationScheme`` of a module in the quantized state, else None."""
    return getattr(module, "quantization_scheme", None)
