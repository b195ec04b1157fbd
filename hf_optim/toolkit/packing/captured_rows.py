"""The forward of a packed row as a CUDA graph: without padding, an encoder's launches take longer than its work.

A graph has fixed shapes. So a row of ``t`` tokens in ``n`` documents, the longest of ``l`` tokens, is computed in a
row of ``Sizes``, an eighth larger at most, whose places behind the documents belong to documents of their own: no token
of the batch sees them. Sizes that are met a second time are captured, and the result is held against the one that the
launches gave. A graph reads weights from their addresses: new values are seen, and a model that has changed otherwise
is noticed before its result is used.
"""

from __future__ import annotations

import itertools
import math
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..modules import graph_capture
from ..modules.captured_state import Addresses, addresses_of, are_there, has_global_hooks, how_wrong, why_not
from ..modules.fingerprint import fingerprint
from . import interface, per_document
from .documents import Documents

PLAIN = (bool, int, float, str)
TENSORS = ("input_ids", "inputs_embeds", "token_type_ids", "position_ids")
OUTPUTS = ("last_hidden_state", "pooler_output")
# Graphs of one encoder; sizes that are remembered as met once; forwards after which an unused graph gives way. Of more
# sizes than graphs, all in use, the first stay: a capture takes longer than the launches that it saves once.
KEPT, REMEMBERED, UNUSED = 32, 256, 512


@dataclass(frozen=True)
class Sizes:
    """The shapes of a graph: places of the row, documents in it, and the tokens that the longest may have."""

    tokens: int
    documents: int
    longest: int

    @classmethod
    def of(cls, lengths: tuple[int, ...]) -> Sizes:
        """Return the sizes in which documents of ``lengths`` are computed."""
        tokens, longest = eighths(sum(lengths), 64), eighths(max(lengths), 128)
        behind = math.ceil((tokens - sum(lengths)) / longest)
        return cls(tokens, eighths(len(lengths) + behind, 8), longest)

    def bounds(self, lengths: tuple[int, ...]) -> list[int]:
        """Return where documents begin, and the places: the given ones, those behind them, and empty ones."""
        found = [0, *itertools.accumulate(lengths)]
        while found[-1] < self.tokens:
            found.append(min(found[-1] + self.longest, self.tokens))
        return found + [self.tokens] * (self.documents + 1 - len(found))


def eighths(count: int, step: int) -> int:
    """Return the next multiple of ``step``, or of an eighth of the power of two up to ``count`` if that is more."""
    step = max(step, 1 << max(0, count.bit_length() - 4))
    return math.ceil(count / step) * step


@dataclass(eq=False)
class Graph:
    """A captured forward: what it reads, what it writes, and the state of the model for which it is right."""

    inputs: dict[str, Tensor]
    cu: Tensor
    outputs: Any
    replay: Callable[[], None]
    state: int
    addresses: Addresses
    pool: Any
    used: int = 0

    def load(self, row: dict[str, Any], sizes: Sizes, lengths: tuple[int, ...]) -> None:
        """Copy a packed row to the addresses that the graph reads."""
        for name, held in self.inputs.items():
            held[:, : row[name].shape[1]].copy_(row[name])
        bounds = torch.tensor(sizes.bounds(lengths), dtype=torch.int32)
        self.cu.copy_(bounds.pin_memory() if self.cu.is_cuda else bounds, non_blocking=True)


class CapturedRows:
    """The graphs of one encoder. A copy of a model has none, since a graph reads the weights of its own model."""

    def __init__(self, captures: bool) -> None:
        self.captures = captures
        self.graphs: OrderedDict[Any, Graph] = OrderedDict()
        self.met: OrderedDict[Any, None] = OrderedDict()
        self.failure = ""
        self.warned: set[str] = set()
        self._lock = threading.Lock()
        self._forwards = 0
        self._done: Any = None  # an event behind the last use of the graphs' memory

    def __reduce__(self) -> Any:
        return CapturedRows, (self.captures,)

    def forward(
        self, encoder: nn.Module, stock: Callable[..., Any], row: dict[str, Any], documents: Documents,
        finish: Callable[[Any], None],
    ) -> Any:  # fmt: skip
        """Return the outputs of a packed row, after ``finish``, which must copy what it takes of them.

        Args:
            encoder: the module that computes the row.
            stock: its forward.
            row: arguments of ``stock``: a packed row.
            documents: of the row.
            finish: gives outputs the shape of the batch, in place.
        """
        if (
            not self.captures
            or self.failure
            or (self.graphs and has_global_hooks())
            or not is_fit(encoder, row, documents)
            or not self._lock.acquire(blocking=False)
        ):
            return _launched(stock, row, finish)
        try:
            return self._forward(encoder, stock, row, documents, finish)
        finally:
            self._lock.release()

    def _forward(
        self, encoder: nn.Module, stock: Callable[..., Any], row: dict[str, Any], documents: Documents,
        finish: Callable[[Any], None],
    ) -> Any:  # fmt: skip
        sizes = Sizes.of(documents.lengths)
        key = sizes, torch.is_inference_mode_enabled(), documents.cu.device, *_settings(row)
        graph = self.graphs.get(key)
        self._forwards += 1
        if graph is not None and not are_there(graph.addresses):
            self.graphs.clear()
            graph = None
        if graph is None:
            if key in self.met and self._has_room():
                return self._capture(encoder, stock, row, documents, finish, sizes, key)
            self.met[key] = None
            while len(self.met) > REMEMBERED:
                self.met.popitem(last=False)
            return _launched(stock, row, finish)
        self.graphs.move_to_end(key)
        graph.used = self._forwards
        outputs = self._replay(graph, row, documents, finish, sizes)
        if fingerprint(encoder) != graph.state:  # compared while the device works
            self.graphs.clear()
            return _launched(stock, row, finish)
        return outputs

    def _has_room(self) -> bool:
        """Return True if another graph may be kept; one that was not used for long gives way."""
        if len(self.graphs) >= KEPT and self._forwards - next(iter(self.graphs.values())).used > UNUSED:
            self.graphs.popitem(last=False)
        return len(self.graphs) < KEPT

    def _replay(
        self, graph: Graph, row: dict[str, Any], documents: Documents, finish: Callable[[Any], None], sizes: Sizes
    ) -> Any:
        if self._done is not None:
            torch.cuda.current_stream(documents.cu.device).wait_event(self._done)
        graph.load(row, sizes, documents.lengths)
        graph.replay()
        outputs = type(graph.outputs)(**graph.outputs)
        outputs.last_hidden_state = graph.outputs.last_hidden_state[:, : sum(documents.lengths)]
        finish(outputs)
        if documents.cu.is_cuda:
            self._done = torch.cuda.current_stream(documents.cu.device).record_event()
        return outputs

    def _capture(
        self, encoder: nn.Module, stock: Callable[..., Any], row: dict[str, Any], documents: Documents,
        finish: Callable[[Any], None], sizes: Sizes, key: Any,
    ) -> Any:  # fmt: skip
        expected = _launched(stock, row, finish)
        reason = why_not(encoder)
        if reason:  # which may pass: sizes are as if they had not been met
            self.met.clear()
        else:
            try:
                graph = self._record(encoder, stock, row, documents, sizes)
                found = self._replay(graph, row, documents, finish, sizes)
            except graph_capture.CaptureError as error:
                reason = self.failure = str(error)
            else:
                reason = self.failure = self._keep(key, graph, found, expected)
        if reason:
            self.graphs.clear()
        if reason and reason not in self.warned:
            self.warned.add(reason)
            warnings.warn(
                f"padding_removal: {type(encoder).__name__} is not captured as a CUDA graph, so that its launches take "
                f"their time: {reason}",
                stacklevel=6,
            )
        return expected

    def _keep(self, key: Any, graph: Graph, found: Any, expected: Any) -> str:
        """Keep a graph if its result is right, and return what is wrong with it otherwise."""
        wrong = how_wrong(found.last_hidden_state, expected.last_hidden_state)
        if wrong is None:
            return ""  # the next batch of these sizes is tried
        if wrong:
            return wrong
        graph.used = self._forwards
        self.graphs[key] = graph
        return ""

    def _record(
        self, encoder: nn.Module, stock: Callable[..., Any], row: dict[str, Any], documents: Documents, sizes: Sizes
    ) -> Graph:
        device = documents.cu.device
        inputs = {}
        for name in TENSORS:
            given = row.get(name)
            if given is not None:
                inputs[name] = given.new_zeros(1, sizes.tokens, *given.shape[2:])
        cu = torch.zeros(sizes.documents + 1, dtype=torch.int32, device=device)
        graph = Graph(inputs, cu, None, lambda: None, fingerprint(encoder), addresses_of(encoder), None)
        graph.load(row, sizes, documents.lengths)
        # Only the bounds on the device count: the attention of ``is_fit`` rows reads nothing else of the documents.
        fixed = Documents(
            documents.index, cu, (), sizes.longest, documents.places, documents.rows, documents.columns, {}
        )
        arguments = interface.per_row({**row, **inputs}, fixed)

        def run() -> None:
            graph.outputs = stock(**arguments)

        pool = next((each.pool for each in self.graphs.values()), None)
        graph.replay, graph.pool = graph_capture.capture(run, lambda: None, device, pool)
        more = [name for name in graph.outputs if name not in OUTPUTS]
        if more:
            raise graph_capture.CaptureError(f"it returns {more[0]}, of which nothing is known")
        return graph


def _launched(stock: Callable[..., Any], row: dict[str, Any], finish: Callable[[Any], None]) -> Any:
    outputs = stock(**row)
    finish(outputs)
    return outputs


def is_fit(encoder: nn.Module, row: dict[str, Any], documents: Documents) -> bool:
    """Return True if the forward of a row depends on tensors of ``TENSORS`` and on the documents' bounds alone."""
    if torch.is_grad_enabled() or encoder.training or torch.compiler.is_compiling():
        return False
    device = documents.cu.device
    if not graph_capture.has_graphs(device) or torch.is_autocast_enabled(device.type):
        return False
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        return False
    if per_document.varlen_attn is None or getattr(encoder, "dtype", None) not in per_document.HALF:
        return False
    config: Any = getattr(encoder, "config", None)
    for name, value in row.items():
        known = (*TENSORS, "attention_mask") if isinstance(value, Tensor) else (interface.DOCUMENTS,)
        if not (name in known or value is None or isinstance(value, PLAIN)):
            return False
    wanted = row.get("output_hidden_states")
    return not (config.output_hidden_states if wanted is None else wanted)


def _settings(row: dict[str, Any]) -> list[Any]:
    """Return what else of the arguments of a forward its graph depends on."""
    found: list[Any] = []
    for name, value in sorted(row.items()):
        if isinstance(value, Tensor):
            found.append((name, value.dtype, value.shape[2:]))
        elif name != interface.DOCUMENTS:
            found.append((name, value))
    return found
