r"""Quantization-aware training: the forward pass sees weights (and inputs) on their grid, the optimizer moves floats.

``y = Q(x) Q(W)ᵀ + b`` with ``Q(v) = (clamp(round(v / s) + z) - z) s`` in the forward pass (1712.05877, section 3). In
the backward pass the rounding counts as the identity where nothing was clamped, and stops the gradient elsewhere: the
straight-through estimator (1308.3432). Scales follow from the current weights at each step, or are learned with the
gradient of LSQ (1902.08153, equation 3); see ``hf_optim.toolkit.quantization.fake_quant``. For the learned scale of
inputs (``dynamic: false``) LSQ's ``N`` is the number of a layer's input features.

During training the targeted layers are ``nn.Linear`` with another class and their own parameters. A ``checkpoint-N`` is
therefore an ordinary checkpoint; learned scales are saved in the files that hf_optim's callbacks write beside it. The
last forward pass and the stored codes give bitwise identical numbers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from hf_optim import (
    ModelError,
    Paper,
    RecipeError,
    Reload,
    Scope,
    Technique,
    compressed,
    hookimpl,
    option,
    technique,
)
from hf_optim.toolkit.pruning import TRAINING_FORWARD, schedules
from hf_optim.toolkit.quantization import (
    Grid,
    GridSpec,
    fake_quant,
    make_grid,
)
from hf_optim.toolkit.topology import summarize

from . import _recompute
from ._weights import QUANTIZES, bits_phrase, keep_bits, report_bits, require_storable, weight_spec

if TYPE_CHECKING:
    from compressed_tensors.quantization import QuantizationScheme

    from hf_optim import Card, Run


@technique(
    "qat",
    family="quantization",
    paper=Paper(
        "1712.05877",
        "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference",
        2018,
    ),
    contract=dataclasses.replace(QUANTIZES, owns={TRAINING_FORWARD}),
    reload=Reload.STOCK_FORMAT,
    trains=True,
)
class QAT(Technique):
    """Train with fake-quantized weights, and optionally inputs (quantization-aware training).

    Runs in a stock ``Trainer`` with ``hf_optim.callbacks(model)``, also with learned scales; ``scale_learning_rate``
    needs ``hf_optim.OptimTrainer``. Layers compute on their grid from the creation of those callbacks to the end of
    training; a training loop that calls no callbacks trains without the grid, and the weights are merely rounded.

    Attributes:
        targets: linear layers to quantize, by class, name or pattern.
        skip: patterns of layers to leave out.
        bits: of a weight, 2 to 8 (bits that an earlier step has assigned take precedence); None leaves the weights
            unquantized.
        format: ``"int"``, or ``"fp8"``: float8 (e4m3) weights, with ``bits: 8``.
        strategy: which weights share a scale: ``"tensor"``, ``"channel"`` (an output channel) or ``"group"`` (of
            inputs). None: ``group`` if a ``group_size`` is given, else ``channel``.
        group_size: inputs that share a scale; the largest divisor of the layer's width up to it is used.
        symmetric: no zero points for weights. Asymmetric codes are stored one to a byte (see
            ``hf_optim.compressed.scheme``); zero points stay constant if scales are learned.
        observer: scales from ``"minmax"`` of the weights, or from a search for the least squared error (``"mse"``,
            slow), at every step; learned scales start there, or at LSQ's ``"mean"``: ``2 mean|w| / sqrt(Q_P)``.
        learn_scales: train the scales of the weights with LSQ's gradient. The trainer's weight decay applies to them
            too, unless ``scale_learning_rate`` is set.
        scale_learning_rate: of learned scales; None uses that of the weights.
        activations: quantize the inputs of the layers to ``"int8"`` or ``"fp8"``.
        dynamic: compute the scale of the inputs on the fly, per token. False: one per layer, learned
            (``learn_scales``), starting at LSQ's initial value on the first batch.
        symmetric_activations: no zero point for the inputs' grid.
        begin: when quantization starts, after training without it: a step, or a share of training.
    """

    targets: tuple[str, ...] = ("Linear",)
    skip: tuple[str, ...] = ()
    bits: int | None = option(4, low=2, high=8)
    format: Literal["int", "fp8"] = "int"
    strategy: Literal["tensor", "channel", "group"] | None = None
    group_size: int | None = option(None, low=1)
    symmetric: bool = True
    observer: Literal["minmax", "mse", "mean"] = "minmax"
    learn_scales: bool = False
    scale_learning_rate: float | None = option(None, low=0.0)
    activations: Literal["int8", "fp8"] | None = None
    dynamic: bool = True
    symmetric_activations: bool = True
    begin: int | float = option(0, low=0)

    def validate(self) -> None:
        fp8 = self.format == "fp8"
        wrong = {
            "bits: null quantizes nothing without activations: int8 or fp8": self.bits is None and not self.activations,
            "format fp8 has 8 bits, no zero point and scales per tensor or channel": fp8
            and (self.bits != 8 or not self.symmetric or self.group_size is not None),
            "strategy group needs a group_size, such as 128": self.strategy == "group" and self.group_size is None,
            f"group_size and strategy {self.strategy} exclude each other": self.group_size is not None
            and self.strategy in ("tensor", "channel"),
            "observer mean initializes learned, symmetric scales: set learn_scales, or use minmax or mse": (
                self.observer == "mean" and not (self.learn_scales and self.symmetric)
            ),
            "scale_learning_rate needs learn_scales": self.scale_learning_rate is not None and not self.learn_scales,
            "dynamic: false learns the scale of the inputs: set activations and learn_scales": not self.dynamic
            and not (self.activations and self.learn_scales),
            "learned scales of inputs and fp8 have no zero point; leave symmetric_activations at true": (
                not self.symmetric_activations and (not self.dynamic or self.activations == "fp8")
            ),
            f"begin is a share of training in [0, 1] or a whole number of steps, not {self.begin!r}": (
                isinstance(self.begin, float) and self.begin > 1.0
            ),
        }
        for reason, holds in wrong.items():
            if holds:
                raise RecipeError(f"qat: {reason}")

    def implements(self, hook: str) -> bool:
        # Without its own learning rate, a learned scale is an ordinary parameter of the Trainer.
        return super().implements(hook) and (hook != "parameter_groups" or self.scale_learning_rate is not None)

    def training_bytes(self, width: int) -> float:
        # The rounded weight, where it was not clamped, and for learned scales their slope.
        return 1.0 + (2.0 if self.learn_scales else 1.0) * width

    def check_model(self, model: Any, label: str) -> None:
        require_storable(self, model, label, integer=self.format == "int" and self.bits is not None)

    @hookimpl
    def training_callbacks(self, run: Run) -> list[TrainerCallback]:
        return [FakeQuantization(self, run, self.prepare(run))]

    @hookimpl
    def parameter_groups(self, run: Run, model: nn.Module) -> list[dict[str, Any]] | None:
        if self.scale_learning_rate is None:
            return None
        steps = [p for name, p in model.named_parameters() if name.rpartition(".")[2] in fake_quant.LEARNED_SCALES]
        return [{"params": steps, "lr": self.scale_learning_rate, "weight_decay": 0.0}]

    def prepare(self, run: Run) -> dict[str, fake_quant.FakeQuantLinear]:
        """Return the layers in training by name; the first call attaches them. Raises ``ModelError`` without any."""
        layers = fake_quant.fake_quant_layers(run.model.named_modules())
        if layers:
            return layers
        label = run.label(self)
        found, skipped = compressed.storable(
            Scope("", run.model, run.model),
            self.targets,
            self.skip,
            integer=self.format == "int" and self.bits is not None,
            label=label,
        )
        for name, layer in found.items():
            if type(layer).forward is not nn.Linear.forward or "forward" in vars(layer):
                skipped.setdefault(f"a {type(layer).__name__} does not compute as nn.Linear", []).append(name)
                continue
            layers[name] = self._attach(run, name, layer)
        run.cover(self, layers, skipped)
        if not layers:
            raise ModelError(f"{label} found nothing to quantize in {type(run.model).__name__}. {summarize(skipped)}")
        return layers

    def _attach(self, run: Run, name: str, layer: nn.Linear) -> fake_quant.FakeQuantLinear:
        spec = None if self.bits is None else self._spec(layer.weight.shape[1], run.bits_of(name, self.bits))
        observer: Literal["minmax", "mse"] = "mse" if self.observer == "mse" else "minmax"
        fake = fake_quant.attach_fake_quant(layer, spec, observer, quantize_input=self._inputs(spec))
        if not self.learn_scales:
            return fake
        if spec is not None:
            weight = layer.weight.detach()
            mean = self.observer == "mean"
            grid = Grid(spec, fake_quant.initial_scale(weight, spec)) if mean else make_grid(weight, spec, observer)
            fake.learn_scale(grid)
        if not self.dynamic:
            fake.input_step = nn.Parameter(torch.zeros(1, device=layer.weight.device))
        return fake

    def _spec(self, in_features: int, bits: int) -> GridSpec:
        return weight_spec(
            in_features, bits, self.group_size, self.symmetric, strategy=self.strategy, format=self.format
        )

    def scheme(self, spec: GridSpec | None) -> QuantizationScheme:
        """Return the scheme of a layer with this grid."""
        return compressed.scheme_of(spec, self.activations, not self.dynamic, self.symmetric_activations)

    def _inputs(self, spec: GridSpec | None) -> fake_quant.InputQuantizer | None:
        if self.activations is None:
            return None
        if self.dynamic:
            rounded = compressed.input_quantizer(self.scheme(spec))
            return lambda layer, input: rounded(input)  # nothing is clamped, so the whole gradient passes
        return LearnedInputs(GridSpec(8, "float" if self.activations == "fp8" else "int", "tensor"), self.scheme(spec))

    @hookimpl
    def finalize_model(self, run: Run) -> None:
        not_reached, trained = [], 0
        for name, layer in self.prepare(run).items():
            if not self.dynamic and not bool(layer.input_step > 0):
                not_reached.append(name)
                fake_quant.detach_fake_quant(layer)
                continue
            if layer.spec is not None:
                keep_bits(self, run, {name: layer.spec.bits})
            trained += 1
            store(layer, self.scheme(layer.spec))
        if not_reached:
            run.cover(self, [], {"no training input reached it": not_reached})
        compressed.attach_quantizer(run.model)
        run.report(self, layers=trained)
        if self.bits is not None:
            report_bits(self, run)

    def recompute(self, case: Any) -> dict[str, Any]:
        bits = {"layers_by_bits": _recompute.layers_by_bits(case)} if self.bits is not None else {}
        return {"layers": len(compressed.quantized_modules(case.stored)), **bits}

    @hookimpl
    def export(self, run: Run, directory: Path, card: Card) -> None:
        metrics = run.reported(self)
        what = [f"weights of {bits_phrase(metrics['layers_by_bits'])}"] if self.bits is not None else []
        what += [f"{self.activations} inputs"] if self.activations else []
        scales = "learned (LSQ)" if self.learn_scales else f"from the weights ({self.observer})"
        card.paragraph(
            "Quantization-aware training",
            f"{metrics['layers']} linear layers were trained with {' and '.join(what)} in the forward pass and a "
            f"straight-through gradient; scales were {scales}.",
        )


class LearnedInputs:
    """Inputs on a grid with a learned scale, initialized as LSQ's on the first batch."""

    def __init__(self, spec: GridSpec, scheme: QuantizationScheme) -> None:
        self.spec, self.scheme = spec, scheme

    def __call__(self, layer: fake_quant.FakeQuantLinear, input: Tensor) -> Tensor:
        step = layer.input_step
        if not bool(step > 0):
            if not layer.training:
                return input
            with torch.no_grad():
                step.copy_(fake_quant.initial_scale(input, self.spec, layer.weight.dtype))
        scale = fake_quant.round_scale(step, layer.weight.dtype, self.spec)
        found = fake_quant.fake_quantize(input, Grid(self.spec, scale), input.shape[-1])
        # The value is that of the stored format, which rounds in the dtype of the input; the gradient is LSQ's.
        rounded = compressed.input_quantizer(self.scheme, scale.detach().to(layer.weight.dtype))
        return rounded(input.detach()) + (found - found.detach())


def store(layer: fake_quant.FakeQuantLinear, scheme: QuantizationScheme) -> None:
    """Quantize and store a layer with the codes and scales that its next forward pass would use."""
    step = layer._parameters.get("input_step")
    quantizer = layer.quantize_input
    scale = None
    if step is not None and isinstance(quantizer, LearnedInputs):
        scale = fake_quant.round_scale(step.detach(), layer.weight.dtype, quantizer.spec)
    codes, grid = layer.quantize_weight() if layer.spec is not None else (None, None)
    linear = fake_quant.detach_fake_quant(layer)
    if grid is None:
        compressed.store(linear, scheme, input_scale=scale)
    else:
        compressed.store(linear, scheme, codes, grid.scale, grid.zero_point, scale)


class FakeQuantization(TrainerCallback):
    """Enables quantization at step ``begin``, and keeps learned scales in the state of the run."""

    def __init__(self, step: QAT, run: Run, layers: Mapping[str, fake_quant.FakeQuantLinear]) -> None:
        self.step, self.run, self.layers = step, run, layers
        for key, parameter in self._learned_scales():
            setattr(run.state(step), key, parameter)

    def _learned_scales(self) -> list[tuple[str, nn.Parameter]]:
        found = [(name, layer._parameters) for name, layer in self.layers.items()]
        return [
            (f"{name}.{key}", scale)
            for name, own in found
            for key in fake_quant.LEARNED_SCALES
            if (scale := own.get(key)) is not None
        ]

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._load_scales()
        self._enable(state)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._enable(state)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._enable(state)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._load_scales()

    @torch.no_grad()
    def _load_scales(self) -> None:
        """Copy the scales of a checkpoint that was just read, whose tensors are then in the state of the run."""
        own = self.run.state(self.step)
        for key, parameter in self._learned_scales():
            saved = getattr(own, key)
            if saved is not parameter:
                parameter.copy_(saved)
                setattr(own, key, parameter)

    def _enable(self, state: Any) -> None:
        active = state.global_step >= schedules.as_step(self.step.begin, state.max_steps)
        for layer in self.layers.values():
            layer.active = active


@hookimpl
def register_techniques(register):
    register(QAT)
