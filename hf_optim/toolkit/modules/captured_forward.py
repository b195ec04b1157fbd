"""Forwards of a model that are replayed as CUDA graphs when their sizes come again.

An encoder with a pattern, or a small one, launches for longer than the device computes. Its forward without padding
asks the host for nothing once its lists of blocks are there, so it can be captured as it is.
"""

from __future__ import annotations

import inspect
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import require_any_model
from . import graph_capture
from .captured_state import Addresses, addresses_of, are_there, has_global_hooks, how_wrong, why_not
from .fingerprint import fingerprint

KEPT, REMEMBERED = 16, 256  # graphs; sizes that are remembered as met once
MASK = "attention_mask"
READ_BY_HOST = ("global_attention_mask",)  # the host finds marked tokens, of which there are others in each batch


@dataclass(eq=False)
class Replay:
    """A captured forward: what it reads and writes, and the state of the model for which it is right."""

    inputs: dict[str, Tensor]
    outputs: Any
    run: Callable[[], None]
    state: int
    addresses: Addresses
    pool: Any


class CapturedForward:
    """Call a model as it is called itself; see ``captured``.

    Attributes:
        model: the model.
        graphs: what was captured, by sizes.
        failure: why nothing more is captured; empty while something is.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.graphs: OrderedDict[Any, Replay] = OrderedDict()
        self.failure = ""
        self._names = tuple(inspect.signature(model.forward).parameters)
        self._met: OrderedDict[Any, None] = OrderedDict()
        self._done: Any = None  # an event behind the last use of the graphs' memory
        self._lock = threading.Lock()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return the model's output for these arguments; tensors of a replayed one are copies."""
        given = {**dict(zip(self._names, args, strict=False)), **kwargs}
        if len(args) > len(self._names) or self.failure or not self._may_replay(given):
            return self.model(*args, **kwargs)
        if not self._lock.acquire(blocking=False):
            return self.model(*args, **kwargs)
        try:
            return self._call(given)
        finally:
            self._lock.release()

    def _may_replay(self, given: dict[str, Any]) -> bool:
        tensors = _tensors(given)
        if not tensors or torch.is_grad_enabled() or self.model.training or torch.compiler.is_compiling():
            return False
        devices = {each.device for each in tensors.values()}
        if len(devices) > 1 or not graph_capture.has_graphs(next(iter(devices))):
            return False
        if torch.is_autocast_enabled(next(iter(devices)).type) or has_global_hooks():
            return False
        return not (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing())

    def _call(self, given: dict[str, Any]) -> Any:
        mask = given.get(MASK)
        if isinstance(mask, Tensor):
            if not bool(mask.all()):
                return self.model(**given)  # padding is read by the host
            given = {**given, MASK: None}
        if any(given.get(name) is not None for name in READ_BY_HOST):
            return self.model(**given)
        tensors = _tensors(given)
        sizes = tuple((name, each.dtype, each.device, each.shape) for name, each in tensors.items())
        others = {name: value for name, value in given.items() if name not in tensors}
        key = sizes, repr(others), torch.is_inference_mode_enabled()
        found = self.graphs.get(key)
        if found is not None and not are_there(found.addresses):
            self.graphs.clear()
            found = None
        if found is None:
            if key in self._met:
                return self._capture(key, given)
            self._met[key] = None
            while len(self._met) > REMEMBERED:
                self._met.popitem(last=False)
            return self.model(**given)
        self.graphs.move_to_end(key)
        outputs = self._replay(found, given)
        if fingerprint(self.model) != found.state:  # compared while the device works
            self.graphs.clear()
            return self.model(**given)
        return outputs

    def _replay(self, made: Replay, given: dict[str, Any]) -> Any:
        device = next(iter(made.inputs.values())).device
        if self._done is not None:  # the graphs share their memory, whatever the stream
            torch.cuda.current_stream(device).wait_event(self._done)
        for name, held in made.inputs.items():
            held.copy_(given[name])
        made.run()
        outputs = _copied(made.outputs)
        if device.type == "cuda":
            self._done = torch.cuda.current_stream(device).record_event()
        return outputs

    def _capture(self, key: Any, given: dict[str, Any]) -> Any:
        expected = self.model(**given)
        reason = why_not(self.model)
        if not reason:
            try:
                made = self._record(given)
                wrong = how_wrong(_first(self._replay(made, given)), _first(expected))
            except graph_capture.CaptureError as error:
                reason = str(error)
            else:
                reason = wrong or ""
                if wrong == "":
                    self.graphs[key] = made
                    while len(self.graphs) > KEPT:
                        self.graphs.popitem(last=False)
        if reason:
            self.failure = reason
            self.graphs.clear()
            warnings.warn(f"{type(self.model).__name__} is not captured as a CUDA graph: {reason}", stacklevel=4)
        return expected

    def _record(self, given: dict[str, Any]) -> Replay:
        inputs = {name: each.clone() for name, each in _tensors(given).items()}
        named = {**given, **inputs}
        made = Replay(inputs, None, lambda: None, fingerprint(self.model), addresses_of(self.model), None)

        def run() -> None:
            made.outputs = self.model(**named)

        pool = next((each.pool for each in self.graphs.values()), None)
        device = next(iter(inputs.values())).device
        made.run, made.pool = graph_capture.capture(run, lambda: None, device, pool)
        _copied(made.outputs)  # raises for what cannot be copied
        return made


def captured(model: nn.Module) -> CapturedForward:
    """Return a callable that runs a model's forward as a CUDA graph where its sizes come again.

    For models that read whole inputs, encoders foremost, in evaluation mode and without gradients. Sizes that are met a
    second time are captured, and the result is held against that of the launches before it is trusted; up to 16 graphs
    share their memory. Values of weights may change; other weights, classes, settings, adapters or hooks are noticed
    before a result is returned. Batches with padding or with a ``global_attention_mask``, gradients, autocast,
    and whatever is not on a GPU run as the model does; what cannot be captured (a cache in the output, hooks inside of
    the model, several devices, global tokens by id or with projections of their own) does so from then on, with one
    warning. The model itself is not changed.

    Args:
        model: in evaluation mode.
    """
    require_any_model(model)
    return CapturedForward(model)


def _tensors(given: dict[str, Any]) -> dict[str, Tensor]:
    return {name: value for name, value in given.items() if isinstance(value, Tensor)}


def _copied(outputs: Any) -> Any:
    """Return outputs with copies of their tensors. Raises ``CaptureError`` for what has none."""
    if outputs is None or isinstance(outputs, Tensor):
        return None if outputs is None else outputs.clone()
    if hasattr(outputs, "to_tuple"):
        return type(outputs)(**{name: _copied(value) for name, value in outputs.items()})
    if type(outputs) in (tuple, list):
        return type(outputs)(_copied(value) for value in outputs)
    raise graph_capture.CaptureError(f"it returns a {type(outputs).__name__}, which has no copy")


def _first(outputs: Any) -> Tensor:
    """Return the first tensor of outputs."""
    if isinstance(outputs, Tensor):
        return outputs
    return next(iter(outputs.values() if hasattr(outputs, "values") else outputs))
