"""Conversions between codes and weights: decoding, recovering codes, and the tensors of a checkpoint.

The arithmetic is that of compressed-tensors, so that decoded weights are bitwise identical to those of stock
transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .float4 import (
    GLOBAL,
    decode_float4,
    float4_format,
    holds_float4,
    recover_float4,
    state_tensors,
    stored_tensors,
)
from .weights import Codes

if TYPE_CHECKING:
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

# Numbers that are checked for the 2:4 pattern at once.
CHUNK = 1 << 22
OFF_GRID = "its weight is not on the grid of its scales (changed since it was quantized?)"


@torch.no_grad()
def decode(codes: Codes, bits: int, dtype: torch.dtype) -> Tensor:
    """Decode the weight ``[out, in]`` in ``dtype``, with its columns in the order of the layer's input."""
    values, scale = codes.codes, codes.scale
    if holds_float4(codes):
        return decode_float4(codes, dtype)
    if scale is None:
        weight = values.to(dtype)
    else:
        rows, columns = values.shape
        grouped = values.view(rows, scale.shape[1], -1).to(scale.dtype)
        if values.dtype == torch.uint8:
            # Integers up to 256 are exact in bfloat16 and every wider floating-point dtype.
            grouped -= 2 ** (bits - 1) if codes.zero is None else codes.zero[..., None].to(scale.dtype)
        weight = grouped.mul_(scale[..., None]).view(rows, columns).to(dtype)
    return weight if codes.order is None else torch.empty_like(weight).index_copy_(1, codes.order, weight)


def column_order(g_idx: Tensor, group_size: int) -> Tensor | None:
    """Return the columns sorted by group, int64 ``[in]``, or None if they already are.

    Args:
        g_idx: ``[in]``, the group of each column.
        group_size: columns per group.

    Raises ``ValueError`` if the groups do not have ``group_size`` columns each.
    """
    columns = len(g_idx)
    order = g_idx.long().argsort(stable=True)
    expected = torch.arange(columns, device=g_idx.device) // group_size
    if not torch.equal(g_idx.long()[order], expected):
        raise ValueError(f"its groups are not {columns // group_size} of {group_size} columns each")
    return None if torch.equal(order, torch.arange(columns, device=order.device)) else order


def expand_groups(values: Tensor, shape: tuple[int, int]) -> Tensor:
    """Expand scales or zero points per tensor, channel or group to ``shape`` = ``[out, groups]``.

    Raises ``ValueError`` if their shape is none of these.
    """
    values = values.detach()
    values = values.reshape(-1, 1) if values.dim() < 2 else values
    if values.dim() != 2 or values.shape[0] not in (1, shape[0]) or values.shape[1] not in (1, shape[1]):
        raise ValueError(f"its scales are {list(values.shape)}, expected {list(shape)}")
    return values.expand(shape).contiguous()


def to_unsigned(codes: Tensor, bits: int) -> Tensor:
    """Shift signed codes (int8, in [-2^(bits - 1), 2^(bits - 1))) to uint8 in [0, 2^bits)."""
    return (codes.to(torch.int16) + 2 ** (bits - 1)).to(torch.uint8)


def to_signed(codes: Tensor, bits: int) -> Tensor:
    """Invert ``to_unsigned``."""
    return (codes.to(torch.int16) - 2 ** (bits - 1)).to(torch.int8)


def group_size_of(args: QuantizationArgs, columns: int) -> int:
    """Return the number of columns that share a scale, for a weight with ``columns`` columns."""
    return int(args.group_size) if args.strategy in ("group", "tensor_group") else columns


