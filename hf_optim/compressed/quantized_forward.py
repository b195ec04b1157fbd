"""The forward of a linear layer in the quantized state: compressed-tensors', without the layer owning itself.

compressed-tensors binds its forward to the layer and keeps it in the layer's own dict, which is a cycle: the weight of
a deleted model would be kept until the garbage collector runs. ``QuantizedForward`` runs the same function on a layer
that it refers to weakly. A copied or unpickled layer gets one of its own.
"""

from __future__ import annotations

import functools
import inspect
import types
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .codec import quantize_input, scheme_on


class QuantizedForward:
    """The ``forward`` in the dict of a quantized layer. It has the attributes of a bound method that others read."""

    __slots__ = ("__weakref__", "_class", "_module", "_run")

    def __init__(self, module: nn.Module) -> None:
        self._module, self._class = weakref.ref(module), type(module)
        self._run = _stock_forward(self._class.forward)

    def __call__(self, input: Tensor) -> Tensor:
        """``input`` [..., in] -> [..., out], quantized as the layer's scheme says."""
        module = self._module()
        assert module is not None, "the layer no longer exists"
        if torch.is_grad_enabled() and input.requires_grad and scheme_on(module).input_activations is not None:
            # compressed-tensors quantizes inputs without a gradient, which would cut off adapters in earlier layers.
            return type(module).forward(module, quantize_input(module, input))
        return self._run(module, input)

    def __reduce__(self) -> Any:
        return QuantizedForward, (self._module(),)

    @property
    def __self__(self) -> nn.Module | None:
        return self._module()

    @property
    def __func__(self) -> Callable[..., Any]:
        return self._run

    @property
    def __wrapped__(self) -> Callable[..., Any]:
        return self._class.forward

    @property
    def __signature__(self) -> inspect.Signature:
        unbound = inspect.signature(self.__wrapped__)
        return unbound.replace(parameters=list(unbound.parameters.values())[1:])

    @property
    def __name__(self) -> str:
        return "forward"


@functools.lru_cache(maxsize=16)
def _stock_forward(plain: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function that compressed-tensors would bind to a layer whose class has the forward ``plain``."""
    from compressed_tensors.quantization.lifecycle.forward import set_forward_quantized

    layer: Any = types.SimpleNamespace()
    layer.forward = types.MethodType(plain, layer)
    set_forward_quantized(layer)
    found = layer.forward.__func__
    del layer.forward
    return found


def is_quantized_forward(module: nn.Module, forward: Any) -> bool:
    """Return True for the forward of a layer in the quantized state: ours, or the one of compressed-tensors."""
    if isinstance(forward, QuantizedForward):
        return True
    theirs = isinstance(forward, types.MethodType) and forward.__self__ is module
    return theirs and getattr(forward.__func__, "__code__", None) is _stock_forward(type(module).forward).__code__


def release_forwards(model: nn.Module) -> None:
    """Replace the forwards that compressed-tensors bound to the layers of a model, which transformers loaded."""
    for module in model.modules():
        forward = module.__dict__.get("forward")
        if scheme_on(module) is not None and is_quantized_forward(module, forward):
            module.__dict__["forward"] = QuantizedForward(module)
