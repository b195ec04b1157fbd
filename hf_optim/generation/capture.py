"""A decoding step as a function that can be captured, compiled by ``torch.compile`` or not."""

from __future__ import annotations

import contextlib
import types
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from ..toolkit.modules import graph_capture
from .attention import forget_traced

# torch.compile keeps a version of the step for each size of the buffers.
COMPILED_STEPS = 64

_COMPILED: weakref.WeakKeyDictionary[nn.Module, Callable[..., Any]] = weakref.WeakKeyDictionary()


def call(model: Any, inputs: dict[str, Any]) -> Any:
    """Return the output of a model's forward."""
    forget_traced()
    outputs = model(**inputs, return_dict=True)
    forget_traced()
    return outputs


def compiled_call(model: nn.Module) -> Callable[..., Any]:
    """Return ``call`` compiled by ``torch.compile``, for one model.

    torch keeps compiled versions with the code object of a function: each model has its own, so that they are freed
    with the model, and those of one model do not count against the limit of another.
    """
    if model not in _COMPILED:
        from .graph_passes import compile_options  # inductor, which only a compiled step needs

        own = types.FunctionType(call.__code__.replace(), call.__globals__, call.__name__)
        _COMPILED[model] = torch.compile(own, fullgraph=True, dynamic=False, options=compile_options() or None)
    return _COMPILED[model]


def capture(
    run: Callable[[], None], restore: Callable[[], None], device: torch.device, pool: Any = None
) -> tuple[Callable[[], None], Any]:
    """Capture a step, which may be compiled meanwhile. Arguments, result and errors of ``graph_capture.capture``."""
    with _compiling():
        return graph_capture.capture(run, restore, device, pool)


@contextlib.contextmanager
def _compiling() -> Iterator[None]:
    """Let ``torch.compile`` keep many versions of the step, and give its advice (TF32, say) to nobody."""
    from torch._dynamo import config

    limits: dict[str, Any] = {"recompile_limit": COMPILED_STEPS, "accumulated_recompile_limit": COMPILED_STEPS}
    with warnings.catch_warnings(), config.patch(**limits):
        warnings.simplefilter("ignore")
        yield
