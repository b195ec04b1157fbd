"""Faster layers for a model in memory: ``accelerate`` binds kernels, ``restore`` takes them off, ``report`` tells.

A technique whose result has a kernel offers it from its ``register_kernels`` hook; the import stands inside, so that
neither Triton nor a kernel is loaded before the first ``accelerate()``::

    @hookimpl
    def register_kernels(self, register):
        from hf_optim_kernels.wna16 import layer as wna16

        register(Kernel("wna16", serves=wna16.serves, bind=wna16.bind))

(with ``from hf_optim import Kernel, hookimpl``). Two steps may offer the same kernel: it is tried once.

A kernel is bound to one instance: ``module.forward`` of that layer, nothing of a class and nothing global. The module,
its parameters and their names stay, so a stock ``save_pretrained`` writes the same checkpoint as before.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from .catalogue import catalogue
from .run import Run, find_run
from .toolkit import topology

BOUND = "_hf_optim_bound"
REFUSALS = "_hf_optim_refusals"
NOT_COMPRESSED = "not compressed"
NOT_ASKED = "accelerate() was not called"
STALE = "its weight changed after accelerate(); call accelerate() again"


class KernelWarning(UserWarning):
    """A layer runs as it did before, although it was meant to run on a kernel. The message names it and says why."""


@dataclass(frozen=True)
class Kernel:
    """A faster way to run some layers.

    Attributes:
        name: what ``report`` prints.
        serves: ``(qualified name, module) -> None`` where the kernel can run that module, else the reason why not;
            the empty string where the module is not its business at all (it is not compressed).
        bind: makes the callable ``(input) -> output`` that stands in for ``module.forward``. It may raise
            ``ValueError`` with the reason why it cannot. The callable is asked only where no gradient is recorded,
            and, if it has a method ``takes(input) -> bool``, only where that agrees (the dense library call may be
            faster for many rows); everywhere else the layer computes as it did before. If it has a ``label``,
            ``report`` prints that.
    """

    name: str
    serves: Callable[[str, nn.Module], str | None]
    bind: Callable[[Any], Callable[..., Any]]


@dataclass(frozen=True)
class Row:
    """One linear layer: its name, its shape ``[out, in]``, and the kernel it runs on or the reason why on none."""

    name: str
    shape: tuple[int, int]
    kernel: str | None
    reason: str = ""


class Report(list[Row]):
    """Every linear layer of a model; ``str()`` prints a table."""

    def __str__(self) -> str:
        cells = [("layer", "out x in", "runs on")]
        cells += [(r.name, f"{r.shape[0]} x {r.shape[1]}", r.kernel or f"dense: {r.reason}") for r in self]
        wide = [max(len(row[i]) for row in cells) for i in range(2)]
        lines = [f"{name:<{wide[0]}}  {shape:>{wide[1]}}  {what}".rstrip() for name, shape, what in cells]
        return "\n".join(lines)


@dataclass(eq=False)
class _Bound:
    """Stands in for ``module.forward``: the kernel where it can and may, the forward from before everywhere else."""

    module: nn.Module
    name: str
    kernel: Kernel
    call: Callable[..., Any]
    stock: Callable[..., Any] | None
    failure: str = ""
    mark: Any = field(default=None)

    def __post_init__(self) -> None:
        self.takes = getattr(self.call, "takes", None)
        self.mark = _mark(self.module)

    def __call__(self, input: torch.Tensor) -> torch.Tensor:
        # The kernels know no gradient of the weight, and a dense product is as fast for a training batch.
        if self.trained(input) or self.failure or (self.takes is not None and not self.takes(input)):
            return self.dense(input)
        if torch.compiler.is_compiling():
            return self.call(input)
        if self.mark is None:
            self.mark = _mark(self.module)
        elif self.mark != _mark(self.module):
            self.fail(STALE)
            return self.dense(input)
        try:
            return self.call(input)
        except Exception as error:
            # A fault of the input is the dense layer's to report; it then raises here.
            output = self.dense(input)
            self.fail(f"{self.kernel.name} raised {type(error).__name__}: {error}")
            return output

    def trained(self, input: torch.Tensor) -> bool:
        """Whether autograd records this call."""
        used = (input, *self.module._parameters.values())
        return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in used)

    def dense(self, input: torch.Tensor) -> torch.Tensor:
        """The forward from before ``accelerate()``."""
        return self.stock(input) if self.stock is not None else type(self.module).forward(self.module, input)

    def fail(self, reason: str) -> None:
        """Take the layer off the kernel for good, and say so."""
        self.failure = reason
        warnings.warn(f"{self.name} is dense from now on: {reason}", KernelWarning, stacklevel=4)

    def __getstate__(self) -> dict[str, Any]:
        # A copy of the model has weights at other addresses: it is marked anew at its first call.
        if not self.failure and self.mark not in (None, _mark(self.module)):
            return {**self.__dict__, "failure": STALE}
        return {**self.__dict__, "mark": None}


def accelerate(model: nn.Module, kernels: Iterable[Kernel] | None = None) -> nn.Module:
    """Run the compressed layers of ``model`` on kernels, in place, where that is possible and faster.

    The kernels come from the ``register_kernels`` hooks of the model's own recipe; for a model without one (a
    compressed checkpoint that stock transformers loaded) from every technique of the catalogue. A layer that no kernel
    can run stays as it is, and one ``KernelWarning`` names those layers and why. Layers already bound are kept; a layer
    whose weight changed since is bound anew. Write weights through the parameter (not its ``.data``, which leaves no
    trace) or call ``restore`` before.

    Args:
        model: a model, or a wrapper around one (peft).
        kernels: try these, in this order, instead.
    """
    offered = tuple(kernels) if kernels is not None else _offered(find_run(model))
    _decompress(model)
    refusals: dict[str, str] = {}
    for name, module in topology.linears(model).items():
        bound = module.__dict__.get(BOUND)
        if bound is not None:
            if not bound.failure and bound.mark in (None, _mark(module)):
                continue
            _unbind(module)
        refusals[name] = _bind(name, module, offered)
    model.__dict__[REFUSALS] = {name: reason for name, reason in refusals.items() if reason}
    _warn_of({name: reason for name, reason in refusals.items() if reason not in ("", NOT_COMPRESSED)})
    return model


def restore(model: nn.Module) -> nn.Module:
    """Undo ``accelerate``: every layer has the forward it had before. Nothing happens to a model without kernels."""
    for module in model.modules():
        if BOUND in module.__dict__:
            _unbind(module)
    model.__dict__.pop(REFUSALS, None)
    return model


def report(model: nn.Module) -> Report:
    """Which kernel each linear layer runs on, or why it runs dense."""
    refusals = model.__dict__.get(REFUSALS)
    rows = Report()
    for name, module in topology.linears(model).items():
        shape = topology.features(module)
        bound = module.__dict__.get(BOUND)
        if bound is not None and not bound.failure:
            rows.append(Row(name, shape, getattr(bound.call, "label", bound.kernel.name)))
        elif bound is not None:
            rows.append(Row(name, shape, None, bound.failure))
        else:
            rows.append(Row(name, shape, None, NOT_ASKED if refusals is None else refusals.get(name, NOT_COMPRESSED)))
    return rows


_OFFERS: WeakKeyDictionary[Run, tuple[Kernel, ...]] = WeakKeyDictionary()


def _offered(run: Run | None) -> tuple[Kernel, ...]:
    """The kernels of a run, its hooks called once; without a run, those of the whole catalogue."""
    if run is not None and run in _OFFERS:
        return _OFFERS[run]
    found: list[Kernel] = []

    def register(kernel: Kernel) -> None:
        if not isinstance(kernel, Kernel):
            raise TypeError(f"register_kernels gave a {type(kernel).__name__}, not an hf_optim.Kernel")
        if kernel not in found:
            found.append(kernel)

    if run is not None:
        run.call_on(run.recipe.steps, "register_kernels", register=register)
        _OFFERS[run] = tuple(found)
    else:
        for cls in catalogue().all():
            offer = getattr(cls(), "register_kernels", None) if hasattr(cls, "register_kernels") else None
            if offer is not None:
                offer(register=register)
    return tuple(found)


def _bind(name: str, module: nn.Module, kernels: tuple[Kernel, ...]) -> str:
    """Bind the first kernel that serves the module; the empty string, or the reason why none does."""
    reasons: list[str] = []
    for kernel in kernels:
        reason = kernel.serves(name, module)
        if reason is None:
            try:
                call = kernel.bind(module)
            except ValueError as error:
                reason = str(error)
            except Exception as error:
                reason = f"{type(error).__name__}: {error}"
            else:
                stock = module.__dict__.get("forward")
                bound = _Bound(module, name, kernel, call, stock)
                # Past nn.Module.__setattr__, which would make a submodule of it and change the state dict.
                module.__dict__["forward"] = module.__dict__[BOUND] = bound
                return ""
        if reason:
            reasons.append(f"{kernel.name}: {reason}")
    if reasons:
        return "; ".join(reasons)
    compressed = getattr(module, "quantization_scheme", None) is not None
    return "no technique of the recipe offers a kernel for it" if compressed else NOT_COMPRESSED


def _unbind(module: nn.Module) -> None:
    bound: _Bound = module.__dict__.pop(BOUND)
    if module.__dict__.get("forward") is not bound:
        # Something else wrapped the forward meanwhile and still calls the bound one, which must now step aside.
        bound.failure = bound.failure or "restored"
    elif bound.stock is None:
        del module.__dict__["forward"]
    else:
        module.__dict__["forward"] = bound.stock


def _mark(module: nn.Module) -> tuple[Any, ...]:
    """Changes when the weight is written to or replaced (inference tensors keep no version)."""
    weight: Any = module.weight
    version = None if weight.is_inference() else weight._version
    return weight.data_ptr(), version, weight.dtype, weight.device


def _decompress(model: nn.Module) -> None:
    """Do now what compressed-tensors would do at the first forward of a checkpoint that stock transformers loaded."""
    for module in model.modules():
        quantizer: Any = getattr(module, "hf_quantizer", None)
        if quantizer is not None and hasattr(module, "ct_decompress_hook"):
            quantizer.compressor.decompress_model(module)


def _warn_of(refusals: dict[str, str]) -> None:
    by_reason: dict[str, list[str]] = {}
    for name, reason in refusals.items():
        by_reason.setdefault(reason, []).append(name)
    if by_reason:
        parts = [f"{_few(names)} ({reason})" for reason, names in by_reason.items()]
        text = "these layers stay as they are: " + "; ".join(parts)
        warnings.warn(text, KernelWarning, stacklevel=3)


def _few(names: list[str], most: int = 3) -> str:
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest
