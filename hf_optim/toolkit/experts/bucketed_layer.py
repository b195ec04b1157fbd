"""One mixture layer whose capacities follow its load: captured as a CUDA graph for each configuration of buckets.

A forward whose tokens have room replays a graph. One in which an expert overflows is computed by the product without
buckets, so that nothing is dropped, and the graph of larger buckets is captured for the next one. On a CPU, under
``torch.compile``, with gradients, and inside of a capture of others nothing is captured: the layer computes without
buckets, and on a CPU the loads are still counted.
"""

from __future__ import annotations

import logging
import weakref
from collections import OrderedDict
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from ..topology.experts import is_packed_experts
from . import registry
from .bucketed_product import bucketed_product, rooms_of
from .buckets import Buckets, CapacityWatch
from .product import expert_product

log = logging.getLogger(__name__)

LAYER = "_hf_optim_buckets"
MAX_SIZES = 32
"""Numbers of tokens that a layer watches; the one that was not seen for the longest time is forgotten."""


@dataclass(eq=False)
class Counts:
    """What a layer did.

    Attributes:
        forwards: all of them.
        fitting: forwards in which every expert had room.
        overflows: forwards that were computed without buckets, since an expert had no room.
        changes: how often capacities changed, the first time not included.
        captures: graphs captured.
        replays: forwards that replayed a graph.
        pairs: pairs of token and expert, in forwards that fit.
        rows: rows of buffers in these forwards: pairs and padding.
    """

    forwards: int = 0
    fitting: int = 0
    overflows: int = 0
    changes: int = 0
    captures: int = 0
    replays: int = 0
    pairs: int = 0
    rows: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Return the counts, with the share of rows that are padding."""
        found: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        return {**found, "padding": round(1 - self.pairs / max(1, self.rows), 6) if self.rows else 0.0}


_live: weakref.WeakSet[Any] = weakref.WeakSet()


def shared_pool(device: torch.device) -> Any:
    """Return the memory of a graph that exists, or None if there is none.

    All graphs share it: one replays after the other, each has tensors of its own for its inputs, and its output is
    copied at once. A pool ends with its last graph, so that its handle must not be kept without one.
    """
    return next((one.graph.pool() for one in _live if one.device == device), None)


class Graph:
    """The bucketed product of fixed shapes, captured."""

    def __init__(
        self, module: Any, hidden: Tensor, experts: Tensor, weights: Tensor, capacities: tuple[int, ...]
    ) -> None:
        self.inputs = hidden.clone(), experts.clone(), weights.clone()
        self.rooms = rooms_of(module, capacities, hidden, weights)
        stream = torch.cuda.Stream(hidden.device)
        stream.wait_stream(torch.cuda.current_stream(hidden.device))
        with torch.cuda.stream(stream):  # libraries allocate what they need before the capture
            for _ in range(2):
                bucketed_product(module, *self.inputs, self.rooms)
        torch.cuda.current_stream(hidden.device).wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, pool=shared_pool(hidden.device), capture_error_mode="thread_local"):
            self.output, self.loads = bucketed_product(module, *self.inputs, self.rooms)
        self.device = hidden.device
        _live.add(self)

    def replay(self, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Return output and loads; the next replay overwrites both."""
        for held, given in zip(self.inputs, inputs, strict=True):
            held.copy_(given)
        self.graph.replay()
        return self.output, self.loads


