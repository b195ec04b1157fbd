"""Distillation of attention outputs: each converted attention learns to give what the dense one gave.

    minimize  sum over tokens |A_new(x; theta) - A_dense(x)|^2  for each layer by itself,  x = inputs of the dense model

The layers do not depend on each other, so all of them learn in the same passes over the calibration data, and nothing
of these passes is stored: the model runs with its dense attention, and when an attention module has given its output,
the converted attention computes the same call with gradients, and makes one step. A step needs the activations of one
attention. Losses of this kind initialize linear attention in Zhang et al., "The Hedgehog & the Porcupine", 2402.04347.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils import _pytree as pytree
from transformers import AttentionInterface, Cache, PreTrainedModel

from ...errors import ModelError, NumericalError, RecipeError
from ..attention import Attachment, Band, Pattern
from ..distributed import collectives
from ..topology import valid_rows

LARGEST_GRADIENT = 1.0  # norm; larger gradients are scaled down to it
WARM_UP = 0.05  # share of the steps in which the learning rate rises; after it, it falls to zero

DENSE = Attachment("hf_optim_dense", lambda settings, layer, heads, causal: [Pattern((Band(None, None),), causal)])
"""Full attention, of the masks that patterns and learned attention get."""


@dataclass(eq=False)
class _Pupil:
    """What is known of an attention module while it learns."""

    module: nn.Module
    weights: dict[str, Tensor]  # float32 or float64 copies that learn
    optimizer: torch.optim.Optimizer
    masks: dict[str, Tensor]  # 0 for weights that stay zero
    steps: int = 0
    error: dict[str, list[float]] = field(default_factory=lambda: {"before": [0.0, 0.0], "after": [0.0, 0.0]})

    def current(self) -> dict[str, Tensor]:
        """Return the weights as they are now, zero where masks say so."""
        return {key: value * self.masks[key] if key in self.masks else value for key, value in self.weights.items()}


class AttentionDistillation:
    """Context manager in whose ``with`` block forwards of a converted model train its attention, layer by layer.

    The model's class says by its configuration which implementation of attention it has. In the block that
    implementation computes full attention, with the weights that the model had when the block began, so every layer
    reads what it read in the dense model. Use it in the hook ``calibrate``, on the whole model::

        def needs_data(self):
            return self.distill_steps > 0

        def needs_whole_model(self):
            return True

        @hookimpl
        def calibrate(self, run, scope):
            if not self.distill_steps:
                return
            found = attention_modules(run.model)          # name -> module
            with AttentionDistillation(run.model, found, run.label(self), self.distill_steps) as distillation:
                yield from distillation.passes()
            run.report(self, distillation=distillation.figures())

    Args:
        model: a model whose attention has been converted.
        modules: name -> its attention modules: those that call the attention function. What is compared is the
            (first) output of their forwards.
        label: of the step, for messages.
        steps: optimizer steps of each module, one for each batch.
        rate: the highest learning rate of Adam.
        trains: ``all`` weights of the modules, those that are ``learned`` parts (parameters under ``learned.``), or
            those of the ``projections``, the others.
        masks: name of a parameter in ``model`` -> bool: weights that stay zero are False, as in ``run.masks``.

    After the block the modules have the weights that they learned. If it is left by an exception, they have those from
    before it.

    Raises:
        ModelError: a module has no parameter that ``trains`` names, is not called, or gives outputs of another shape.
        NumericalError: a loss, a gradient or an output is not finite.
        RecipeError: on several ranks.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        modules: Mapping[str, nn.Module],
        label: str,
        steps: int,
        rate: float = 1e-3,
        trains: Literal["all", "learned", "projections"] = "all",
        masks: Mapping[str, Tensor] | None = None,
    ) -> None:
        if collectives.world_size() > 1:
            raise RecipeError(
                f"{label}: attention learns from batches one by one, which ranks cannot share: use one rank"
            )
        self._model, self._label, self._steps, self._rate = model, label, steps, rate
        self._pupils = {name: self._pupil(name, module, trains, masks or {}) for name, module in modules.items()}
        self._function: Any = None
        self._learning = False
        self._phase: Literal["before", "learning", "after"] = "before"
        self._handles: list[Any] = []
        self._name = ""

    def _pupil(self, name: str, module: nn.Module, trains: str, masks: Mapping[str, Tensor]) -> _Pupil:
        weights, own = {}, {}
        for key, parameter in module.named_parameters():
            learned = key.startswith("learned.")
            if not parameter.is_floating_point() or (trains != "all" and learned != (trains == "learned")):
                continue
            dtype = torch.promote_types(parameter.dtype, torch.float32)
            weights[key] = parameter.detach().to(dtype, copy=True).requires_grad_()
            if (mask := masks.get(f"{name}.{key}")) is not None:
                own[key] = mask.to(parameter.device, dtype)
        if not weights:
            raise ModelError(f"{self._label}: {name} has no {trains} weights to distill attention into")
        optimizer = torch.optim.Adam(list(weights.values()), lr=self._rate)
        return _Pupil(module, weights, optimizer, own)

    def passes(self) -> Iterator[None]:
        """Yield before each pass over the calibration data: one that measures, those that learn, one that measures."""
        self._phase = "before"
        yield
        self._require_called()
        self._phase = "learning"
        while any(pupil.steps < self._steps for pupil in self._pupils.values()):
            yield
        self._phase = "after"
        yield

    def _require_called(self) -> None:
        for name, pupil in self._pupils.items():
            if not pupil.error["before"][1]:
                raise ModelError(
                    f"{self._label}: no calibration batch reached {name}, or its outputs are all zero; calibrate with "
                    "other data"
                )

    def figures(self) -> dict[str, Any]:
        """Return the relative squared error of each module before and after, on the calibration data, and the mean."""
        layers = {
            name: {when: _ratio(pupil.error[when]) for when in ("before", "after")}
            for name, pupil in self._pupils.items()
        }
        means = {when: sum(own[when] for own in layers.values()) / max(1, len(layers)) for when in ("before", "after")}
        return {"steps": self._steps, **means, "layers": layers}

    def __enter__(self) -> AttentionDistillation:
        self._name = self._model.config._attn_implementation
        self._function = AttentionInterface._global_mapping[self._name]
        AttentionInterface.register(self._name, self._attention)
        for name, pupil in self._pupils.items():
            hook = pupil.module.register_forward_hook(self._hook(name, pupil), with_kwargs=True)
            self._handles.append(hook)
        return self

    def __exit__(self, kind: Any, *exception: Any) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        AttentionInterface.register(self._name, self._function)
        if kind is None:
            self._write()

    @torch.no_grad()
    def _write(self) -> None:
        for pupil in self._pupils.values():
            for key, value in pupil.current().items():
                pupil.module.get_parameter(key).copy_(value)

    def _attention(self, *args: Any, **kwargs: Any) -> Any:
        return (self._function if self._learning else DENSE.attention)(*args, **kwargs)

    @contextmanager
    def _converted(self) -> Iterator[None]:
        self._learning = True
        try:
            yield
        finally:
            self._learning = False

    def _hook(self, name: str, pupil: _Pupil) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            if self._learning:
                return
            dense = _first(output).detach()
            training = self._phase == "learning"
            if training and pupil.steps >= self._steps:
                return
            given = pytree.tree_map(_alone, (args, kwargs), is_leaf=lambda leaf: isinstance(leaf, Cache))
            with torch.inference_mode(False), torch.set_grad_enabled(training), self._converted():
                weights = {key: value.to(module.get_parameter(key).dtype) for key, value in pupil.current().items()}
                found = _first(functional_call(module, weights, *given))
                if found.shape != dense.shape:
                    raise ModelError(
                        f"{self._label}: {name} gives outputs of shape {list(found.shape)}, its dense attention those "
                        f"of shape {list(dense.shape)}: they cannot be compared"
                    )
                rows = valid_rows.mask_of(module, dense)
                loss, scale = _squares(found, dense, rows)
                if training:
                    self._step(name, pupil, loss / scale.clamp_min(torch.finfo(scale.dtype).tiny))
                else:
                    self._measure(name, pupil, float(loss), float(scale))

        return hook

    def _measure(self, name: str, pupil: _Pupil, loss: float, scale: float) -> None:
        if not math.isfinite(loss) or not math.isfinite(scale):
            raise NumericalError(f"{self._label}: outputs of {name} are not finite {self._phase} it learned")
        total = pupil.error[self._phase]
        total[0], total[1] = total[0] + loss, total[1] + scale

    def _step(self, name: str, pupil: _Pupil, loss: Tensor) -> None:
        if not bool(torch.isfinite(loss)):
            raise NumericalError(f"{self._label}: the loss of {name} is not finite at step {pupil.steps}")
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(list(pupil.weights.values()), LARGEST_GRADIENT)
        if not bool(torch.isfinite(norm)):
            raise NumericalError(f"{self._label}: the gradient of {name} is not finite at step {pupil.steps}")
        for group in pupil.optimizer.param_groups:
            group["lr"] = self._rate * _schedule(pupil.steps, self._steps)
        pupil.optimizer.step()
        pupil.optimizer.zero_grad()
        pupil.steps += 1


def _first(output: Any) -> Tensor:
    """Return the tensor that a module returned, or the first of several."""
    found = output if isinstance(output, Tensor) else output[0]
    return found


def _alone(leaf: Any) -> Any:
    """Return an argument of a forward without its history; None for a cache, which the dense call has updated."""
    if isinstance(leaf, Cache):
        return None
    # Only where there is one: a copy would lose what tensors carry as attributes.
    return leaf.detach() if isinstance(leaf, Tensor) and leaf.requires_grad else leaf


def _squares(found: Tensor, dense: Tensor, rows: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the sum of squares of the difference, and of ``dense``, over the rows that count."""
    dtype = torch.promote_types(found.dtype, torch.float32)
    difference, reference = found.to(dtype) - dense.to(dtype), dense.to(dtype)
    if rows is not None:
        difference, reference = difference[rows], reference[rows]
    return difference.square().sum(), reference.square().sum()


def _schedule(step: int, steps: int) -> float:
    """Return the share of the highest learning rate: it rises in ``WARM_UP`` of the steps, and falls to zero."""
    rising = max(1, round(WARM_UP * steps))
    return min((step + 1) / rising, (steps - step) / max(1, steps - rising + 1), 1.0)


def _ratio(sums: list[float]) -> float:
    return sums[0] / sums[1] if sums[1] else 0.0
