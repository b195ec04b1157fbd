"""Make one projection of those of queries and keys, for attention whose keys are its queries."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_optim import ModelError
from hf_optim.toolkit import topology
from hf_optim.toolkit.attention import attentions
from hf_optim.toolkit.topology import KeyValueHeads

from ._pooling import output_dim

QUERY, MEAN, KEY = "query", "mean", "key"


def heads_of(model: PreTrainedModel, needed: bool, label: str) -> list[KeyValueHeads]:
    """Return the heads of all attentions of a model; none if they cannot be told apart in each of them.

    Raises ``ModelError`` in that case if they are ``needed``.
    """
    found = topology.find_key_value_heads(topology.trace(model))
    if len(found) == len(attentions(model)):
        return found
    if needed:
        raise ModelError(
            f"{label}: the queries and keys of {type(model).__name__} cannot be told apart (a norm over all heads, or "
            f"a latent vector in place of keys): set shared to {QUERY}"
        )
    return []


def key_projection(model: PreTrainedModel, heads: Sequence[KeyValueHeads]) -> str:
    """Return the name, in an attention module, of the linear layer that projects keys alone.

    Empty if there is none, as where one layer projects queries, keys and values: its rows of keys stay, unread.
    """
    paths = [name for name, module in model.named_modules() if any(module is each for each in attentions(model))]
    names = set()
    for one in heads:
        owner = next((path for path in paths if one.keys.layer.startswith(f"{path}.")), None)
        layer = model.get_submodule(one.keys.layer)
        alone = isinstance(layer, nn.Linear) and layer.out_features == one.keys.index.numel()
        if owner is None or not alone or one.keys.layer in (one.queries.layer, one.values.layer):
            return ""
        names.add(one.keys.layer[len(owner) + 1 :])
    return names.pop() if len(names) == 1 else ""


@torch.no_grad()
def share_(model: PreTrainedModel, heads: Sequence[KeyValueHeads], shared: str) -> None:
    """Set the weights and biases of queries to the mean with those of keys, or to those of keys, in place."""
    for one in heads:
        query, key = model.get_submodule(one.queries.layer), model.get_submodule(one.keys.layer)
        to = one.queries.index.flatten()
        width = one.keys.index.shape[1]
        source = one.keys.index.unflatten(1, (1, width)).expand(-1, one.query_heads, -1).flatten()
        for name in ("weight", "bias"):
            own, other = getattr(query, name, None), getattr(key, name, None)
            if own is None and other is None:
                continue
            if own is None:
                raise ModelError(f"{one.keys.layer} has a bias, and {one.queries.layer} none: set shared to {QUERY}")
            dim = output_dim(query) if name == "weight" else 0
            rows = _taken(other, source, output_dim(key) if name == "weight" else 0, own, to, dim)
            mean = rows if shared == KEY else (own.index_select(dim, to.to(own.device)) + rows) / 2
            own.index_copy_(dim, to.to(own.device), mean.to(own.dtype))


def _taken(other: Tensor | None, source: Tensor, dim: int, own: Tensor, to: Tensor, own_dim: int) -> Tensor:
    """Return the rows of a parameter of keys for the queries, along ``own_dim``; zeros for a bias that is not there."""
    if other is None:
        return torch.zeros_like(own.index_select(own_dim, to.to(own.device)))
    rows = other.index_select(dim, source.to(other.device))
    return rows if dim == own_dim else rows.T
