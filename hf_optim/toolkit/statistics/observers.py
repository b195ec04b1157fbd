"""Observers: context managers that collect statistics of the inputs of modules during calibration.

::

    with ChannelAbsMax({"layers.0.q_proj": module}) as absmax:
        yield                                   # the host runs the calibration batches
    absmax["layers.0.q_proj"]                   # [in_features]

``with`` binds a dictionary from module name to statistic. A module that no input reached has no entry. The hooks are
removed on exit of the block, also after an exception. A non-finite input raises ``NumericalError`` with the name of the
module: on a CPU immediately; on an accelerator, where checking every input would synchronize, on exit of the block.

Rows of padding are left out, as given by the masks of the batch (``topology.valid_rows``). A statistic that does not
come from an ``InputObserver`` calls ``valid_rows.select`` or ``valid_rows.mask_of`` on what it reads.

With several ranks that each calibrate on a part of the data (``distributed.collectives``), statistics are reduced over
the ranks on exit of the block, and are the same on all ranks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Generic, TypeVar

import torch
from torch import nn

from ...errors import NumericalError
from ..distributed import collectives
from ..topology import valid_rows

S = TypeVar("S")


class InputObserver(Generic[S]):
    """Base class of observers: one statistic per module, updated in the order of the inputs.

    Args:
        modules: name -> module. The names appear in the result and in messages.
        label: the name of the observing step in messages, such as ``run.label(step)``.
    """

    def __init__(self, modules: Mapping[str, nn.Module], label: str = "") -> None:
        self.modules = dict(modules)
        self.label = label
        self.found: dict[str, S] = {}
        self._handles: list[Any] = []
        self._finite: dict[str, torch.Tensor] = {}  # on accelerators: flags that are checked on exit

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
        """Release what is held between two inputs. Called after the hooks are removed."""

    def complete(self) -> None:
        """Compute the statistics from the sums. Called last, unless the block raised."""

    def reduce(self) -> None:
        """Reduce ``found`` over the ranks to what a single rank would find on all data. Called on every rank.

        Use the functions of ``distributed.collectives``. An observer that does not override this method cannot be used
        with several ranks.
        """
        raise NotImplementedError(f"{type(self).__name__} cannot be used by several ranks")

    def update(self, name: str, inputs: torch.Tensor) -> None:
        """Update the statistic with one input of the module ``name``.

        ``inputs`` is ``[..., in_features]`` as the module got it, or ``[n, in_features]`` without rows of padding.
        """
        raise NotImplementedError

    @property
    def device(self) -> torch.device | None:
        """The device of the modules; None if they have no parameters."""
        return next((p.device for module in self.modules.values() for p in module.parameters()), None)

    def _hook(self, name: str) -> Any:
        def observe(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            inputs = first_tensor(args, kwargs)
            rows = None if inputs is None else valid_rows.select(module, inputs)
            if rows is not None and rows.numel():
                with torch.no_grad():
                    self.update(name, rows)

        return observe

    def check_finite(self, name: str, summary: torch.Tensor) -> None:
        """Raise ``NumericalError`` unless ``summary``, computed from an input of the module ``name``, is finite."""
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
    """Return the first tensor among the positional, then the keyword arguments of a call; None if there is none."""
    return next((value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)), None)


class ChannelAbsMax(InputObserver[torch.Tensor]):
    """Largest absolute input per channel: name -> float32 ``[in_features]``."""

    def update(self, name: str, inputs: torch.Tensor) -> None:
        absmax = inputs.abs().flatten(0, -2).amax(0).float() if inputs.dim() > 1 else inputs.abs().float()
        self.check_finite(name, absmax)
        known = self.found.get(name)
        self.found[name] = absmax if known is None else torch.maximum(known, absmax)

    def reduce(self) -> None:
        collectives.all_reduce_dict_(self.found, self.modules, "max", self.device)


class ChannelAbsMean(InputObserver[torch.Tensor]):
    """Mean absolute input per channel, over tokens: name -> float64 ``[in_features]``."""

    def __init__(self, modules: Mapping[str, nn.Module], label: str = "") -> None:
        super().__init__(modules, label)
        self._counts: dict[str, torch.Tensor] = {}

    def update(self, name: str, inputs: torch.Tensor) -> None:
        rows = inputs.abs().reshape(-1, inputs.shape[-1])
        total = rows.sum(0, dtype=torch.float64)
        self.check_finite(name, total)
        count = torch.tensor(float(len(rows)), dtype=torch.float64, device=total.device)
        known = self.found.get(name)
        self.found[name] = total if known is None else known + total
        self._counts[name] = count if known is None else self._counts[name] + count

    def reduce(self) -> None:
        collectives.all_reduce_dict_(self.found, self.modules, "sum", self.device)
        collectives.all_reduce_dict_(self._counts, self.modules, "sum", self.device)

    def complete(self) -> None:
        for name, total in self.found.items():
            self.found[name] = total / self._counts[name]


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


class HessianDiagonal(InputObserver[torch.Tensor]):
    """``‖X_j‖²``, the sum over tokens of the squared input of each channel: name -> float32 ``[in_features]``.

    This is the diagonal of the Gram matrix ``XᵀX``.
    """

    def update(self, name: str, inputs: torch.Tensor) -> None:
        squares = inputs.detach().reshape(-1, inputs.shape[-1]).float().square().sum(0)
        self.check_finite(name, squares)
        self.found[name] = self.found[name] + squares if name in self.found else squares

    def reduce(self) -> None:
        collectives.all_reduce_dict_(self.found, self.modules, "sum", self.device)
