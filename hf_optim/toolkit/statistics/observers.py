"""Observers: context managers that watch the inputs of modules while calibration data passes through.

::

    with ChannelAbsMax({"layers.0.q_proj": module}) as amax:
        yield                                   # the host feeds batches
    amax["layers.0.q_proj"]                     # [in_features]

``with`` binds a dictionary from module name to statistic. A module that no input reached has no entry. The hooks are
gone when the block is left, however it is left. A non-finite input raises ``NumericalError`` naming the module: on a
CPU at once; on an accelerator, where looking at every input would make the host wait for it, when the block is left.

Where several ranks calibrate on a share of the data each (``sharing``), statistics are reduced over the ranks when the
block is left, and are the same on each.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import nn

from ...errors import NumericalError
from ..distributed import collectives
from . import gram

S = TypeVar("S")


class InputObserver(Generic[S]):
    """Base of the observers: one statistic per module, updated in the order in which the inputs come.

    Args:
        modules: name -> module. The names appear in the result and in messages.
        label: what the messages call the step that observes, such as ``run.label(step)``.
    """

    def __init__(self, modules: Mapping[str, nn.Module], label: str = "") -> None:
        self.modules = dict(modules)
        self.label = label
        self.found: dict[str, S] = {}
        self._handles: list[Any] = []
        self._finite: dict[str, torch.Tensor] = {}  # on accelerators: whether all inputs were, not looked at yet

    def __enter__(self) -> dict[str, S]:
        for name, module in self.modules.items():
            self._handles.append(module.register_forward_pre_hook(self._hook(name), with_kwargs=True))
        return self.found

    def __exit__(self, *raised: object) -> None:
        while self._handles:
            self._handles.pop().remove()
        self.release()
        flags, self._finite = self._finite, {}
        if raised and raised[0] is not None:
            return
        for name, finite in zip(flags, torch.stack(list(flags.values())).tolist() if flags else (), strict=True):
            if not finite:
                raise self._not_finite(name)
        if collectives.world_size() > 1 and self.modules:
            self.reduce()
        self.complete()

    def release(self) -> None:
        """Let go of what was held between two inputs. Called when the hooks are gone."""

    def complete(self) -> None:
        """Make the statistics of what was summed. Called last, unless something was raised."""

    def reduce(self) -> None:
        """Make ``found`` what one rank would have found that saw the data of all. Called on every rank.

        ``sharing`` has what it takes. An observer that does not say how its statistic is reduced cannot be used where
        there are several ranks.
        """
        raise NotImplementedError(f"{type(self).__name__} cannot be used by several ranks")

    def update(self, name: str, inputs: torch.Tensor) -> None:
        """Take one input of a module: the tensor as the module got it, shape ``[..., in_features]``."""
        raise NotImplementedError

    @property
    def device(self) -> torch.device | None:
        """Where the modules are; None where they have no parameters."""
        return next((p.device for module in self.modules.values() for p in module.parameters()), None)

    def _hook(self, name: str) -> Any:
        def observe(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            inputs = first_tensor(args, kwargs)
            if inputs is not None and inputs.numel():
                with torch.no_grad():
                    self.update(name, inputs)

        return observe

    def check_finite(self, name: str, summary: torch.Tensor) -> None:
        """Raise ``NumericalError`` unless ``summary``, made of one input of the module ``name``, is finite."""
        finite = torch.isfinite(summary).all()
        if finite.device.type != "cpu":
            self._finite[name] = finite & self._finite[name] if name in self._finite else finite
        elif not bool(finite):
            raise self._not_finite(name)

    def _not_finite(self, name: str) -> NumericalError:
        step = f"{self.label}: " if self.label else ""
        return NumericalError(
            f"{step}the input of {name} holds infinite or NaN values on the calibration data; check that the model "
            "computes finite outputs in this dtype (float16 overflows at 65504: load it in bfloat16 or float32)"
        )


def first_tensor(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> torch.Tensor | None:
    """The first tensor among the positional, then the keyword arguments of a call."""
    return next((value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)), None)


class ChannelAbsMax(InputObserver[torch.Tensor]):
    """Largest absolute input per channel: name -> float32 ``[in_features]``."""

    def update(self, name: str, inputs: torch.Tensor) -> None:
        peak = inputs.abs().flatten(0, -2).amax(0).float() if inputs.dim() > 1 else inputs.abs().float()
        self.check_finite(name, peak)
        known = self.found.get(name)
        self.found[name] = peak if known is None else torch.maximum(known, peak)

    def reduce(self) -> None:
        collectives.all_reduce_dict_(self.found, self.modules, "max", self.device)


class TensorMinMax(InputObserver[tuple[torch.Tensor, torch.Tensor]]):
    """Smallest and largest input value: name -> (minimum, maximum), float32 ``[1]`` each."""

    def update(self, name: str, inputs: torch.Tensor) -> None:
        low, high = (end.float().reshape(1) for end in torch.aminmax(inputs))
        self.check_finite(name, low + high)
        if name in self.found:
            low, high = torch.minimum(low, self.found[name][0]), torch.maximum(high, self.found[name][1])
        self.found[name] = (low, high)

    def reduce(self) -> None:
        lows = {name: low for name, (low, _) in self.found.items()}
        highs = {name: high for name, (_, high) in self.found.items()}
        collectives.all_reduce_dict_(lows, self.modules, "min", self.device)
        collectives.all_reduce_dict_(highs, self.modules, "max", self.device)
        self.found.update({name: (low, highs[name]) for name, low in lows.items()})


@dataclass
class GramMatrix:
    """The second moment of the inputs that some modules read.

    Attributes:
        total: sum over tokens of ``x xᵀ``, ``[in_features, in_features]``, in the observer's dtype.
        count: tokens summed.
        names: the modules that read these inputs, in order of execution.
    """

    total: torch.Tensor
    count: int
    names: list[str]

    @property
    def mean(self) -> torch.Tensor:
        """``E[x xᵀ]``, a matrix of its own."""
        return self.total / max(self.count, 1)


@dataclass
class _Reading:
    """An input in work: who has read it so far, and its ``xᵀx`` unless that is summed already."""

    inputs: torch.Tensor  # held, so that no other tensor can take its identity
    version: int
    names: list[str]
    product: torch.Tensor | None
    count: int


class SecondMoment(InputObserver[GramMatrix]):
    """``XᵀX`` of the inputs, summed in token order: name -> ``GramMatrix``, complete when the ``with`` block is left.

    Modules that read the same tensor (query, key and value; gate and up) share one ``GramMatrix``, computed once. That is
    found by the identity of the tensor, input by input: sums are kept per set of readers, and a module whose
    company changes gets the sum over all the sets it was in.

    How products are made, and in what precision: ``gram``.

    Args:
        modules, label: see ``InputObserver``.
        dtype: of the sums, float32 or float64.
    """

    def __init__(self, modules: Mapping[str, nn.Module], label: str = "", dtype: torch.dtype = torch.float32) -> None:
        super().__init__(modules, label)
        self.dtype = dtype
        self._open: _Reading | None = None
        self._sums: dict[tuple[str, ...], GramMatrix] = {}

    def update(self, name: str, inputs: torch.Tensor) -> None:
        reading = self._open
        if reading is not None and reading.inputs is inputs and reading.version == version_of(inputs):
            if reading.product is None:  # summed for its first reader alone
                self._add((name,), self._product(name, inputs), reading.count)
            else:
                reading.names.append(name)
            return
        self._close()
        alone = self._sums.get((name,))
        count = inputs.numel() // inputs.shape[-1]
        product: torch.Tensor | None = None
        if alone is not None:
            # It had no company before: sum in place, which saves a matrix of the largest width.
            gram.accumulate_(alone.total, _rows(inputs))
            alone.count += count
            self.check_finite(name, alone.total.diagonal())
        else:
            product = self._product(name, inputs)
        self._open = _Reading(inputs, version_of(inputs), [name], product, count)

    def release(self) -> None:
        self._close()

    def reduce(self) -> None:
        place = {name: index for index, name in enumerate(self.modules)}
        names = list(self.modules)
        widths = {key: len(moment.total) for key, moment in self._sums.items()}
        keys = collectives.union_over_ranks([(width, *(place[name] for name in key)) for key, width in widths.items()])
        mine, self._sums = self._sums, {}
        for width, *places in keys:
            key = tuple(names[index] for index in places)
            moment = mine.pop(key, None)
            if moment is None:  # only other ranks have met this company
                moment = GramMatrix(torch.zeros(width, width, dtype=self.dtype, device=self.device), 0, list(key))
            collectives.all_reduce_(moment.total, "sum")
            moment.count = collectives.sum_over_ranks(moment.count)
            self._sums[key] = moment

    def complete(self) -> None:
        made: dict[tuple[tuple[str, ...], ...], GramMatrix] = {}
        for moment in self._sums.values():
            gram.mirror_(moment.total)
        for name in dict.fromkeys(name for key in self._sums for name in key):  # in order of execution
            keys = tuple(key for key in self._sums if name in key)
            if keys not in made:
                parts = [self._sums[key] for key in keys]
                total = parts[0].total if len(parts) == 1 else torch.stack([part.total for part in parts]).sum(0)
                made[keys] = GramMatrix(total, sum(part.count for part in parts), [])
            made[keys].names.append(name)
            self.found[name] = made[keys]
        self._sums = {}

    def _close(self) -> None:
        reading, self._open = self._open, None
        if reading is not None and reading.product is not None:
            self._add(tuple(reading.names), reading.product, reading.count)

    def _add(self, key: tuple[str, ...], product: torch.Tensor, count: int) -> None:
        known = self._sums.get(key)
        if known is None:
            self._sums[key] = GramMatrix(product, count, list(key))
        else:
            known.total += product
            known.count += count

    def _product(self, name: str, inputs: torch.Tensor) -> torch.Tensor:
        width = inputs.shape[-1]
        product = torch.zeros(width, width, dtype=self.dtype, device=inputs.device)
        gram.accumulate_(product, _rows(inputs))
        self.check_finite(name, product.diagonal())
        return product


def _rows(inputs: torch.Tensor) -> torch.Tensor:
    return inputs.detach().reshape(-1, inputs.shape[-1])


def version_of(tensor: torch.Tensor) -> int:
    """The counter of in-place changes of a tensor; 0 for inference tensors, which do not keep one."""
    return 0 if tensor.is_inference() else tensor._version


class HessianDiagonal(InputObserver[torch.Tensor]):
    """``‖X_j‖²``, the sum over tokens of the squared input of each channel: name -> float32 ``[in_features]``."""

    def update(self, name: str, inputs: torch.Tensor) -> None:
        energy = inputs.detach().reshape(-1, inputs.shape[-1]).float().square().sum(0)
        self.check_finite(name, energy)
        self.found[name] = self.found[name] + energy if name in self.found else energy

    def reduce(self) -> None:
        collectives.all_reduce_dict_(self.found, self.modules, "sum", self.device)
