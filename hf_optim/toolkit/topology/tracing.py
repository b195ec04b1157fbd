"""Record one forward of a model without weights: which operation reads which tensor, inside which module.

The forward runs on a fake copy of the model (``fake_model``), whose fake tensors need no memory and no arithmetic, so
models with weights on the meta device can be traced. If the forward depends on the data (a loop over the experts that
receive tokens), it runs again on the real weights. A linear layer is recorded as one operation.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedModel

from ...errors import ModelError
from ...trust.bounds import first_line
from .fake_inputs import NoInputsError, dummy_inputs, example_of
from .fake_model import copy_with_tensors, empty_on_cpu
from .graph import Op, Trace, iter_tensors, map_tree
from .linear_layers import features, is_linear, is_plain_linear, weight_out_in
from .recording import Recorder
from .trace_cache import StructureCache, structure

CONFIG = {
    "use_cache": False,
    "return_dict": True,
    "output_attentions": False,
    "output_hidden_states": False,
    "_attn_implementation": "eager",
}
"""Settings of the copy's configs: plain attention, no cache, only the main outputs."""


_cache = StructureCache()
"""Fake traces without their models."""


class WithoutWeightsError(ModelError):
    """A model without weights cannot be traced, because its forward depends on their values."""


def trace(model: nn.Module, inputs: Mapping[str, Any] | None = None, args: tuple[Any, ...] = ()) -> Trace:
    """Record one forward of ``model(*args, **inputs)``, by default on ``dummy_inputs(model)``.

    The model itself is not called or changed. A single block can be traced with the inputs that it receives in its
    model. Raises ``ValueError`` for a module that needs inputs and got none, ``NoInputsError`` for a model that neither
    dummy inputs nor its example fit, ``ModelError`` for a model without weights that cannot be traced on fake tensors,
    and the exception of a forward that fails on the ``inputs`` that were passed, on fake and real tensors.
    """
    if inputs is None and not args:
        if not isinstance(model, PreTrainedModel):
            raise ValueError(f"{type(model).__name__} is not a PreTrainedModel: pass the inputs of its forward")
        return _trace_dummy(model)
    return _trace(model, dict(inputs or {}), args)


def _trace_dummy(model: PreTrainedModel) -> Trace:
    """Record a forward on dummy inputs; if it fails, one on the example of the caller's data."""
    failed: list[Exception] = []
    # The rows of a batch may not be examples; then the whole batch is one.
    for inputs in (dummy_inputs, example_of, functools.partial(example_of, whole=True)):
        try:
            given = inputs(model)
            if given is not None:
                return _trace(model, given, ())
        except (NoInputsError, WithoutWeightsError):
            raise
        except Exception as error:  # the forward of any model
            failed.append(error)
    tried = " and on the first calibration batch" if len(failed) > 1 else ""
    advice = "" if len(failed) > 1 else ": pass calibration batches, of which the first serves to trace the model"
    why = "; ".join(first_line(error, typed=True) for error in failed)
    raise NoInputsError(
        f"the forward of {type(model).__name__} fails on dummy inputs{tried} ({why}){advice}"
    ) from failed[-1]


def _trace(model: nn.Module, inputs: dict[str, Any], args: tuple[Any, ...]) -> Trace:
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        try:
            recorded = _cache.get(
                structure(model, inputs, args), lambda: _without_model(_trace_fake(model, inputs, args))
            )
            return dataclasses.replace(recorded, model=model, modules=dict(model.named_modules()), cache={})
        except Exception as error:
            if any(parameter.is_meta for parameter in model.parameters()):
                raise WithoutWeightsError(
                    f"{type(model).__name__} has no weights, and its forward fails on fake tensors "
                    f"({type(error).__name__}: {error}): load its weights"
                ) from error
            return _trace_real(model, inputs, args)


def trace_until_failure(model: PreTrainedModel) -> Trace:
    """Record a forward on ``dummy_inputs(model)`` as far as fake tensors get; ``partial`` is True if it failed.

    For models without weights whose forward depends on the data. What the forward did before is recorded.
    """
    inputs = dummy_inputs(model)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        return _trace_fake(model, inputs, (), tolerant=True)


def as_trace(source: nn.Module | Trace) -> Trace:
    """Return ``source`` if it is a trace, otherwise the trace of the model."""
    return source if isinstance(source, Trace) else trace(source)


def _trace_fake(model: nn.Module, inputs: dict[str, Any], args: tuple[Any, ...], tolerant: bool = False) -> Trace:
    with silent_fakes(), FakeTensorMode(allow_non_fake_inputs=True):
        copied = copy_with_tensors(model, empty_on_cpu, {**CONFIG, "_experts_implementation": "batched_mm"})
        _add_missing_weights(copied)
        _leave_out_products(copied)
        inputs, args = _map_tensors(inputs, empty_on_cpu), _map_tensors(args, empty_on_cpu)
        return _record(model, copied, inputs, args, real=False, tolerant=tolerant)


def _without_model(traced: Trace) -> Trace:
    """Return the trace of a structure: that of a model which nothing refers to, so that the model can be freed."""
    return dataclasses.replace(traced, model=nn.Module(), modules={})


def _trace_real(model: nn.Module, inputs: dict[str, Any], args: tuple[Any, ...]) -> Trace:
    copied = copy_with_tensors(model, lambda tensor: tensor, {**CONFIG, "_experts_implementation": "eager"})
    return _record(model, copied, inputs, args, real=True)


def _record(
    model: nn.Module,
    copied: nn.Module,
    inputs: dict[str, Any],
    args: tuple[Any, ...],
    real: bool,
    tolerant: bool = False,
) -> Trace:
    recorder = Recorder()
    recorder.watch(copied)
    outputs, failed = None, False
    with recorder:
        try:
            outputs = copied(*args, **inputs)
        except Exception:
            if not tolerant:
                raise
            failed = True
    parameters = {
        recorder.numbers[id(parameter)]: name
        for name, parameter in copied.named_parameters()
        if id(parameter) in recorder.numbers
    }
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
        parameters=parameters,
        partial=failed,
    )


def _add_missing_weights(copied: nn.Module) -> None:
    """Give the linear layers of a fake copy whose weights are still packed (a loaded checkpoint) a dense weight."""
    for module in copied.modules():
        if isinstance(module, nn.Linear) and is_plain_linear(module) and not hasattr(module, "weight"):
            weight = torch.empty(module.out_features, module.in_features)
            module.register_parameter("weight", nn.Parameter(weight, requires_grad=False))


def _leave_out_products(copied: nn.Module) -> None:
    """Let the linear layers of a fake copy return a tensor of the right shape: they are recorded as one operation."""
    for module in copied.modules():
        if is_linear(module) and is_plain_linear(module):
            module.forward = functools.partial(_product_without_values, module)


def _product_without_values(layer: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
    weight = weight_out_in(layer)
    if not kwargs and len(args) == 1 and weight.shape == features(layer):
        states: Tensor = args[0]
        if states.shape[-1:] == weight.shape[1:] and states.dtype == weight.dtype:
            return states.new_empty((*states.shape[:-1], weight.shape[0]))
    return type(layer).forward(layer, *args, **kwargs)  # which may raise


def _map_tensors(tree: Any, convert: Any) -> Any:
    return map_tree(tree, lambda value: convert(value) if isinstance(value, Tensor) else value)


@contextlib.contextmanager
def silent_fakes() -> Iterator[None]:
    """Silence PyTorch's log of operations that fake tensors cannot run: a real forward follows."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before
