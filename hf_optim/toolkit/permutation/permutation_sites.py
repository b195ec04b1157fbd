"""Permutation sites: channels of a model that can be reordered without changing what it computes.

There are three kinds of sites, which are found by tracing the model:

- ``neurons``: the rows of an up projection (and of its gate) with the columns of the down projection;
- ``values``: the value channels of a head with the columns of the output projection that read them. All query heads of
  a key/value head share its order;
- ``residual``: the residual stream of the model, with one order for all layers that read or write it.

The channels of queries and keys are not a site. Their product sums over the channels, so their order does not matter
there; but no linear layer reads them, and rotary embeddings depend on their index.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ...errors import ModelError
from ..topology.experts import ExpertLinear, expert_linears
from ..topology.graph import Trace
from ..topology.layer_pairs import LinearPair, find_linear_pairs
from ..topology.linear_layers import features
from ..topology.residual_stream import ResidualStream, find_residual_stream
from ..topology.tracing import trace

SITE_KINDS = ("neurons", "values", "residual")

Masks = dict[str, Tensor]
Moves = Iterator[tuple[str, int, Tensor]]
"""Parameter name, dimension, and the order of the parameter along it."""


@dataclass(frozen=True, eq=False)
class Site:
    """A set of channels that can be permuted among themselves.

    Attributes:
        kind: ``"neurons"``, ``"values"`` or ``"residual"``.
        name: name of the layer that produces the channels, with the index of the head if there are several.
        readers: names of the linear layers and matrices of experts that read the channels.
        columns: ``[runs, channels]`` int64: the columns of each reader that read the channels, one row for each time
            that they are read.
        moves: returns how an order ``[channels]`` permutes the parameters of the model.
    """

    kind: str
    name: str
    readers: tuple[str, ...]
    columns: Tensor
    moves: Callable[[Tensor], Moves]

    @property
    def width(self) -> int:
        """Return the number of channels."""
        return int(self.columns.shape[1])

    def fits_groups(self, group: int) -> bool:
        """Return True if each run of the channels fills complete groups of ``group`` consecutive columns."""
        first = self.columns[:, :1]
        consecutive = torch.equal(self.columns, first + torch.arange(self.width))
        return consecutive and self.width % group == 0 and not bool((first % group).any())

    @torch.no_grad()
    def permute_(self, model: nn.Module, order: Tensor, masks: Masks | None = None) -> None:
        """Move channel ``order[c]`` to ``c`` in the parameters of ``model``, in place, and in ``masks`` (by name)."""
        masks = {} if masks is None else masks
        masked: dict[int, list[str]] = {}
        for name in masks:
            masked.setdefault(id(model.get_parameter(name)), []).append(name)
        for name, dim, index in self.moves(order):
            parameter = model.get_parameter(name)
            parameter.copy_(parameter.detach().index_select(dim, index.to(parameter.device)))
            for mask in masked.get(id(parameter), ()):
                masks[mask] = masks[mask].index_select(dim, index.to(masks[mask].device))


def find_sites(
    model: PreTrainedModel, kinds: Iterable[str] = SITE_KINDS, source: Trace | None = None
) -> tuple[list[Site], dict[str, list[str]]]:
    """Find the permutation sites of a model, and the reasons why others are none: reason -> names.

    Raises ``ValueError`` for an unknown kind.
    """
    kinds = tuple(kinds)
    if unknown := [kind for kind in kinds if kind not in SITE_KINDS]:
        raise ValueError(f"{unknown[0]!r} is not one of {', '.join(SITE_KINDS)}")
    traced = source or trace(model)
    found: list[Site] = []
    refused: dict[str, list[str]] = {}
    for pair in find_linear_pairs(traced):
        for site in _pair_sites(pair):
            if site.kind in kinds:
                found.append(site)
    if "residual" in kinds:
        try:
            found.append(_residual_site(model, find_residual_stream(traced)))
        except ModelError as error:
            refused[str(error)] = ["the residual stream"]
    return found, refused


def _pair_sites(pair: LinearPair) -> Iterator[Site]:
    """Yield one site for the neurons, or one per key/value head; none for rows that cannot move."""
    columns = pair.columns
    numbers = pair.groups.unique()
    kind = "neurons" if len(numbers) == 1 and pair.repeat == 1 else "values"
    for head, number in enumerate(numbers.tolist()):
        members = (pair.groups == number).nonzero().flatten()
        if len(members) > 1:
            name = pair.producer if len(numbers) == 1 else f"{pair.producer}[{head}]"
            yield Site(kind, name, (pair.consumer,), columns[members].T, _PairMoves(pair, members))


@dataclass(frozen=True, eq=False)
class _PairMoves:
    """The moves of the rows ``members`` among those that the consumer of a pair reads."""

    pair: LinearPair
    members: Tensor

    def __call__(self, order: Tensor) -> Moves:
        pair, full = self.pair, torch.arange(len(self.pair.groups))
        full[self.members] = self.members[order.cpu()]
        columns = pair.column_order(full)  # validates the order
        yield f"{pair.consumer}.weight", _dim(pair.consumer_module, 1), columns
        producers: list[tuple[str, Any, Tensor]] = [(pair.producer, pair.producer_module, pair.rows)]
        producers += [(partner.name, partner.module, partner.rows) for partner in pair.permutable_with]
        for name, module, rows in producers:
            index = torch.arange(features(module)[0])
            index[rows] = rows[full]
            yield f"{name}.weight", _dim(module, 0), index
            if module.bias is not None:
                yield f"{name}.bias", 0, index


def _dim(module: nn.Module, dim: int) -> int:
    """Return the stored dimension of a linear layer for dimension ``dim`` of ``[out, in]``."""
    return 1 - dim if isinstance(module, Conv1D) else dim


def _residual_site(model: nn.Module, residual: ResidualStream) -> Site:
    if residual.returned:
        raise ModelError(f"{type(model).__name__} returns its residual stream: another order would be visible")

    def moves(order: Tensor) -> Moves:
        if not torch.equal(order.cpu().sort().values, torch.arange(residual.width)):
            raise ValueError(f"not a permutation of {residual.width} channels")
        for name, dims in residual.parameters.items():
            for dim in dims:
                yield name, dim, order

    experts = [name for name, view in expert_linears(model).items() if _reads(view, residual)]
    readers = (*residual.readers, *experts)
    return Site("residual", "residual stream", readers, torch.arange(residual.width)[None], moves)


def _reads(view: ExpertLinear, residual: ResidualStream) -> bool:
    """Return True if the inputs of a matrix of an expert are the channels of the residual stream."""
    return (1 if view.transposed else 2) in residual.parameters.get(view.parameter_name, ())
