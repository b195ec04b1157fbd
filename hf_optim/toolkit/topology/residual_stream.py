"""The residual stream of a transformer: every tensor that reads or writes it.

The channels of the residual stream can be permuted if everything that touches them follows: the columns of the
embeddings, gains and biases of the norms, the columns of the linear layers that read the stream, the rows and biases of
those that write it. For a permutation matrix P and each of these in turn::

    E -> E P,    g -> P^T g,    W_read -> W_read P,    W_write -> P^T W_write

The stream is followed on a trace of the model: a value carries it along dimension k if the operations that touch the
value, re-executed on random numbers permuted along that dimension, give the same results permuted. The search ends at
linear layers; a value that is read but not computed is a parameter.
"""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedModel

from ...errors import ModelError
from .block_lists import blocks
from .channel_search import ChannelSearch, reordering
from .graph import Trace
from .tracing import trace


@dataclass(frozen=True, eq=False)
class ResidualStream:
    """The residual stream of a model.

    Attributes:
        width: number of channels.
        readers: names of the linear layers whose input it is.
        writers: names of the linear layers whose output is added to it.
        norms: names of the modules that normalise it.
        parameters: name (one of them, if tied) -> the dimensions of the parameter that follow the order of the stream.
        returned: True if the model returns the stream, as an encoder without a head does; its order is then fixed.
    """

    width: int
    readers: tuple[str, ...]
    writers: tuple[str, ...]
    norms: tuple[str, ...]
    parameters: dict[str, tuple[int, ...]]
    returned: bool


def find_residual_stream(source: PreTrainedModel | Trace) -> ResidualStream:
    """Return the residual stream that runs through the blocks of a model.

    Raises ``ModelError`` if the model has no blocks, or if an operation on the stream other than a linear layer depends
    on the order of its channels.
    """
    traced = source if isinstance(source, Trace) else trace(source)
    found = blocks(traced)
    if not found:
        raise ModelError(f"{type(traced.model).__name__} has no sequence of blocks, so no residual stream is known")
    start = next(value for value in traced.calls_of(found[0].name)[0].reads if traced.dtypes[value].is_floating_point)
    width = traced.shapes[start][-1]
    search = ChannelSearch(traced, width, reordering(width))
    search.follow(start)
    return _residual(search)


def _residual(search: ChannelSearch) -> ResidualStream:
    trace, carried = search.trace, search.carried
    parameters = {name: tuple(sorted(dims)) for name, dims in search.parameters.items()}
    calls = {call.name for call in trace.calls if carried.intersection(call.reads)}
    norms = [
        name
        for name in dict.fromkeys(call.name for call in trace.calls)
        if name in calls
        and parameters.get(f"{name}.weight") == (0,)
        and trace.model.get_parameter(f"{name}.weight").dim() == 1
    ]
    return ResidualStream(
        search.width,
        tuple(search.readers),
        tuple(search.writers),
        tuple(norms),
        parameters,
        bool(carried & trace.outputs),
    )
