"""Second moments of the inputs of linear layers: the Gram matrix ``XᵀX``, up to a factor the layer's Hessian.

For the squared error of a linear layer's output, ``‖X Wᵀ - X Ŵᵀ‖²``, the Hessian in every row of ``W`` is ``2 XᵀX``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from ..distributed import collectives
from . import gram
from .observers import InputObserver


@dataclass
class GramMatrix:
    """The Gram matrix of the inputs that one or more modules share.

    Attributes:
        total: sum over tokens of ``x xᵀ``, ``[in_features, in_features]``, in the observer's dtype.
        count: number of tokens summed.
        names: the modules that read these inputs, in execution order.
    """

    total: torch.Tensor
    count: int
    names: list[str]

    @property
    def mean(self) -> torch.Tensor:
        """The second moment ``E[x xᵀ]``, a new matrix."""
        return self.total / max(self.count, 1)


@dataclass
class _CurrentInput:
    """The input being read: the modules that read it so far, and its ``xᵀx`` unless that is already summed."""

    inputs: torch.Tensor  # kept alive, so that no other tensor can get its identity
    version: int
    names: list[str]
    product: torch.Tensor | None
    count: int


class SecondMoment(InputObserver[GramMatrix]):
    """``XᵀX`` of the inputs, summed in token order: name -> ``GramMatrix``, complete on exit of the ``with`` block.

    Modules that read the same tensor (query, key and value; gate and up) share one ``GramMatrix``, computed once.
    Sharing is detected per input by the identity of the tensor: sums are kept per set of modules, and a module that is
    in several sets gets the sum over all of them.

    ``gram`` describes how products are computed, and in what precision.

    Args:
        modules, label: see ``InputObserver``.
        dtype: dtype of the sums, float32 or float64.
        single: see ``gram.accumulate_``.
    """

    def __init__(
        self, modules: Mapping[str, nn.Module], label: str = "", dtype: torch.dtype = torch.float32,
        single: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(modules, label)
        self.dtype, self.single = dtype, single
        self._current: _CurrentInput | None = None
        self._sums: dict[tuple[str, ...], GramMatrix] = {}

    def update(self, name: str, inputs: torch.Tensor) -> None:
        current = self._current
        if current is not None and current.inputs is inputs and current.version == _version_of(inputs):
            if current.product is None:  # summed for its first module alone
                self._add((name,), self._product(name, inputs), current.count)
            else:
                current.names.append(name)
            return
        self._finish_current()
        alone = self._sums.get((name,))
        count = inputs.numel() // inputs.shape[-1]
        product: torch.Tensor | None = None
        if alone is not None:
            # The module has not shared its input before: sum in place, which saves a matrix of the largest width.
            gram.accumulate_(alone.total, _rows(inputs), self.single)
            alone.count += count
            self.check_finite(name, alone.total.diagonal())
        else:
            product = self._product(name, inputs)
        self._current = _CurrentInput(inputs, _version_of(inputs), [name], product, count)

    def release(self) -> None:
        self._finish_current()

    def reduce(self) -> None:
        place = {name: index for index, name in enumerate(self.modules)}
        names = list(self.modules)
        widths = {key: len(matrix.total) for key, matrix in self._sums.items()}
        keys = collectives.union_over_ranks([(width, *(place[name] for name in key)) for key, width in widths.items()])
        mine, self._sums = self._sums, {}
        for width, *places in keys:
            key = tuple(names[index] for index in places)
            matrix = mine.pop(key, None)
            if matrix is None:  # only other ranks have inputs that this set of modules shares
                matrix = GramMatrix(torch.zeros(width, width, dtype=self.dtype, device=self.device), 0, list(key))
            collectives.all_reduce_(matrix.total, "sum")
            matrix.count = collectives.sum_over_ranks(matrix.count)
            self._sums[key] = matrix

    def complete(self) -> None:
        combined: dict[tuple[tuple[str, ...], ...], GramMatrix] = {}
        for matrix in self._sums.values():
            gram.mirror_(matrix.total)
        for name in dict.fromkeys(name for key in self._sums for name in key):  # in execution order
            keys = tuple(key for key in self._sums if name in key)
            if keys not in combined:
                parts = [self._sums[key] for key in keys]
                total = parts[0].total if len(parts) == 1 else torch.stack([part.total for part in parts]).sum(0)
                combined[keys] = GramMatrix(total, sum(part.count for part in parts), [])
            combined[keys].names.append(name)
            self.found[name] = combined[keys]
        self._sums = {}

    def _finish_current(self) -> None:
        current, self._current = self._current, None
        if current is not None and current.product is not None:
            self._add(tuple(current.names), current.product, current.count)

    def _add(self, key: tuple[str, ...], product: torch.Tensor, count: int) -> None:
        known = self._sums.get(key)
        if known is None:
            self._sums[key] = GramMatrix(product, count, list(key))
        else:
            known.total += product
            known.count += count

    def _product(self, name: str, inputs: torch.Tensor) -> torch.Tensor:
        width = inputs.shape[-1]
        product = torch.zeros(width, width, dtype=self.dtype, device=inputs.device)
        gram.accumulate_(product, _rows(inputs), self.single)
        self.check_finite(name, product.diagonal())
        return product


def _rows(inputs: torch.Tensor) -> torch.Tensor:
    return inputs.detach().reshape(-1, inputs.shape[-1])


def _version_of(tensor: torch.Tensor) -> int:
    """Return the counter of in-place changes of a tensor; 0 for inference tensors, which have none."""
    return 0 if tensor.is_inference() else tensor._version