class BucketedLayer:
    """The capacities and graphs of one module of experts, which keep hf_optim's experts function registered.

    Copies and pickles of a model get new ones, since graphs refer to the weights that they were captured with.

    Attributes:
        name: of the module in its model.
        setting: how capacities follow the load.
        counts: what it did.
        failure: why a capture failed; then the layer computes without buckets.
    """

    def __init__(self, name: str, setting: Buckets) -> None:
        self.name, self.setting, self.counts, self.failure = name, setting, Counts(), ""
        self.watches: OrderedDict[int, CapacityWatch] = OrderedDict()
        self.graphs: OrderedDict[tuple[Any, ...], Graph] = OrderedDict()
        registry.use(self)

    def __reduce__(self) -> Any:
        return BucketedLayer, (self.name, self.setting)

    def forward(self, module: Any, hidden: Tensor, experts: Tensor, weights: Tensor, complete: bool) -> Tensor:
        """Return the output ``[T, d]``. hidden ``[T, d]``, experts int64 ``[T, k]``, weights ``[T, k]``."""
        if is_captured_or_traced(hidden) or len(hidden) == 0:
            return expert_product(module, hidden, experts, weights, complete)
        watch = self._watch(len(hidden))
        self.counts.forwards += 1
        graph = None
        # Buffers are multiplied by dense matrices, and those of packed experts would be decoded, all at every read.
        usable = watch.capacities is not None and not self.failure and not is_packed_experts(module)
        if usable and self._captures(module, hidden, weights):
            graph = self._graph(module, hidden, experts, weights, watch.capacities)  # type: ignore[arg-type]
        if graph is None:
            self._note(watch, load_of(experts, module.num_experts))
            return expert_product(module, hidden, experts, weights, complete)
        output, loads = graph.replay(hidden, experts, weights)
        if self._note(watch, loads.tolist()):
            self.counts.replays += 1
            return output.clone()
        return expert_product(module, hidden, experts, weights, complete)

    def _watch(self, tokens: int) -> CapacityWatch:
        watch = self.watches.pop(tokens, None) or CapacityWatch(self.setting, tokens)
        self.watches[tokens] = watch
        while len(self.watches) > MAX_SIZES:
            self.watches.popitem(last=False)
        return watch

    def _note(self, watch: CapacityWatch, loads: list[int]) -> bool:
        """Count a forward with these loads; return True if every expert has room for them."""
        fitted, first = watch.fits(loads), watch.capacities is None
        if fitted:
            self.counts.fitting += 1
            self.counts.pairs += sum(loads)
            self.counts.rows += sum(watch.capacities or ())
        elif not first:
            self.counts.overflows += 1
        if watch.observe(loads) and not first:
            self.counts.changes += 1
        return fitted

    def _captures(self, module: Any, hidden: Tensor, weights: Tensor) -> bool:
        needs = torch.is_grad_enabled() and (hidden.requires_grad or weights.requires_grad or module.training)
        return hidden.device.type == "cuda" and not needs

    def _graph(
        self, module: Any, hidden: Tensor, experts: Tensor, weights: Tensor, capacities: tuple[int, ...]
    ) -> Graph | None:
        places = tuple(parameter.data_ptr() for parameter in module.parameters(recurse=False))
        key = (tuple(experts.shape), hidden.dtype, weights.dtype, hidden.device, places, capacities)
        graph = self.graphs.pop(key, None)
        if graph is None:
            try:
                # Tensors made in inference mode could not be written outside of it.
                with torch.inference_mode(False), torch.no_grad():
                    graph = Graph(module, hidden, experts, weights, capacities)
            except RuntimeError as error:  # out of memory, or an activation that waits for the host
                self.graphs.clear()
                self.failure = " ".join(str(error).split())[:200]
                log.warning("%s: its experts run without graphs from now on: %s", self.name, self.failure)
                return None
            self.counts.captures += 1
        self.graphs[key] = graph
        while len(self.graphs) > self.setting.graphs:
            self.graphs.popitem(last=False)
        return graph


def load_of(experts: Tensor, count: int) -> list[int]:
    """Return the pairs of each expert. experts: int64 ``[T, k]``; numbers from ``count`` on do not count."""
    loads = torch.zeros(count + 1, dtype=torch.int64, device=experts.device)
    flat = experts.reshape(-1).clamp(max=count)
    found: list[int] = loads.scatter_add_(0, flat, torch.ones_like(flat))[:count].tolist()
    return found


def is_captured_or_traced(tensor: Tensor) -> bool:
    """Return True inside of ``torch.compile`` and of a CUDA graph that others capture."""
    return torch.compiler.is_compiling() or (tensor.device.type == "cuda" and torch.cuda.is_current_stream_capturing())


def buckets_of(module: Any) -> BucketedLayer | None:
    """Return what is kept for a module of experts whose capacities follow its load, or None for another module."""
    return vars(module).get(LAYER)
