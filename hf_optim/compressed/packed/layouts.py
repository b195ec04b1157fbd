"""The layouts of compressed linear layers in checkpoints: which tensors a layer has, and how to read codes from them.

- compressed-tensors: ``weight_packed`` int32 ``[out, ceil(in * bits / 32)]`` or the codes themselves as ``weight``,
  ``weight_scale``; zero points of packed layers packed along ``out``; ``weight_g_idx`` of act-order.
- GPTQ (2210.17323, as AutoGPTQ stores it): ``qweight`` int32 ``[in * bits / 32, out]``, packed along ``in``; ``qzeros``
  int32 ``[groups, out * bits / 32]``, each zero point less one (as it is in ``gptq_v2``);
  ``scales`` ``[groups, out]``; ``g_idx`` int32 ``[in]``, the group of each column.
- AWQ (2306.00978, AutoAWQ's "gemm" version): ``qweight`` int32 ``[in, out / 8]``, packed along ``out``, the columns of
  a word in the order 0, 2, 4, 6, 1, 3, 5, 7; ``qzeros`` ``[groups, out / 8]`` alike; ``scales`` ``[groups, out]``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ...toolkit.checkpoint.safetensors import FLOAT_DTYPES, TORCH_DTYPES, TensorInfo
from ..bitpacking import unpack, word_count
from ..codes import column_order, expand_groups, group_size_of, to_unsigned
from ..schemes import scheme as make_scheme
from ..weights import Codes

I32, I8, F8 = ("I32",), ("I8",), ("F8_E4M3",)
# Place of each column of eight in a word of AWQ.
AWQ_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)


@dataclass(frozen=True)
class TensorSpec:
    """A tensor that a layer must (or may) have: safetensors' names of the types allowed, and its shape."""

    types: tuple[str, ...]
    shape: tuple[int, ...]
    optional: bool = False

    def matches(self, entry: TensorInfo) -> bool:
        """Whether a tensor of a checkpoint is one of these. A single number may have no dimension."""
        return entry.type in self.types and entry.shape in (self.shape, () if self.shape == (1,) else self.shape)


def empty_meta_tensor(entry: TensorInfo, dtype: torch.dtype) -> Tensor:
    """A tensor without data, for the loader to replace by that of the checkpoint. Scales will be of ``dtype``."""
    stored = dtype if entry.type in FLOAT_DTYPES else TORCH_DTYPES[entry.type]
    return torch.empty(entry.shape, dtype=stored, device="meta")


class Layout(Protocol):
    """How one layer is stored."""

    @property
    def key(self) -> str:
        """The tensor that tells that a layer is compressed."""
        ...

    def tensor_specs(self, shape: tuple[int, int]) -> dict[str, TensorSpec]:
        """The tensors of a layer of ``[out, in]``, by local name. Raises ``ValueError`` if it cannot be stored so."""
        ...

    def read(self, parts: Mapping[str, Tensor], shape: tuple[int, int]) -> tuple[Codes, Any]:
        """The codes, and the scheme under which compressed-tensors stores them. Raises ``ValueError``."""
        ...


