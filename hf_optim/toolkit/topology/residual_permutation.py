"""Permute the channels of a residual stream in place, and find the permutation between two related models."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from ...errors import ModelError
from ..modules.compare import relative_difference, rounding_tolerance
from ..modules.modes import eval_mode
from .fake_inputs import dummy_inputs
from .graph import iter_tensors
from .residual_stream import ResidualStream, find_residual_stream

# Rows of the embedding to compare; more do not change the result.
ROWS = 8192
# Least mean cosine of corresponding columns. The cosine of unrelated columns is about 1 / sqrt(rows).
MIN_COSINE = 0.8


@torch.no_grad()
def permute_residual_(model: PreTrainedModel, order: Tensor, residual: ResidualStream | None = None) -> ResidualStream:
    """Permute the residual stream in place: channel ``c`` becomes channel ``order[c]``. The outputs do not change.

    Args:
        model: a transformer whose blocks pass on a residual stream.
        order: ``[width]`` int64, a permutation.
        residual: the result of ``find_residual_stream``, if it is known.

    Returns:
        The residual stream.

    The outputs on dummy inputs are compared before and after. Raises ``ValueError`` for an order that is not a
    permutation of the channels. Raises ``ModelError``, with the model unchanged, for a model that returns the stream,
    and for a model whose outputs change by more than rounding.
    """
    residual = residual or find_residual_stream(model)
    if not torch.equal(order.sort().values.cpu(), torch.arange(residual.width)):
        raise ValueError(f"order is not a permutation of {residual.width} channels")
    if residual.returned:
        raise ModelError(
            f"{type(model).__name__} returns its residual stream: permuting the channels would change its outputs"
        )
    inputs = dummy_inputs(model)
    before = _output(model, inputs)
    _reorder_(model, residual, order)
    gap = relative_difference(_output(model, inputs), before)
    if not gap <= rounding_tolerance(model):
        _reorder_(model, residual, order.argsort())
        raise ModelError(
            f"permuting the residual stream of {type(model).__name__} changes its outputs by {gap:.1e} of the largest"
        )
    return residual


def _output(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> Tensor:
    with eval_mode(model):
        outputs = model(**inputs)
    return next(iter_tensors(outputs)).double()


def _reorder_(model: nn.Module, residual: ResidualStream, order: Tensor) -> None:
    for name, dims in residual.parameters.items():
        parameter = model.get_parameter(name)
        moved = parameter.detach()
        for dim in dims:
            moved = moved.index_select(dim, order.to(moved.device))
        parameter.copy_(moved)


@torch.no_grad()
def find_residual_order(model: nn.Module, origin: nn.Module) -> Tensor | None:
    """Return the residual-channel permutation between a model and the model that it was derived from.

    A permutation of the residual stream does not change what a model computes, and its checkpoint may not record it.
    But the columns of the input embedding are permuted too, and training changes them far less than a permutation does.

    Returns:
        ``[width]`` int64: channel ``c`` of ``model`` is channel ``order[c]`` of ``origin``. None if the order is the
        same, and if it cannot be determined: the input embeddings differ in shape, a model has none, or the models are
        not related.
    """
    ours, theirs = _embedding(model), _embedding(origin)
    if ours is None or theirs is None or ours.shape != theirs.shape:
        return None
    rows = torch.linspace(0, len(ours) - 1, min(ROWS, len(ours)), device=ours.device).long()
    ours, theirs = (
        F.normalize(table[rows.to(table.device)].to(ours.device).float(), dim=0) for table in (ours, theirs)
    )
    cosine, order = (ours.T @ theirs).max(1)
    identity = torch.arange(len(order), device=order.device)
    related = torch.equal(order.sort().values, identity) and float(cosine.mean()) > MIN_COSINE
    return order if related and not torch.equal(order, identity) else None


def _embedding(model: nn.Module) -> Tensor | None:
    embedding = getattr(model, "get_input_embeddings", lambda: None)()
    return embedding.weight.detach() if isinstance(embedding, nn.Embedding) else None
