"""Layers of transformers' models as reversible steps: attention is one branch, the feed-forward layer the other.

A layer ``h = x + attention(norm(x)); y = h + mlp(norm(h))`` becomes ``y1 = x1 + attention(norm(x2)); y2 = x2 +
mlp(norm(y1))``. The first layer begins both streams with its input, and the output of each layer is their mean, which
carries the streams to the next one.

This file is stored beside checkpoints, so it imports only torch and transformers.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache

from ..modules import Branch, Streams, mixed, reversible_step

STREAMS = "hf_optim_streams"  # attribute of the output of a layer


def names_of_layers(settings: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the names in a layer of its norm, attention, second norm and feed-forward layer; empty: not reversible.

    Raises ``ValueError`` for anything else in the settings.
    """
    names = settings.get("reversible", [])
    if names == []:
        return ()
    if (
        not isinstance(names, list)
        or len(names) != 4
        or not all(isinstance(n, str) and n.isidentifier() for n in names)
    ):
        raise ValueError(f"the attention pattern has reversible={str(names)[:40]!r}, not the names of four modules")
    return tuple(names)


def layers_with(model: nn.Module, names: Sequence[str]) -> list[nn.Module]:
    """Return the modules that have children of all ``names``, the second of which is an attention."""
    found = [
        module for module in model.modules() if all(isinstance(getattr(module, n, None), nn.Module) for n in names)
    ]
    return [module for module in found if hasattr(getattr(module, names[1]), "is_causal")]


class ReversibleLayer(nn.Module):
    """Mixin of a layer, first among its bases, that computes it as a reversible step."""

    reversible_names: tuple[str, ...] = ()
    reversible_number = 0

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        stock = super().forward
        hidden, given = arguments_of(stock, args, kwargs)
        streams = getattr(hidden, STREAMS, None)
        if streams is None:
            if self.reversible_number:
                raise ValueError(
                    "the two streams of reversible layers were lost between two layers, where something copied or "
                    "changed the hidden states: keep the layers on one device, and in one dtype"
                )
            streams = Streams.of(hidden)
        streams = reversible_step(streams, *self.branches(given), random=self.training)
        out = streams.mean()
        setattr(out, STREAMS, streams)
        return (out,) if returns_tuple(stock) else out

    def branches(self, given: Mapping[str, Any]) -> tuple[Branch, Branch, list[Tensor], list[Tensor]]:
        """Return attention and feed-forward layer as functions of one stream, and the parameters of each.

        Args:
            given: the other arguments of the layer, by name.
        """
        norm, attention, second_norm, mlp = (getattr(self, name) for name in self.reversible_names)
        first_time = [given]
        without = without_cache(given, attention.layer_idx) if torch.is_grad_enabled() else given

        def attend(x: Tensor) -> Tensor:  # computed again, the tokens are in the cache already
            return branch_of(attention, norm(x), first_time.pop() if first_time else without)

        return (
            attend,
            lambda x: mlp(second_norm(x)),
            [*norm.parameters(), *attention.parameters()],
            [*second_norm.parameters(), *mlp.parameters()],
        )


def arguments_of(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
    """Return the hidden states among the arguments of the forward of a layer, and the others by name."""
    signature = inspect.signature(function)
    bound = signature.bind(*args, **kwargs).arguments
    more = next((name for name, p in signature.parameters.items() if p.kind is p.VAR_KEYWORD), None)
    given = {**bound, **bound.pop(more, {})} if more is not None else dict(bound)
    given.pop(more, None)
    first = next(iter(signature.parameters))
    return given.pop(first), given


def without_cache(given: Mapping[str, Any], layer: Any) -> dict[str, Any]:
    """Return the arguments of a layer without the cache. Raises ``ValueError`` if its layer holds earlier tokens."""
    caches = {name: value for name, value in given.items() if isinstance(value, Cache)}
    if any(cache.get_seq_length(layer) for cache in caches.values()):
        raise ValueError(
            "reversible layers have no gradient for tokens behind a cache, which holds more than the backward would "
            "compute again: use torch.no_grad(), or set use_cache=False"
        )
    return {name: None if name in caches else value for name, value in given.items()}


def branch_of(attention: nn.Module, hidden: Tensor, given: Mapping[str, Any]) -> Tensor:
    """Return the output of an attention for hidden states and the other arguments of its layer."""
    parameters = inspect.signature(attention.forward).parameters
    every = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    out = attention(hidden, **{name: value for name, value in given.items() if every or name in parameters})
    return out[0] if isinstance(out, tuple) else out


def returns_tuple(function: Any) -> bool:
    """Return True if the forward of a layer says that it returns a tuple."""
    return str(inspect.signature(function).return_annotation).startswith("tuple")


def add_streams(model: nn.Module, names: tuple[str, ...]) -> list[nn.Module]:
    """Make the layers of a model reversible, in place, and return them.

    Raises ``ValueError`` if no layer has modules of these names.
    """
    found = layers_with(model, names)
    if not found:
        raise ValueError(f"{type(model).__name__} has no layers with {', '.join(names)}, which are to be reversible")
    for number, layer in enumerate(found):
        layer.__class__ = mixed(ReversibleLayer, type(layer))  # type: ignore[arg-type]
        layer.reversible_names, layer.reversible_number = names, number  # type: ignore[assignment]
    return found
