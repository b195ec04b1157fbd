"""Put one module in the place of a feed-forward layer, which is several linear layers of a block."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from ..modules.feed_forward_inlets import Inlet, connect
from ..modules.replace import replace_module
from .feed_forward import FeedForward


def inlet_entries(layers: Iterable[FeedForward]) -> dict[str, dict[str, bool]]:
    """Return what a configuration says of the projections of the input, by name: the first of a layer keeps it."""
    return {name: {"keeps": name == layer.producers[0]} for layer in layers for name in layer.producers}


def place_layer(model: nn.Module, layer: FeedForward, made: Any, inlet_class: type[Inlet] = Inlet) -> None:
    """Put ``made`` in the place of the last projection of a layer, and inlets in those of the other ones.

    Args:
        model: the model of the layer; all of them get the mode (training or not) of the projection that was there.
        layer: the feed-forward layer.
        made: the module that computes all of it; its list ``inlet`` gets the inlet that keeps the input.
        inlet_class: ``Inlet`` of the code that is stored with the model.
    """
    training = model.get_submodule(layer.down).training
    for name, entry in inlet_entries([layer]).items():
        inlet = inlet_class(entry["keeps"]).train(training)
        replace_module(model, name, inlet)
        if inlet.keeps:
            connect(made, inlet)
    replace_module(model, layer.down, made.train(training))
