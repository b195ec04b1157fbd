"""Putting codebook modules of remote code (``holds_codes``) on kernels and taking them off, in place.

Such a module keeps the codes of a linear layer in one buffer, whose name is ``codes_buffer``; ``pack(codes)`` builds
that buffer from codes, ``uint8 [out, in]``. On a kernel the buffer is removed, and the packed weight holds the codes in
its own layout; everything else stays in place. ``save_pretrained`` writes the same tensors as without a kernel.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from ...toolkit.topology.linear_layers import is_codebook_matrix, is_linear
from ...trust.bounds import first_line
from .kernel import NO_KERNEL, Kernel, first_that_takes
from .packed_linear import CHECKPOINT, PACKED_WEIGHT, KernelWarning

KERNEL = "_hf_optim_kernel"


class PackedCodebookLayer:
    """Mixin for the class of a codebook module on a kernel: it computes with its ``packed_weight``."""

    def forward(self, input: Tensor) -> Tensor:
        """``input`` [..., in] -> [..., out]."""
        packed_weight: Any = self._modules[PACKED_WEIGHT]  # type: ignore[attr-defined]
        if not packed_weight.accepts(input):
            return super().forward(input)  # type: ignore[misc]
        try:
            output = packed_weight(input)
        except Exception as error:
            if type(error).__module__ == CHECKPOINT:
                raise
            # If the input is at fault, the module's own forward raises here.
            output = super().forward(input)  # type: ignore[misc]
            unpack(self)  # type: ignore[arg-type]
            text = f"a {type(self).__name__} falls back to decoding its weight: {first_line(error, typed=True)}"
            warnings.warn(text, KernelWarning, stacklevel=2)
            return output
        bias = self.bias  # type: ignore[attr-defined]
        if bias is not None and bias.requires_grad and torch.is_grad_enabled():
            # The packed weight added the bias without a gradient; adding zero attaches it.
            output = output + (bias - bias.detach())
        return output

    def codes(self) -> Tensor:
        """Unpack the codes, ``uint8 [out, in]``."""
        packed_weight: Any = self._modules[PACKED_WEIGHT]  # type: ignore[attr-defined]
        return packed_weight.codes()

    def __getattr__(self, name: str) -> Any:
        if name == type(self).codes_buffer:  # type: ignore[attr-defined]
            return self.pack(self.codes())
        return super().__getattr__(name)  # type: ignore[misc]

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "bias" and PACKED_WEIGHT in self._modules:  # type: ignore[attr-defined]
            packed_weight: Any = self._modules[PACKED_WEIGHT]  # type: ignore[attr-defined]
            packed_weight.bias = None if value is None else value.detach()
            packed_weight.renew()

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)  # type: ignore[misc]
        name = type(self).codes_buffer  # type: ignore[attr-defined]
        destination[prefix + name] = getattr(self, name)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        # The layout depends on dtype and device, so the codes are packed again. They are small, so this is cheap.
        kernel = self.__dict__[KERNEL]
        unpack(self)  # type: ignore[arg-type]
        module: Any = self
        module._apply(fn, recurse)
        if kernel.check(module) is None:
            pack(module, kernel)
        return self


@cache
def _packed_class(cls: type) -> type:
    return type(cls.__name__, (PackedCodebookLayer, cls), {"__module__": cls.__module__, "__doc__": cls.__doc__})


def codebook_linears(model: nn.Module) -> dict[str, nn.Module]:
    """Return the linear layers of a model that are codebook modules of remote code, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if is_codebook_matrix(module) and not is_linear(module) and hasattr(module, "in_features")
    }


def try_kernels(module: nn.Module, kernels: Iterable[Kernel]) -> str:
    """Put a module on the first kernel that supports it; return the reason why none does, or ``""``."""
    if isinstance(module, PackedCodebookLayer):
        return ""
    found = first_that_takes(
        (kernel for kernel in kernels if kernel.codebook),
        lambda kernel: kernel.check(module),
        lambda kernel: pack(module, kernel),
    )
    return found or NO_KERNEL if isinstance(found, str) else ""


def promised(module: nn.Module, kernels: Iterable[Kernel]) -> tuple[str, str]:
    """Return what ``try_kernels`` would put a module on, and otherwise the reason why no kernel takes it."""
    found = first_that_takes(
        (kernel for kernel in kernels if kernel.codebook), lambda kernel: kernel.check(module), lambda kernel: None
    )
    return ("", found or NO_KERNEL) if isinstance(found, str) else (found[0].promise(module), "")


@torch.no_grad()
def pack(module: nn.Module, kernel: Kernel) -> None:
    """Replace the codes of a module by the packed weight of a kernel. Raises what ``Kernel.prepack`` raises."""
    packed_weight = kernel.prepack(module)  # type: ignore[arg-type]
    del module._buffers[module.codes_buffer]  # type: ignore[arg-type]
    module.__class__ = _packed_class(type(module))  # type: ignore[arg-type]
    module.__dict__[KERNEL] = kernel
    module._modules[PACKED_WEIGHT] = packed_weight


@torch.no_grad()
def unpack(module: nn.Module) -> None:
    """Undo ``pack``, bit-exact. A module that is not on a kernel is left unchanged."""
    if not isinstance(module, PackedCodebookLayer):
        return
    name: Any = type(module).codes_buffer  # type: ignore[attr-defined]
    held = getattr(module, name)
    del module._modules[PACKED_WEIGHT], module.__dict__[KERNEL]
    module.__class__ = type(module).__mro__[2]
    # In its original position, since buffers are saved in order.
    module._buffers.update({name: held, **{key: module._buffers.pop(key) for key in list(module._buffers)}})
