"""Between codes and weights: decoding, the codes of a decoded layer, the tensors of a compressed-tensors checkpoint.

The arithmetic is that of compressed-tensors, so that what is decoded here is bit by bit what stock transformers has.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .weights import Codes

OFF_GRID = "its weight is not on the grid of its scales (changed since it was quantized?)"


@torch.no_grad()
def decode(found: Codes, bits: int, dtype: torch.dtype) -> Tensor:
    """The weight ``[out, in]`` in ``dtype``, its columns in the order of the layer's input."""
    codes, scale = found.codes, found.scale
    if scale is None:
        weight = codes.to(dtype)
    else:
        rows, columns = codes.shape
        grouped = codes.view(rows, scale.shape[1], -1).to(scale.dtype)
        if codes.dtype == torch.uint8:
            # Whole numbers up to 256: exact in every floating type from bfloat16 on.
            grouped -= 2 ** (bits - 1) if found.zero is None else found.zero[..., None].to(scale.dtype)
        weight = grouped.mul_(scale[..., None]).view(rows, columns).to(dtype)
    return weight if found.order is None else torch.empty_like(weight).index_copy_(1, found.order, weight)


def column_order(g_idx: Tensor, group_size: int) -> Tensor | None:
    """The columns sorted by their group, int64 ``[in]``, or None where they already are.

    Args:
        g_idx: ``[in]``, the group of each column.

    Raises ``ValueError`` if the groups are not of ``group_size`` columns each.
    """
    columns = len(g_idx)
    order = g_idx.long().argsort(stable=True)
    expected = torch.arange(columns, device=g_idx.device) // group_size
    if not torch.equal(g_idx.long()[order], expected):
        raise ValueError(f"its groups are not {columns // group_size} of {group_size} columns each")
    return None if torch.equal(order, torch.arange(columns, device=order.device)) else order


def expand_groups(values: Tensor, shape: tuple[int, int]) -> Tensor:
    """Scales or zero points per tensor, channel or group, as ``[out, groups]``. Raises ``ValueError``."""
    values = values.detach()
    values = values.reshape(-1, 1) if values.dim() < 2 else values
    if values.dim() != 2 or values.shape[0] not in (1, shape[0]) or values.shape[1] not in (1, shape[1]):
        raise ValueError(f"its scales are {list(values.shape)}, expected {list(shape)}")
    return values.expand(shape).contiguous()


def to_unsigned(codes: Tensor, bits: int) -> Tensor:
    """Signed codes (int8, in [-2^(bits - 1), 2^(bits - 1))) as uint8 from zero on."""
    return (codes.to(torch.int16) + 2 ** (bits - 1)).to(torch.uint8)


def to_signed(codes: Tensor, bits: int) -> Tensor:
    """Inverse of ``to_unsigned``."""
    return (codes.to(torch.int16) - 2 ** (bits - 1)).to(torch.int8)


def group_size_of(args: Any, columns: int) -> int:
    """Columns that share a scale, of compressed-tensors' ``QuantizationArgs``."""
    return int(args.group_size) if args.strategy == "group" else columns


@torch.no_grad()
def recover_codes(module: nn.Module) -> Codes:
    """The codes of a layer in the decoded state of ``quantized``. Raises ``ValueError`` if its weight left their grid.

    They are recovered in float32, as when such a layer is saved, and must decode to the weight bit by bit.
    """
    from compressed_tensors.quantization.lifecycle.forward import quantize

    scheme: Any = module.quantization_scheme
    args, weight = scheme.weights, module.get_parameter("weight").detach()
    rows, columns = weight.shape
    size = group_size_of(args, columns)
    g_idx = getattr(module, "weight_g_idx", None)
    order = None if g_idx is None else column_order(g_idx, size)
    scale: Any = module.weight_scale
    point: Any = None if args.symmetric else module.weight_zero_point
    shape = (rows, columns // size)
    ordered = weight if order is None else weight[:, order]
    kind = torch.float8_e4m3fn if args.type == "float" else torch.int8
    codes = quantize(x=ordered.float(), scale=scale.float(), zero_point=point, args=args, dtype=kind)
    zero = None
    if args.type == "int":
        codes = to_unsigned(codes, args.num_bits)
        zero = None if point is None else to_unsigned(expand_groups(point, shape), args.num_bits)
    inputs = {key: getattr(module, name, None) for key, name in INPUTS.items()}
    found = Codes(codes, expand_groups(scale, shape), zero, order, **{k: _data(v) for k, v in inputs.items()})
    if not torch.equal(decode(found, args.num_bits, weight.dtype), weight):
        raise ValueError(OFF_GRID)
    return found


INPUTS = {"input_scale": "input_scale", "input_zero": "input_zero_point"}


def _data(value: Tensor | None) -> Tensor | None:
    return None if value is None else value.detach()


def scale_tensors(found: Codes, scheme: Any) -> dict[str, Tensor]:
    """``weight_scale`` and ``weight_zero_point`` as the decoded state and the checkpoint have them."""
    args = scheme.weights
    assert found.scale is not None
    parts = {"weight_scale": _narrow(found.scale, args)}
    if not args.symmetric:
        zero = torch.full_like(found.scale, 2 ** (args.num_bits - 1)) if found.zero is None else found.zero
        parts["weight_zero_point"] = _narrow(to_signed(zero, args.num_bits), args)
    return parts


def _narrow(values: Tensor, args: Any) -> Tensor:
    return values[0, :1].clone() if args.strategy == "tensor" else values


def checkpoint_tensors(found: Codes, scheme: Any) -> dict[str, Tensor]:
    """The weight of a layer as a compressed-tensors checkpoint has it, by local name. ``found.order`` must be None."""
    args = scheme.weights
    parts = scale_tensors(found, scheme)
    codes = found.codes if args.type == "float" else to_signed(found.codes, args.num_bits)
    if scheme.format != "pack-quantized":
        return {"weight": codes, **parts}
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    if "weight_zero_point" in parts and args.strategy in ("group", "channel"):
        parts["weight_zero_point"] = pack_to_int32(parts["weight_zero_point"], args.num_bits, packed_dim=0)
    packed = pack_to_int32(codes, args.num_bits)
    return {"weight_packed": packed, "weight_shape": torch.tensor(codes.shape), **parts}


def is_sparse24(matrix: Tensor) -> bool:
    """Whether of every four neighbouring columns of ``[out, in]`` two at least are zero."""
    if matrix.shape[1] % 4 or matrix.numel() == 0:
        return False
    return bool((matrix.ne(0).view(-1, 4).sum(1) <= 2).all())


def store_arguments(found: Codes, scheme: Any) -> Mapping[str, Any]:
    """The arguments of ``quantized.store`` that bring a layer to these codes."""
    args = scheme.weights
    codes = found.codes if args.type == "float" else to_signed(found.codes, args.num_bits)
    parts = scale_tensors(found, scheme)
    return {
        "codes": codes,
        "scale": parts["weight_scale"],
        "zero_point": parts.get("weight_zero_point"),
        "input_scale": found.input_scale,
        "input_zero_point": found.input_zero,
    }
