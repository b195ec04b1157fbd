"""One weightless forward of a model, recorded: which operation reads which tensor, inside which module.

The forward runs on a double of the model (`copy_with_tensors`) with fake tensors, so it costs neither memory nor
arithmetic and works for models whose weights are on the meta device.  Where the forward depends on the data
(a loop over the experts that were hit), it runs once more on the real weights.  A linear layer is recorded as
one operation.
"""

from __future__ import annotations

import contextlib
import logging
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedModel

from .fake_inputs import dummy_inputs
from .fake_model import copy_with_tensors, empty_on_cpu
from .graph import Op, Trace, iter_tensors, map_tree
from .recording import Recorder

CONFIG = {
    "use_cache": False,
    "return_dict": True,
    "output_attentions": False,
    "output_hidden_states": False,
    "_attn_implementation": "eager",
}
"""What the double's configs are set to: plain attention, no cache, nothing but the main outputs."""


def trace(model: nn.Module, inputs: Mapping[str, Any] | None = None, args: tuple[Any, ...] = ()) -> Trace:
    """Record one forward of `model(*args, **inputs)`, by default on `dummy_inputs(model)`.

    The model itself is not called, and nothing about it changes.  A single block can be traced with the
    inputs it receives in its model.  Raises `ValueError` for a module that needs inputs and got none, and
    whatever the forward raises when it runs neither on fake nor on real tensors.
    """
    if inputs is None and not args:
        if not isinstance(model, PreTrainedModel):
            raise ValueError(f"{type(model).__name__} is no PreTrainedModel: pass the inputs of its forward")
        inputs = dummy_inputs(model)
    inputs = dict(inputs or {})
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        try:
            return _trace_fake(model, inputs, args)
        except Exception as error:
            if any(parameter.is_meta for parameter in model.parameters()):
                raise RuntimeError(
                    f"{type(model).__name__} has no weights and cannot be traced on fake tensors"
                ) from error
            return _trace_real(model, inputs, args)


def _trace_fake(model: nn.Module, inputs: dict[str, Any], args: tuple[Any, ...]) -> Trace:
    with _silent_fakes(), FakeTensorMode(allow_non_fake_inputs=True):
        double = copy_with_tensors(model, empty_on_cpu, {**CONFIG, "_experts_implementation": "batched_mm"})
        return _record(model, double, _tensors_to(inputs, empty_on_cpu), _tensors_to(args, empty_on_cpu), real=False)


def _trace_real(model: nn.Module, inputs: dict[str, Any], args: tuple[Any, ...]) -> Trace:
    double = copy_with_tensors(model, lambda tensor: tensor, {**CONFIG, "_experts_implementation": "eager"})
    return _record(model, double, inputs, args, real=True)


def _record(model: nn.Module, double: nn.Module, inputs: dict[str, Any], args: tuple[Any, ...], real: bool) -> Trace:
    recorder = Recorder()
    recorder.watch(double)
    with recorder:
        outputs = double(*args, **inputs)
    returned = [recorder.value(tensor) for tensor in iter_tensors(outputs)]
    readers: dict[int, list[Op]] = defaultdict(list)
    for op in recorder.ops:
        for value in dict.fromkeys(op.reads):
            readers[value].append(op)
    return Trace(
        model=model,
        modules=dict(model.named_modules()),
        ops=tuple(recorder.ops),
        calls=tuple(sorted(recorder.calls, key=lambda call: (call.start, -call.end))),
        shapes=tuple(tensor.shape for tensor in recorder.kept),
        dtypes=tuple(tensor.dtype for tensor in recorder.kept),
        constants=recorder.constants,
        readers={value: tuple(ops) for value, ops in readers.items()},
        outputs=frozenset(returned[:1]) | {value for value in returned if value not in readers},
        used_real_weights=real,
    )


def _tensors_to(tree: Any, convert: Any) -> Any:
    return map_tree(tree, lambda value: convert(value) if isinstance(value, Tensor) else value)


@contextlib.contextmanager
def _silent_fakes() -> Iterator[None]:
    """Keep PyTorch from logging the operations that fake tensors cannot run: a real forward follows."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before
