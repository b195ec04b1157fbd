"""Sparse projections learn the queries, keys and values of the dense ones, on calibration data.

Each attention learns by itself, from the hidden states that the dense model gives it: its forward goes on with what the
dense projections return, so no attention learns from the errors of another.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from hf_optim import ModelError, NumericalError

from ._held_parts import TokenRows
from ._sparse_qkv_layout import DenseProjections

LARGEST_GRADIENT = 1.0  # norm


@dataclass(eq=False)
class _Pupil:
    part: Any
    dense: DenseProjections
    optimizer: torch.optim.Optimizer
    steps: int = 0
    error: dict[str, list[float]] = field(default_factory=lambda: {"before": [0.0, 0.0], "after": [0.0, 0.0]})


class ProjectionFit:
    """A context in which the forwards of a model let its sparse projections learn.

    Args:
        parts: name of an attention -> its dense projections.
        label: begins messages.
        steps: optimizer steps of each, one for each batch.
        rate: the highest learning rate of Adam, which falls to zero by a cosine.
    """

    def __init__(self, parts: Mapping[str, DenseProjections], label: str, steps: int, rate: float) -> None:
        self._label, self._steps, self._rate, self._phase = label, steps, rate, "before"
        self._pupils = {
            name: _Pupil(
                dense.attention.sparse_qkv, dense, torch.optim.Adam(dense.attention.sparse_qkv.parameters(), lr=rate)
            )
            for name, dense in parts.items()
        }
        self._handles: list[Any] = []

    def passes(self) -> Iterator[None]:
        """Yield before each pass over the data: one that measures, those that learn, one that measures."""
        yield
        for name, pupil in self._pupils.items():
            if not pupil.error["before"][1]:
                raise ModelError(f"{self._label}: no calibration batch reached {name}; calibrate with other data")
        self._phase = "learning"
        while any(pupil.steps < self._steps for pupil in self._pupils.values()):
            yield
        self._phase = "after"
        yield

    def figures(self) -> dict[str, Any]:
        """Return the relative squared errors of queries, keys and values before and after, in the mean over layers."""
        means = {
            when: sum(pupil.error[when][0] / pupil.error[when][1] for pupil in self._pupils.values())
            / len(self._pupils)
            for when in ("before", "after")
        }
        return {"steps": self._steps, **means}

    def __enter__(self) -> ProjectionFit:
        for name, pupil in self._pupils.items():
            self._handles.append(pupil.part.register_forward_hook(self._hook(name, pupil)))
        return self

    def __exit__(self, *exception: Any) -> None:
        for handle in self._handles:
            handle.remove()

    def _hook(self, name: str, pupil: _Pupil) -> Any:
        def hook(part: nn.Module, args: Any, output: Any) -> Any:
            hidden, rows = args[0].detach(), args[1]
            dense = pupil.dense(hidden)
            learns = self._phase == "learning" and pupil.steps < self._steps
            if self._phase != "learning":
                error, scale = _squares(output[:3], dense, rows)
                self._measure(name, pupil, float(error), float(scale))
            elif learns:
                self._step(name, pupil, hidden.clone(), dense, rows)
            return *dense, output[3]

        return hook

    def _measure(self, name: str, pupil: _Pupil, error: float, scale: float) -> None:
        if not math.isfinite(error + scale):
            raise NumericalError(f"{self._label}: the projections of {name} are not finite")
        total = pupil.error[self._phase]
        total[0], total[1] = total[0] + error, total[1] + scale

    def _step(self, name: str, pupil: _Pupil, hidden: Tensor, dense: tuple[Tensor, ...], rows: TokenRows) -> None:
        with torch.inference_mode(False), torch.enable_grad():
            dense = tuple(part.clone() for part in dense)
            made = type(pupil.part).forward(pupil.part, hidden.clone(), rows)
            error, scale = _squares(made[:3], dense, rows)
            loss = error / scale.clamp_min(torch.finfo(scale.dtype).tiny)
            if not bool(torch.isfinite(loss)):
                raise NumericalError(f"{self._label}: the loss of {name} is not finite at step {pupil.steps}")
            pupil.optimizer.param_groups[0]["lr"] = self._rate * (1 + math.cos(math.pi * pupil.steps / self._steps)) / 2
            pupil.optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(list(pupil.part.parameters()), LARGEST_GRADIENT)
            pupil.optimizer.step()
            pupil.optimizer.zero_grad()
        pupil.steps += 1


def _squares(made: Any, dense: Any, rows: TokenRows) -> tuple[Tensor, Tensor]:
    """Return the squared error of queries, keys and values, each relative to its own, and their number."""
    total: Tensor | None = None
    count = 0
    for found, wanted in zip(made, dense, strict=True):
        if found is None:
            continue
        wide, target = rows.cleared(found).float(), rows.cleared(wanted).float()
        one = (wide - target).square().sum() / target.square().sum().clamp_min(1e-20)
        total, count = one if total is None else total + one, count + 1
    assert total is not None
    return total, total.new_tensor(float(count))


@contextmanager
def handing_dense(parts: Mapping[str, DenseProjections], projections: bool = True) -> Iterator[None]:
    """Let a model compute what it did before: with its dense projections, and their output projection.

    ``projections`` False leaves those of queries, keys and values to a ``ProjectionFit``.
    """
    handles, outputs = [], {}
    for dense in parts.values():
        outputs[dense] = getattr(dense.attention, dense.output_name)
        setattr(dense.attention, dense.output_name, dense.output)
        if not projections:
            continue

        def hook(module: nn.Module, args: Any, output: Any, dense: DenseProjections = dense) -> Any:
            query, key, value = dense(args[0])
            return query, key, value, output[3]

        handles.append(dense.attention.sparse_qkv.register_forward_hook(hook))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for dense, output in outputs.items():
            setattr(dense.attention, dense.output_name, output)
