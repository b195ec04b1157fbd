"""Layers with weights of 4-bit floats, as compressed-tensors stores and decodes them: NVFP4 and MXFP4.

A checkpoint has ``weight_packed`` uint8 ``[out, in / 2]``, two e2m1 patterns to a byte, that of the even column in the
low half; ``weight_scale`` ``[out, groups]``, e4m3 in groups of 16 or e8m0 (as uint8) in groups of 32; and of NVFP4
``weight_global_scale``, float32 ``[1]``, by which scales are divided. Stock transformers decodes ``number * (scale /
global)`` to bfloat16, whatever the dtype of the model, and so do the functions here. In the decoded state a layer has
``weight_scale`` in bfloat16, which holds every scale exactly, and ``weight_global_scale``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import ModelError
from ..toolkit.quantization import float4
from .weights import Codes

if TYPE_CHECKING:
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

STOCK_DTYPE = torch.bfloat16
FORMATS = {"nvfp4": "nvfp4-pack-quantized", "mxfp4": "mxfp4-pack-quantized"}
GLOBAL = "weight_global_scale"


def float4_format(args: QuantizationArgs | None) -> str:
    """Return ``"nvfp4"`` or ``"mxfp4"`` for weights of such a format, otherwise ``""``."""
    if args is None or args.type != "float" or args.num_bits != 4 or not args.symmetric:
        return ""
    if args.strategy == "tensor_group":
        return "nvfp4" if args.group_size == 16 else ""
    return "mxfp4" if args.strategy == "group" and args.group_size == 32 else ""


def holds_float4(codes: Codes) -> bool:
    """Return True if codes are patterns of 4-bit floats, whose scales are 8-bit floats."""
    return codes.scale is not None and codes.scale.dtype in (float4.E4M3, float4.E8M0)


@torch.no_grad()
def decode_float4(codes: Codes, dtype: torch.dtype) -> Tensor:
    """Decode the weight ``[out, in]`` as stock transformers does: rounded to bfloat16, then in ``dtype``."""
    rows, columns = codes.codes.shape
    scale = factors(codes)
    numbers = float4.to_numbers(codes.codes).view(rows, scale.shape[1], -1)
    return numbers.mul_(scale[..., None]).view(rows, columns).to(STOCK_DTYPE).to(dtype)


def factors(codes: Codes) -> Tensor:
    """Return what the numbers of each group are multiplied with, float32 ``[out, groups]``."""
    assert codes.scale is not None
    scale = codes.scale.float()
    return scale if codes.global_scale is None else scale / codes.global_scale


def read_float4(tensors: Mapping[str, Tensor], args: QuantizationArgs) -> Codes:
    """Return the codes of the tensors of a layer in a checkpoint. Raises ``ValueError`` for scales that are NaN."""
    packed, scale, shared = tensors["weight_packed"], tensors["weight_scale"], tensors.get(GLOBAL)
    patterns = torch.stack((packed & 15, packed >> 4), dim=-1).view(len(packed), -1)
    scale = scale.view(float4.E8M0 if float4_format(args) == "mxfp4" else float4.E4M3)
    return checked(Codes(patterns, scale, None, global_scale=None if shared is None else spread(shared, len(packed))))


def checked(codes: Codes) -> Codes:
    """Return codes of 4-bit floats. Raises ``ValueError`` if a scale is NaN, or the global scale is not positive."""
    assert codes.scale is not None
    if bool(codes.scale.float().isnan().any()):
        raise ValueError("a weight_scale is NaN")
    shared = codes.global_scale
    if shared is not None and not bool((torch.isfinite(shared) & (shared > 0)).all()):
        raise ValueError(f"{GLOBAL} is not a positive number")
    return codes


def spread(shared: Tensor, rows: int) -> Tensor:
    """Return a global scale, one number, as the column ``[out, 1]`` of ``Codes.global_scale``."""
    return shared.detach().float().reshape(1, 1).expand(rows, 1).contiguous()


def stored_tensors(codes: Codes, args: QuantizationArgs) -> dict[str, Tensor]:
    """Return the tensors of a layer in a checkpoint, by local name."""
    assert codes.scale is not None
    low, high = codes.codes.view(len(codes.codes), -1, 2).unbind(-1)
    scale = codes.scale if codes.scale.dtype == float4.E4M3 else codes.scale.view(torch.uint8)
    found = {"weight_packed": low | (high << 4), "weight_scale": scale}
    return found if codes.global_scale is None else {**found, GLOBAL: codes.global_scale[0].clone()}


def state_tensors(codes: Codes) -> dict[str, Tensor]:
    """Return the scales of a layer in the decoded state, by local name."""
    assert codes.scale is not None
    found = {"weight_scale": codes.scale.to(STOCK_DTYPE)}
    return found if codes.global_scale is None else {**found, GLOBAL: codes.global_scale[0].clone()}


def from_grid(codes: Tensor, scale: Tensor, shared: Tensor | None, args: QuantizationArgs) -> Codes:
    """Return ``Codes`` of doubled numbers and half scales, as a ``Grid`` of the toolkit has them.

    Args:
        codes: ``[out, in]``, any dtype.
        scale: ``[out, groups]``.
        shared: ``[1]``, the global scale of NVFP4.
        args: of the weights.
    """
    g = None if shared is None else float(shared)
    stored = float4.stored_scale(scale, float4_format(args), g)
    column = None if shared is None else spread(shared, len(codes))
    return Codes(float4.to_patterns(codes), stored, None, global_scale=column)


@torch.no_grad()
def recover_float4(weight: Tensor, scale: Tensor, shared: Tensor | None, args: QuantizationArgs) -> Codes:
    """Recover the codes of a decoded weight: those nearest to ``weight / (scale / global)``, with the sign of zeros.

    The caller compares what they decode to. A group whose scale is 0 decodes to zeros, whatever its codes were.

    Args:
        weight: ``[out, in]``, any float dtype.
        scale, shared: of the decoded state.
        args: of the weights.
    """
    mx = float4_format(args) == "mxfp4"
    wide = scale.detach().float()
    stored = (torch.frexp(wide).exponent + 126).to(torch.uint8).view(float4.E8M0) if mx else wide.to(float4.E4M3)
    found = Codes(weight, stored, None, global_scale=None if shared is None else spread(shared, len(weight)))
    factor = factors(found).double()[..., None]
    parts = weight.detach().double().view(len(weight), scale.shape[1], -1)
    doubled = torch.where(factor > 0, 2 * parts / factor, torch.copysign(torch.zeros_like(parts), parts))
    patterns = float4.to_patterns(float4.round_doubled(doubled.clamp(-float4.LARGEST, float4.LARGEST)))
    return Codes(patterns.view(weight.shape), stored, None, global_scale=found.global_scale)


def pack_float4(local: Mapping[str, Tensor], scheme: QuantizationScheme) -> dict[str, Tensor] | None:
    """Return the checkpoint tensors of a layer in the decoded state; None if its weight has left its grid."""
    args, weight = scheme.weights, local["weight"]
    rest = {key: value for key, value in local.items() if key not in ("weight", "weight_scale", GLOBAL)}
    if weight.is_meta:
        rows, columns = weight.shape
        scale = torch.uint8 if float4_format(args) == "mxfp4" else float4.E4M3
        made = {
            "weight_packed": weight.new_empty(rows, columns // 2, dtype=torch.uint8),
            "weight_scale": weight.new_empty(rows, columns // args.group_size, dtype=scale),
        }
        if float4_format(args) == "nvfp4":
            made[GLOBAL] = weight.new_empty(1, dtype=torch.float32)
        return {**rest, **made}
    found = recover_float4(weight, local["weight_scale"], local.get(GLOBAL), args)
    if not torch.equal(decode_float4(found, weight.dtype), weight):
        return None
    return {**rest, **stored_tensors(found, args)}


def require_fit(weight: Tensor, codes: Codes, args: QuantizationArgs) -> None:
    """Raise ``ModelError`` unless codes and scales fit a weight ``[out, in]``."""
    rows, columns = weight.shape
    wanted = (rows, columns // args.group_size)
    if columns % args.group_size or codes.codes.shape != weight.shape or codes.scale is None:
        raise ModelError(f"{columns} inputs are not a multiple of the {args.group_size} that share a scale")
    if tuple(codes.scale.shape) != wanted or (codes.global_scale is None) != (float4_format(args) == "mxfp4"):
        given = tuple(codes.scale.shape)
        raise ModelError(f"the scales {given} do not fit {float4_format(args)}: they must be {wanted}")


def require_stock_dtype(name: str, module: nn.Module | Any) -> None:
    """Raise ``ModelError`` unless a layer is in bfloat16: stock transformers decodes 4-bit floats to no other dtype."""
    dtype = module.weight.dtype
    if dtype != STOCK_DTYPE:
        raise ModelError(
            f"{name} is in {dtype}: stock transformers decodes 4-bit floats to bfloat16 and multiplies inputs of no "
            "other dtype with them. Load the model in bfloat16 (dtype=torch.bfloat16; --dtype bfloat16)"
        )
