"""Sample the tokens that reach a mixture of experts, to calibrate experts that receive too few of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ..distributed import collectives
from ..topology.experts import ExpertLinear, matrix_names
from .observers import HessianDiagonal
from .row_sample import RowSample
from .second_moment import GramMatrix

NAMED = 5  # names that a message gives


class TokenSample(RowSample):
    """A sample of the tokens that a mixture of experts reads (``RowSample``): name -> ``[n, H]``.

    The names are those of the modules with the experts (``ExpertLinear.experts_name``).

    Args:
        layers: name -> layer; only the modules of ``ExpertLinear`` layers are observed.
        label: see ``InputObserver``.
        size: None takes the largest number of inputs of a matrix of the experts.
    """

    def __init__(self, layers: Mapping[str, Any], label: str = "", size: int | None = None) -> None:
        views = [layer for layer in layers.values() if isinstance(layer, ExpertLinear)]
        sizes = {view.experts_name: size or 1 for view in views}
        for view in views if size is None else ():
            sizes[view.experts_name] = max(sizes[view.experts_name], view.in_features)
        super().__init__({view.experts_name: view.experts for view in views}, label, sizes)

    def width(self, name: str) -> int:
        experts = self.modules[name]
        return ExpertLinear(experts, name, matrix_names(experts)[0], 0).in_features


@torch.no_grad()
def augment_undersampled(
    layers: Mapping[str, Any], grams: dict[str, GramMatrix], sample: Mapping[str, Tensor]
) -> dict[str, int]:
    r"""Augment the Gram matrices of experts that received too few tokens with a sample of their layer's tokens.

    With fewer tokens than inputs the Gram matrix of a layer is singular. With ``n_e`` tokens received, ``n =
    in_features`` and a sample ``T`` of the layer's tokens, most of which the router sent to other experts::

        X_eᵀX_e  +  (n - n_e) / |T| · X_e(T)ᵀ X_e(T)

    replaces ``X_eᵀX_e``, as if the expert had received ``n - n_e`` more tokens, average ones of its layer. ``X_e(T)``
    is the input of the matrix for these tokens; for ``down_proj`` it passes through the first matrix of the same
    expert. An expert that received no token is calibrated on the sample alone.

    Args:
        layers: name -> layer; only ``ExpertLinear`` layers are considered.
        grams: the result of ``SecondMoment`` for these layers; changed in place.
        sample: the result of ``TokenSample``.

    Returns:
        Name -> number of tokens received, for the matrices that received fewer than they have inputs.
    """
    undersampled = {}
    dtypes = {matrix.total.dtype for matrix in grams.values()}
    for name, layer, seen in _undersampled(layers, {name: matrix.count for name, matrix in grams.items()}, sample):
        matrix = grams.get(name)
        rows = layer.inputs_for(sample[layer.experts_name]).to(dtypes.copy().pop() if dtypes else torch.float32)
        more = (rows.T @ rows) * ((layer.in_features - seen) / len(rows))
        total = more if matrix is None else matrix.total + more
        grams[name] = GramMatrix(total, layer.in_features, [name])
        undersampled[name] = seen
    return undersampled


def _undersampled(
    layers: Mapping[str, Any], counts: Mapping[str, int], sample: Mapping[str, Tensor]
) -> Iterator[tuple[str, ExpertLinear, int]]:
    """Yield the matrices of experts that received fewer tokens than they have inputs, and how many they received."""
    for name, layer in layers.items():
        if isinstance(layer, ExpertLinear) and layer.experts_name in sample:
            seen = counts.get(name, 0)
            if seen < layer.in_features:
                yield name, layer, seen


class InputSquares(HessianDiagonal):
    """``HessianDiagonal`` of linear layers and matrices of experts; those of experts with few tokens are augmented.

    The statistic of an expert that receives fewer tokens than the matrix has inputs is the diagonal of what
    ``augment_undersampled`` makes of its Gram matrix: as if it had received average tokens of its layer, up to that
    number.

    Attributes:
        scarce: name -> number of tokens received, of the matrices that were augmented; complete after the ``with``
            block.
    """

    def __init__(self, modules: Mapping[str, Any], label: str = "") -> None:
        super().__init__(modules, label)
        self.scarce: dict[str, int] = {}
        self._sample = TokenSample(modules, label)
        self._counts: dict[str, Tensor] = {}

    def __enter__(self) -> dict[str, Tensor]:
        self._sample.__enter__()
        return super().__enter__()

    def __exit__(self, *raised: object) -> None:
        self._sample.__exit__(*raised)
        super().__exit__(*raised)

    def update(self, name: str, inputs: Tensor) -> None:
        super().update(name, inputs)
        if isinstance(self.modules[name], ExpertLinear):
            count = torch.tensor([inputs.numel() // inputs.shape[-1]], dtype=torch.float64)
            self._counts[name] = self._counts[name] + count if name in self._counts else count

    def reduce(self) -> None:
        super().reduce()
        collectives.all_reduce_dict_(self._counts, self.modules, "sum", torch.device("cpu"))

    @torch.no_grad()
    def complete(self) -> None:
        counts = {name: int(count) for name, count in self._counts.items()}
        sample = self._sample.found
        for name, layer, seen in _undersampled(self.modules, counts, sample):
            rows = layer.inputs_for(sample[layer.experts_name]).float()
            more = rows.square().sum(0) * ((layer.in_features - seen) / len(rows))
            self.found[name] = self.found[name] + more if name in self.found else more
            self.scarce[name] = seen


def few_tokens_message(scarce: Mapping[str, int]) -> str:
    """Return the warning about matrices of experts that received few tokens: name -> how many."""
    few = ", ".join(f"{name} ({count})" for name, count in list(scarce.items())[:NAMED])
    return (
        f"{len(scarce)} matrices of experts saw fewer tokens than they have inputs, and were also calibrated on tokens "
        "that the router sent to other experts; use more calibration data to avoid this: "
        f"{few}{', ...' if len(scarce) > NAMED else ''}"
    )


def few_tokens_paragraph(scarce: Mapping[str, int]) -> str:
    """Return what a card says about matrices of experts that received few tokens."""
    return (
        f"{len(scarce)} matrices of experts saw fewer calibration tokens than they have inputs. They were calibrated "
        "as if more tokens, average ones of their layer, had been sent to them, up to that number."
    )
