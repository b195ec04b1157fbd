"""Layers that hold their weight as codes of one small codebook, and a few outliers unquantized.

``W[n, k] = centroids[code[n, k]]``, except for the outliers. The codes of a row are packed without gaps, eight of them
in ``bits`` bytes. This file is stored beside checkpoints, so it imports only torch and transformers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from hf_optim.toolkit.modules import ReplacedModules

# A larger layer is decoded and multiplied in parts, so that its dense weight never exists as a whole.
MOST_DECODED = 1 << 26


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Pack codes uint8 ``[out, in]`` in [0, 2^bits) into bytes ``[out, ceil(in / 8) * bits]``, lowest bits first."""
    rows, columns = codes.shape
    eights = F.pad(codes, (0, -columns % 8)).view(rows, -1, 8)
    flags = (eights[..., None] >> torch.arange(bits, dtype=torch.uint8, device=codes.device)) & 1
    shifts = torch.arange(8, dtype=torch.uint8, device=codes.device)
    return (flags.view(rows, -1, bits, 8) << shifts).sum(-1, dtype=torch.uint8).view(rows, -1)


def several(bits: int) -> int:
    """Return how many neighbouring codes one table lookup decodes: as many as fit into a byte, a divisor of eight."""
    return {2: 4, 3: 2, 4: 2}.get(bits, 1)


