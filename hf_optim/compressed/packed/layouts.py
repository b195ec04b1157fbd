"""Tensor layouts of compressed linear layers in checkpoints: the tensors of a layer, and how to read codes from them.

- compressed-tensors: ``weight_packed`` int32 ``[out, ceil(in * bits / 32)]`` or the codes themselves as ``weight``,
  ``weight_scale``; zero points of packed layers packed along ``out``; ``weight_g_idx`` of act-order. 4-bit floats as in
  ``compressed.float4``.
- GPTQ (2210.17323, as AutoGPTQ stores it): ``qweight`` int32 ``[in * bits / 32, out]``, packed along ``in``; ``qzeros``
  int32 ``[groups, out * bits / 32]``, each zero point minus one (without the offset in ``gptq_v2``);
  ``scales`` ``[groups, out]``; ``g_idx`` int32 ``[in]``, the group of each column. The last group may be smaller.
- AWQ (2306.00978, AutoAWQ's "gemm" version): ``qweight`` int32 ``[in, out / 8]``, packed along ``out``, the columns of
  a word in the order 0, 2, 4, 6, 1, 3, 5, 7; ``qzeros`` ``[groups, out / 8]`` alike; ``scales`` ``[groups, out]``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

import torch
from torch import Tensor

from ...toolkit.checkpoint.safetensors import FLOAT_DTYPES, TORCH_DTYPES, TensorInfo
from ..bitpacking import unpack, word_count
from ..codes import column_order, expand_groups, group_size_of, to_unsigned
from ..float4 import GLOBAL, float4_format, read_float4
from ..schemes import scheme as make_scheme
from ..weights import Codes

if TYPE_CHECKING:
    from compressed_tensors.quantization import QuantizationScheme

I32, I8, U8, F8 = ("I32",), ("I8",), ("U8",), ("F8_E4M3",)
Offset = Literal["none", "codes", "words"]
# The position in an AWQ word of each of its eight columns.
AWQ_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)


@dataclass(frozen=True)
class TensorSpec:
    """A required (or optional) tensor of a layer: its allowed dtypes, by their safetensors names, and its shape."""

    types: tuple[str, ...]
    shape: tuple[int, ...]
    optional: bool = False

    def matches(self, entry: TensorInfo) -> bool:
        """Return True if a tensor of a checkpoint has an allowed dtype and shape.

        ``[1]`` may be stored as ``[]``, and ``[out, 1]`` as ``[out]``.
        """
        shorter = self.shape[:-1] if self.shape[-1:] == (1,) else self.shape
        return entry.type in self.types and entry.shape in (self.shape, shorter)


def empty_meta_tensor(entry: TensorInfo, dtype: torch.dtype) -> Tensor:
    """Return a meta tensor, which the loader replaces by that of the checkpoint. Scales get ``dtype``."""
    stored = dtype if entry.type in FLOAT_DTYPES else TORCH_DTYPES[entry.type]
    return torch.empty(entry.shape, dtype=stored, device="meta")


class Layout(Protocol):
    """How a checkpoint stores one layer."""

    @property
    def key(self) -> str:
        """The local name of the tensor whose presence marks a layer as compressed."""
        ...

    def tensor_specs(self, shape: tuple[int, int]) -> dict[str, TensorSpec]:
        """Return the tensors of a layer ``[out, in]``, by local name.

        Raises ``ValueError`` if such a layer cannot be stored in this layout.
        """
        ...

    def read(self, tensors: Mapping[str, Tensor], shape: tuple[int, int]) -> tuple[Codes, QuantizationScheme]:
        """Return the codes, and the scheme under which compressed-tensors stores them.

        Args:
            tensors: the tensors of the layer, by local name.
            shape: ``[out, in]``.

        Raises ``ValueError`` if the tensors are inconsistent.
        """
        ...


@dataclass(frozen=True, eq=False)
class CompressedTensorsLayout:
    """A layer of a compressed-tensors checkpoint: its ``QuantizationScheme`` and the format of its tensors."""

    scheme: QuantizationScheme
    format: str

    @property
    def key(self) -> str:
        """The local name of the tensor whose presence marks a layer as compressed."""
        return "weight_packed" if self.format == "pack-quantized" or float4_format(self.scheme.weights) else "weight"

    def tensor_specs(self, shape: tuple[int, int]) -> dict[str, TensorSpec]:
        args, inputs = self.scheme.weights, self.scheme.input_activations
        rows, columns = shape
        groups = _groups(columns, group_size_of(args, columns))
        if kind := float4_format(args):
            found = {
                "weight_packed": TensorSpec(U8, (rows, columns // 2)),
                "weight_scale": TensorSpec(F8 if kind == "nvfp4" else U8, (rows, groups)),
            }
            return {**found, GLOBAL: TensorSpec(("F32",), (1,))} if kind == "nvfp4" else found
        scales = (1,) if args.strategy == "tensor" else (rows, groups)
        specs = {"weight_scale": TensorSpec(FLOAT_DTYPES, scales)}
        if self.key == "weight":
            specs["weight"] = TensorSpec(F8 if args.type == "float" else I8, shape)
        else:
            specs["weight_packed"] = TensorSpec(I32, (rows, word_count(columns, args.num_bits)))
            specs["weight_shape"] = TensorSpec(("I64", "I32"), (2,), optional=True)
        if not args.symmetric:
            packed = self.key == "weight_packed" and args.strategy != "tensor"
            specs["weight_zero_point"] = (
                TensorSpec(I32, (word_count(rows, args.num_bits), groups)) if packed else TensorSpec(I8, scales)
            )
        if args.strategy == "group" and args.type == "int":
            specs["weight_g_idx"] = TensorSpec(I32, (columns,), optional=True)
        if inputs is not None and not inputs.dynamic:
            specs["input_scale"] = TensorSpec(FLOAT_DTYPES, (1,))
            if not inputs.symmetric:
                specs["input_zero_point"] = TensorSpec(I8, (1,))
        return specs

    def read(self, tensors: Mapping[str, Tensor], shape: tuple[int, int]) -> tuple[Codes, QuantizationScheme]:
        args = self.scheme.weights
        rows, columns = shape
        if float4_format(args):
            return read_float4(tensors, args), self.scheme
        size = group_size_of(args, columns)
        grid = (rows, columns // size)
        codes, zero = tensors.get("weight"), tensors.get("weight_zero_point")
        if codes is None:
            if "weight_shape" in tensors and tuple(tensors["weight_shape"].tolist()) != shape:
                raise ValueError(f"weight_shape is {tensors['weight_shape'].tolist()}, the model has {list(shape)}")
            codes = unpack(tensors["weight_packed"], args.num_bits, columns)
        elif args.type == "int":
            codes = to_unsigned(codes, args.num_bits)
        if zero is not None:
            packed = zero.dtype == torch.int32
            zero = (
                unpack(zero.T, args.num_bits, rows).T
                if packed
                else to_unsigned(expand_groups(zero, grid), args.num_bits)
            )
        order = column_order(tensors["weight_g_idx"], size) if "weight_g_idx" in tensors else None
        codes = codes if order is None else codes[:, order]
        scale = expand_groups(tensors["weight_scale"], grid)
        found = Codes(
            codes,
            scale,
            None if zero is None else zero.contiguous(),
            order,
            tensors.get("input_scale"),
            tensors.get("input_zero_point"),
        )
        return found, self.scheme


@dataclass(frozen=True)
class GPTQLayout:
    """A layer of a GPTQ checkpoint.

    Attributes:
        group_size: None for one group with all columns.
        offset: how ``qzeros`` differ from the zero points: ``"none"``, by one in each code (``"codes"``, modulo
            2^bits), or by one in each code of a word (``"words"``), subtracted from the word as a whole: a zero point
            of 0 then borrows from the next code. That is what GPTQModel does with 2, 4 and 8 bits.
    """

    bits: int
    group_size: int | None
    offset: Offset
    key: str = "qweight"

    def tensor_specs(self, shape: tuple[int, int]) -> dict[str, TensorSpec]:
        rows, columns = shape
        groups = _group_count(columns, self.group_size)
        for name, count in (("input", columns), ("output", rows)):
            if count * self.bits % 32:
                raise ValueError(f"{count} {name} channels of {self.bits} bits do not fill 32-bit words")
        return {
            "qweight": TensorSpec(I32, (word_count(columns, self.bits), rows)),
            "qzeros": TensorSpec(I32, (groups, word_count(rows, self.bits))),
            "scales": TensorSpec(FLOAT_DTYPES, (groups, rows)),
            "g_idx": TensorSpec(I32, (columns,), optional=True),
        }

    def read(self, tensors: Mapping[str, Tensor], shape: tuple[int, int]) -> tuple[Codes, QuantizationScheme]:
        rows, columns = shape
        codes = unpack(tensors["qweight"].T, self.bits, columns)
        stored = tensors["qzeros"]
        if self.offset == "words" and 32 % self.bits == 0:
            ones = sum(1 << place for place in range(0, 32, self.bits))
            stored = stored + ones
        zero = unpack(stored, self.bits, rows)
        if self.offset == "codes" or (self.offset == "words" and 32 % self.bits):
            zero = (zero + 1) & ((1 << self.bits) - 1)
        order = column_order(tensors["g_idx"], self.group_size) if "g_idx" in tensors and self.group_size else None
        if order is not None:
            codes = codes[:, order]
        return _with_scheme(codes, tensors["scales"], zero, order, self.bits, self.group_size)


@dataclass(frozen=True)
class AWQLayout:
    """A layer of an AWQ checkpoint. ``group_size`` None: one group with all columns."""

    group_size: int | None
    bits: int = 4
    key: str = "qweight"

    def tensor_specs(self, shape: tuple[int, int]) -> dict[str, TensorSpec]:
        rows, columns = shape
        groups = _group_count(columns, self.group_size)
        if rows % 8:
            raise ValueError(f"{rows} output channels of 4 bits do not fill 32-bit words")
        return {
            "qweight": TensorSpec(I32, (columns, rows // 8)),
            "qzeros": TensorSpec(I32, (groups, rows // 8)),
            "scales": TensorSpec(FLOAT_DTYPES, (groups, rows)),
        }

    def read(self, tensors: Mapping[str, Tensor], shape: tuple[int, int]) -> tuple[Codes, QuantizationScheme]:
        codes, zero = (self._columns(tensors[name], shape[0]) for name in ("qweight", "qzeros"))
        return _with_scheme(codes.T.contiguous(), tensors["scales"], zero, None, self.bits, self.group_size)

    def _columns(self, words: Tensor, count: int) -> Tensor:
        places = torch.tensor(AWQ_PLACES, device=words.device)
        return unpack(words, self.bits, count).view(len(words), -1, 8)[..., places].view(len(words), count)


def _with_scheme(
    codes: Tensor, scales: Tensor, zero: Tensor, order: Tensor | None, bits: int, group_size: int | None
) -> tuple[Codes, QuantizationScheme]:
    """Return ``Codes`` from ``scales`` and ``zero`` as ``[groups, out]``, and a scheme for them.

    If the last group has fewer columns than the others, all are divided into groups of equal size.
    """
    symmetric = bool((zero == 2 ** (bits - 1)).all())
    columns = codes.shape[1]
    if group_size and columns % group_size:
        equal = math.gcd(columns, group_size)
        of = torch.arange(0, columns, equal, device=scales.device) // group_size
        scales, zero, group_size = scales[of], zero[of], equal
    found = Codes(codes, scales.T.contiguous(), None if symmetric else zero.T.contiguous(), order)
    strategy: Literal["group", "channel"] = "group" if group_size and group_size < columns else "channel"
    return found, make_scheme(bits, "int", strategy, group_size, symmetric)


def _group_count(columns: int, size: int | None) -> int:
    """Return the number of groups, of which the last may have fewer columns."""
    if size is not None and size < 1:
        raise ValueError(f"its group size is {size}")
    return 1 if size is None else -(-columns // size)


def _groups(columns: int, size: int) -> int:
    if size < 1 or columns % size:
        raise ValueError(f"{columns} input channels are not a multiple of the group size {size}")
    return columns // size