@torch.no_grad()
def recover_codes(module: nn.Module) -> Codes:
    """Recover the codes of a layer in the decoded state (see ``state``).

    They are recovered in float32, as when such a layer is saved, and must decode to its weight, bit-exact. Raises
    ``ValueError`` if they do not, since the weight has left its grid.
    """
    from compressed_tensors.quantization.lifecycle.forward import quantize

    scheme: Any = module.quantization_scheme
    args, weight = scheme.weights, module.get_parameter("weight").detach()
    rows, columns = weight.shape
    if float4_format(args):
        found = recover_float4(weight, module.get_parameter("weight_scale"), getattr(module, GLOBAL, None), args)
        if not torch.equal(decode(found, args.num_bits, weight.dtype), weight):
            raise ValueError(OFF_GRID)
        return found
    size = group_size_of(args, columns)
    g_idx = getattr(module, "weight_g_idx", None)
    order = None if g_idx is None else column_order(g_idx, size)
    scale: Any = module.weight_scale
    zero_point: Any = None if args.symmetric else module.weight_zero_point
    grid = (rows, columns // size)
    ordered = weight if order is None else weight[:, order]
    dtype = torch.float8_e4m3fn if args.type == "float" else torch.int8
    values = quantize(x=ordered.float(), scale=scale.float(), zero_point=zero_point, args=args, dtype=dtype)
    zero = None
    if args.type == "int":
        values = to_unsigned(values, args.num_bits)
        zero = None if zero_point is None else to_unsigned(expand_groups(zero_point, grid), args.num_bits)
    codes = Codes(
        values,
        expand_groups(scale, grid),
        zero,
        order,
        input_scale=_detached(module, "input_scale"),
        input_zero=_detached(module, "input_zero_point"),
    )
    if not torch.equal(decode(codes, args.num_bits, weight.dtype), weight):
        raise ValueError(OFF_GRID)
    return codes


def _detached(module: nn.Module, name: str) -> Tensor | None:
    value = getattr(module, name, None)
    return None if value is None else value.detach()


def scale_tensors(codes: Codes, scheme: QuantizationScheme) -> dict[str, Tensor]:
    """Return ``weight_scale`` and ``weight_zero_point`` in the shapes of the decoded state and the checkpoint."""
    args = scheme.weights
    if holds_float4(codes):
        return state_tensors(codes)
    assert codes.scale is not None
    tensors = {"weight_scale": _per_tensor(codes.scale, args)}
    if not args.symmetric:
        zero = torch.full_like(codes.scale, 2 ** (args.num_bits - 1)) if codes.zero is None else codes.zero
        tensors["weight_zero_point"] = _per_tensor(to_signed(zero, args.num_bits), args)
    return tensors


def _per_tensor(values: Tensor, args: QuantizationArgs) -> Tensor:
    """Return the single value ``[1]`` of ``values`` for the strategy ``tensor``, otherwise ``values``."""
    return values[0, :1].clone() if args.strategy == "tensor" else values


def checkpoint_tensors(codes: Codes, scheme: QuantizationScheme) -> dict[str, Tensor]:
    """Return the tensors of a layer in a compressed-tensors checkpoint, by local name. ``codes.order`` must be None."""
    args = scheme.weights
    if holds_float4(codes):
        return stored_tensors(codes, args)
    tensors = scale_tensors(codes, scheme)
    values = _stored_values(codes, args)
    if scheme.format != "pack-quantized":
        return {"weight": values, **tensors}
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    if "weight_zero_point" in tensors and args.strategy in ("group", "channel"):
        tensors["weight_zero_point"] = pack_to_int32(tensors["weight_zero_point"], args.num_bits, packed_dim=0)
    packed = pack_to_int32(values, args.num_bits)
    return {"weight_packed": packed, "weight_shape": torch.tensor(values.shape), **tensors}


def _stored_values(codes: Codes, args: QuantizationArgs) -> Tensor:
    """Return the codes as compressed-tensors has them: float8, or signed integers."""
    return codes.codes if args.type == "float" else to_signed(codes.codes, args.num_bits)


def is_sparse24(matrix: Tensor) -> bool:
    """Return True if at least two of every four adjacent columns of ``[out, in]`` are zero."""
    if matrix.shape[1] % 4 or matrix.numel() == 0:
        return False
    # In chunks: a dense weight fails in the first one, so that the check takes little time and memory.
    chunks = matrix.split(max(1, CHUNK // matrix.shape[1]))
    return all(bool((chunk.ne(0).reshape(-1, 4).sum(1) <= 2).all()) for chunk in chunks)


def store_arguments(codes: Codes, scheme: QuantizationScheme) -> Mapping[str, Any]:
    """Return the arguments of ``state.store`` that put a layer into the state of these codes."""
    if holds_float4(codes):
        return {"codes": codes.codes, "scale": codes.scale, "global_scale": codes.global_scale}
    tensors = scale_tensors(codes, scheme)
    return {
        "codes": _stored_values(codes, scheme.weights),
        "scale": tensors["weight_scale"],
        "zero_point": tensors.get("weight_zero_point"),
        "input_scale": codes.input_scale,
        "input_zero_point": codes.input_zero,
    }