def unpack_codes(packed: Tensor, bits: int, columns: int, together: int = 1) -> Tensor:
    """Unpack codes, ``together`` (1, 2, 4 or 8) in one number, the first in the lowest bits.

    Returns ``[out, ceil(in / together)]``, int32 (int64 for more than 3 bits per code), or uint8 if a byte is a number.
    """
    if together * bits == 8:
        return packed[:, : -(-columns // together)]
    rows = packed.shape[0]
    kind = torch.int32 if bits <= 3 else torch.int64
    groups = packed.view(rows, -1, bits)
    words = groups[..., 0].to(kind)
    for byte in range(1, bits):
        words |= groups[..., byte].to(kind) << (8 * byte)
    width = together * bits
    shifts = torch.arange(0, 8 * bits, width, dtype=kind, device=packed.device)
    numbers = (words[..., None] >> shifts) & ((1 << width) - 1)
    return numbers.view(rows, -1)[:, : -(-columns // together)]


class Coded(nn.Module):
    """A matrix as codes and outliers.

    Attributes:
        shape: ``(out, in)``.
        packed: uint8 ``[out, ceil(in / 8) * bits]``, see ``pack_codes``.
        centroids: ``[2^bits]``, in the dtype in which the layer computes.
        outliers: ``[outliers]``, in that dtype, row after row.
        outlier_counts: ``[out]``, how many outliers each row has; int16 if the row has less than 2^15 columns.
        outlier_columns: ``[outliers]``, in the same dtype.
    """

    holds_codes = True
    codes_buffer = "packed"
    packed: Tensor
    centroids: Tensor
    outliers: Tensor
    outlier_counts: Tensor
    outlier_columns: Tensor

    def __init__(
        self, shape: tuple[int, int], bits: int, outliers: int, dtype: torch.dtype, device: Any = None
    ) -> None:
        super().__init__()
        self.shape, self.bits = shape, bits
        index = torch.int16 if shape[1] < 1 << 15 else torch.int32
        made = {
            "packed": ((shape[0], -(-shape[1] // 8) * bits), torch.uint8),
            "centroids": ((2**bits,), dtype),
            "outliers": ((outliers,), dtype),
            "outlier_counts": ((shape[0],), index),
            "outlier_columns": ((outliers,), index),
        }
        for name, (size, kind) in made.items():
            self.register_buffer(name, torch.zeros(size, dtype=kind, device=device))

    @torch.no_grad()
    def fill(self, weight: Tensor, codes: Tensor, centroids: Tensor, outlying: Tensor) -> None:
        """Store codes (uint8 ``[out, in]``), centroids, and the values of ``weight`` where ``outlying`` (bool)."""
        self.packed.copy_(self.pack(codes.masked_fill(outlying, 0)))
        self.centroids.copy_(centroids)
        self.outliers.copy_(weight[outlying])
        self.outlier_counts.copy_(outlying.sum(1))
        self.outlier_columns.copy_(outlying.nonzero()[:, 1])

    def pack(self, codes: Tensor) -> Tensor:
        """Return ``packed`` for these codes, uint8 ``[out, in]``."""
        return pack_codes(codes, self.bits)

    def codes(self) -> Tensor:
        """Return the codes, uint8 ``[out, in]``; 0 at the outliers."""
        return unpack_codes(self.packed, self.bits, self.shape[1]).to(torch.uint8)

    def outlier_rows(self) -> Tensor:
        """Return the row of each outlier, int64 ``[outliers]``."""
        rows = torch.arange(self.shape[0], device=self.packed.device)
        return torch.repeat_interleave(rows, self.outlier_counts.long(), output_size=len(self.outliers))

    def decode(self, first: int = 0, last: int | None = None) -> Tensor:
        """Decode the rows ``first`` to ``last`` of the matrix: ``[rows, in]``."""
        last = self.shape[0] if last is None else last
        together = several(self.bits)
        numbers = unpack_codes(self.packed[first:last], self.bits, self.shape[1], together)
        width = torch.arange(2 ** (together * self.bits), device=self.packed.device)[:, None]
        place = torch.arange(0, together * self.bits, self.bits, device=self.packed.device)
        table = self.centroids[(width >> place) & (2**self.bits - 1)]
        values = F.embedding(numbers if numbers.dtype == torch.int64 else numbers.int(), table)
        values = values.view(last - first, -1)[:, : self.shape[1]]
        rows, columns, outliers = self.outlier_rows(), self.outlier_columns.long(), self.outliers
        if last - first < self.shape[0]:
            inside = (rows >= first) & (rows < last)
            rows, columns, outliers = rows[inside] - first, columns[inside], outliers[inside]
        return values.index_put_((rows, columns), outliers)

    def extra_repr(self) -> str:
        return f"{self.shape[1]}, {self.shape[0]}, bits={self.bits}, outliers={len(self.outliers)}"


class GoboLinear(Coded):
    """``y = x W^T + bias``. ``transposed``: it replaces a ``Conv1D``, whose weight is ``[in, out]``."""

    bias: nn.Parameter | None

    def __init__(
        self,
        shape: tuple[int, int],
        bits: int,
        outliers: int,
        bias: nn.Parameter | None,
        transposed: bool,
        dtype: torch.dtype,
        device: Any = None,
    ) -> None:
        super().__init__(shape, bits, outliers, dtype, device)
        self.out_features, self.in_features, self.transposed = shape[0], shape[1], transposed
        self.register_parameter("bias", bias)

    @property
    def weight(self) -> Tensor:
        """The weight of the stock layer, decoded at every access. Writing into it has no effect."""
        weight = self.decode()
        return nn.Parameter(weight.T if self.transposed else weight, requires_grad=False)

    def forward(self, input: Tensor) -> Tensor:
        """Map ``input`` ``[..., in]`` to ``[..., out]``."""
        step = max(1, MOST_DECODED // max(1, self.shape[1]))
        if self.shape[0] <= step:
            return F.linear(input, self.decode(), self.bias)
        parts = []
        for first in range(0, self.shape[0], step):
            last = min(first + step, self.shape[0])
            parts.append(
                F.linear(input, self.decode(first, last), None if self.bias is None else self.bias[first:last])
            )
        return torch.cat(parts, -1)

    def to_dense(self) -> tuple[nn.Module, bool]:
        """Return the stock layer of the same weight, and True: it computes the same."""
        with torch.device("meta"):
            made = Conv1D(*self.shape) if self.transposed else nn.Linear(*self.shape[::-1], bias=self.bias is not None)
        made.weight = nn.Parameter(self.weight.detach().contiguous())
        if self.bias is not None:
            made.bias = self.bias
        return made.train(self.training), True


class GoboEmbedding(Coded):
    """A table of vectors, one per row, decoded on lookup. No row has more than ``most`` outliers."""

    def __init__(
        self,
        shape: tuple[int, int],
        bits: int,
        outliers: int,
        most: int,
        padding_idx: int | None,
        dtype: torch.dtype,
        device: Any = None,
    ) -> None:
        super().__init__(shape, bits, outliers, dtype, device)
        self.num_embeddings, self.embedding_dim = shape
        self.most, self.padding_idx = most, padding_idx

    @property
    def weight(self) -> Tensor:
        """The table, decoded at every access. Writing into it has no effect."""
        return nn.Parameter(self.decode(), requires_grad=False)

    def forward(self, input: Tensor) -> Tensor:
        """Map ``input`` ``[...]``, integers in [0, num_embeddings), to ``[..., embedding_dim]``."""
        ids, columns = input.reshape(-1).long(), self.shape[1]
        codes = unpack_codes(self.packed[ids], self.bits, columns).long()
        values = self.centroids[codes]
        # The outliers of a row are neighbours.
        count = self.outlier_counts.long()
        end = count.cumsum(0)[ids]
        begin = end - count[ids]
        for step in range(self.most):
            at = (begin + step).clamp(max=len(self.outliers) - 1)
            column = self.outlier_columns[at].long()[:, None]
            value = torch.where((begin + step < end)[:, None], self.outliers[at][:, None], values.gather(1, column))
            values.scatter_(1, column, value)
        return values.view(*input.shape, columns)

    def to_dense(self) -> tuple[nn.Module, bool]:
        """Return the stock table of the same weight, and True: it computes the same."""
        weight = self.decode()
        made = nn.Embedding(*self.shape, padding_idx=self.padding_idx, _weight=weight)
        return made.train(self.training), True


def coded_like(module: nn.Module, bits: int, outliers: int, most: int) -> GoboLinear | GoboEmbedding:
    """Return an empty codebook layer in place of a linear layer or an embedding; a bias is shared.

    No row has more than ``most`` of the ``outliers``.
    """
    weight: Any = module.weight
    about = {"dtype": weight.dtype, "device": weight.device}
    if isinstance(module, nn.Embedding):
        return GoboEmbedding(tuple(weight.shape), bits, outliers, most, module.padding_idx, **about)
    transposed = isinstance(module, Conv1D)
    shape = tuple(weight.shape[::-1] if transposed else weight.shape)
    return GoboLinear(shape, bits, outliers, module.bias, transposed, **about)  # type: ignore[arg-type]


class GoboModules(ReplacedModules):
    """Base of a model class in which the modules named in ``config.gobo`` hold codes."""

    replaced_field = "gobo"

    def replacement(self, module: nn.Module, entry: Any, field: dict[str, Any]) -> nn.Module:
        return coded_like(module, entry["bits"], entry["outliers"], entry["most"])