@dataclass(frozen=True, eq=False)
class Compressed:
    """A layer of a compressed-tensors checkpoint: its ``QuantizationScheme`` and the format of its tensors."""

    scheme: Any
    format: str

    @property
    def key(self) -> str:
        """The tensor that tells that a layer is compressed."""
        return "weight_packed" if self.format == "pack-quantized" else "weight"

    def tensor_specs(self, shape: tuple[int, int]) -> dict[str, TensorSpec]:
        args, inputs = self.scheme.weights, self.scheme.input_activations
        rows, columns = shape
        groups = _groups(columns, group_size_of(args, columns))
        scales = (1,) if args.strategy == "tensor" else (rows, groups)
        tensor_specs = {"weight_scale": TensorSpec(FLOAT_DTYPES, scales)}
        if self.key == "weight":
            tensor_specs["weight"] = TensorSpec(F8 if args.type == "float" else I8, shape)
        else:
            tensor_specs["weight_packed"] = TensorSpec(I32, (rows, word_count(columns, args.num_bits)))
            tensor_specs["weight_shape"] = TensorSpec(("I64", "I32"), (2,), optional=True)
        if not args.symmetric:
            packed = self.key == "weight_packed" and args.strategy != "tensor"
            tensor_specs["weight_zero_point"] = (
                TensorSpec(I32, (word_count(rows, args.num_bits), groups)) if packed else TensorSpec(I8, scales)
            )
        if args.strategy == "group" and args.type == "int":
            tensor_specs["weight_g_idx"] = TensorSpec(I32, (columns,), optional=True)
        if inputs is not None and not inputs.dynamic:
            tensor_specs["input_scale"] = TensorSpec(FLOAT_DTYPES, (1,))
            if not inputs.symmetric:
                tensor_specs["input_zero_point"] = TensorSpec(I8, (1,))
        return tensor_specs

    def read(self, parts: Mapping[str, Tensor], shape: tuple[int, int]) -> tuple[Codes, Any]:
        args = self.scheme.weights
        rows, columns = shape
        size = group_size_of(args, columns)
        grid = (rows, columns // size)
        codes, zero = parts.get("weight"), parts.get("weight_zero_point")
        if codes is None:
            if "weight_shape" in parts and tuple(parts["weight_shape"].tolist()) != shape:
                raise ValueError(f"weight_shape says {parts['weight_shape'].tolist()}, the model has {list(shape)}")
            codes = unpack(parts["weight_packed"], args.num_bits, columns)
        elif args.type == "int":
            codes = to_unsigned(codes, args.num_bits)
        if zero is not None:
            packed = zero.dtype == torch.int32
            zero = (
                unpack(zero.T, args.num_bits, rows).T
                if packed
                else to_unsigned(expand_groups(zero, grid), args.num_bits)
            )
        order = column_order(parts["weight_g_idx"], size) if "weight_g_idx" in parts else None
        codes = codes if order is None else codes[:, order]
        scale = expand_groups(parts["weight_scale"], grid)
        found = Codes(
            codes,
            scale,
            None if zero is None else zero.contiguous(),
            order,
            parts.get("input_scale"),
            parts.get("input_zero_point"),
        )
        return found, self.scheme


@dataclass(frozen=True)
class GPTQ:
    """A layer of a GPTQ checkpoint.

    Attributes:
        group_size: None for one group of all columns.
        zero_points_minus_one: see ``qzeros`` in the module docstring.
    """

    bits: int
    group_size: int | None
    zero_points_minus_one: bool
    key: str = "qweight"

    def tensor_specs(self, shape: tuple[int, int]) -> dict[str, TensorSpec]:
        rows, columns = shape
        groups = _groups(columns, self.group_size or columns)
        for name, count in (("input", columns), ("output", rows)):
            if count * self.bits % 32:
                raise ValueError(f"{count} {name} channels of {self.bits} bits do not fill words of 32 bits")
        return {
            "qweight": TensorSpec(I32, (word_count(columns, self.bits), rows)),
            "qzeros": TensorSpec(I32, (groups, word_count(rows, self.bits))),
            "scales": TensorSpec(FLOAT_DTYPES, (groups, rows)),
            "g_idx": TensorSpec(I32, (columns,), optional=True),
        }

    def read(self, parts: Mapping[str, Tensor], shape: tuple[int, int]) -> tuple[Codes, Any]:
        rows, columns = shape
        size = self.group_size or columns
        codes = unpack(parts["qweight"].T, self.bits, columns)
        zero = unpack(parts["qzeros"], self.bits, rows)
        if self.zero_points_minus_one:
            zero = (zero + 1) & ((1 << self.bits) - 1)
        order = column_order(parts["g_idx"], size) if "g_idx" in parts and self.group_size else None
        if order is not None:
            codes = codes[:, order]
        return _on_grid(codes, parts["scales"], zero, order, self.bits, self.group_size)


@dataclass(frozen=True)
class AWQ:
    """A layer of an AWQ checkpoint. ``group_size`` None: one group of all columns."""

    group_size: int | None
    bits: int = 4
    key: str = "qweight"

    def tensor_specs(self, shape: tuple[int, int]) -> dict[str, TensorSpec]:
        rows, columns = shape
        groups = _groups(columns, self.group_size or columns)
        if rows % 8:
            raise ValueError(f"{rows} output channels of 4 bits do not fill words of 32 bits")
        return {
            "qweight": TensorSpec(I32, (columns, rows // 8)),
            "qzeros": TensorSpec(I32, (groups, rows // 8)),
            "scales": TensorSpec(FLOAT_DTYPES, (groups, rows)),
        }

    def read(self, parts: Mapping[str, Tensor], shape: tuple[int, int]) -> tuple[Codes, Any]:
        codes, zero = (self._columns(parts[name], shape[0]) for name in ("qweight", "qzeros"))
        return _on_grid(codes.T.contiguous(), parts["scales"], zero, None, self.bits, self.group_size)

    def _columns(self, words: Tensor, count: int) -> Tensor:
        places = torch.tensor(AWQ_PLACES, device=words.device)
        return unpack(words, self.bits, count).view(len(words), -1, 8)[..., places].view(len(words), count)


def _on_grid(
    codes: Tensor, scales: Tensor, zero: Tensor, order: Tensor | None, bits: int, group_size: int | None
) -> tuple[Codes, Any]:
    """Codes with ``scales`` and ``zero`` as ``[groups, out]``, and a scheme for them."""
    symmetric = bool((zero == 2 ** (bits - 1)).all())
    found = Codes(codes, scales.T.contiguous(), None if symmetric else zero.T.contiguous(), order)
    strategy: Any = "group" if group_size else "channel"
    return found, make_scheme(bits, "int", strategy, group_size, symmetric)


def _groups(columns: int, size: int) -> int:
    if size < 1 or columns % size:
        raise ValueError(f"{columns} input channels are no multiple of the group size {size}")
    return columns // size
