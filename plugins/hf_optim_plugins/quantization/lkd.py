r"""Layer-by-layer knowledge distillation: each quantized block is trained to reproduce the original block's output.

ZeroQuant (2206.01861, section 3.3 and its equation for ``L_LKD``) trains one transformer block ``L̂_k`` at a time,
with weights on their grid, towards the block ``L_k`` that it replaces; both read the output of the *original* blocks
before them on the data::

    loss_k = MSE(L_k(x), L̂_k(x)),      x = L_{k-1}(... L_1(X))

So no second model is in memory, gradients and optimizer state exist for one block at a time, and no labels are needed:
any text works, and random tokens do too (``calibration="random"``, or ``calibration: {dataset: random}`` in a recipe).

The gradient passes through the rounding (``hf_optim.toolkit.quantization.fake_quant``). The state kept for a block is
the best one measured, on the same 32 sequences for all states, including the one before training; a gain below a tenth
is confirmed on all data. So the loss of no block rises. The paper keeps the last state. It trains the weights of a
block; here its biases and norm weights are trained as well (``train``).

There are two uses. From floating-point weights, the grid follows from the weights as they are trained; with a learning
rate of 0 this is plain rounding. After a step of the same stage that quantized the model, the layers keep their scheme
and grid, and training moves their codes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from hf_optim import (
    Contract,
    ModelError,
    Paper,
    Phase,
    Reload,
    Technique,
    compressed,
    hookimpl,
    option,
    technique,
    traits,
)
from hf_optim.toolkit.quantization import (
    Grid,
    GridSpec,
    block_reconstruction,
    fake_quant,
    make_grid,
)

from . import _recompute
from ._weights import cover_outside_blocks, require_storable, select_layers, weight_spec

if TYPE_CHECKING:
    from compressed_tensors.quantization import QuantizationScheme

    from hf_optim import Card, Run, Scope


@dataclasses.dataclass(frozen=True, eq=False)
class Student:
    """A layer in training: its quantization, and the floating-point weights that the optimizer updates.

    Attributes:
        layer: the layer.
        scheme: the scheme with which it will be stored.
        grid: its grid before training.
        latent: ``[out, in]``, float32 (float64 for float64 layers), the weights that are rounded.
        fixed: True if the grid does not follow the weights.
        input_scale, input_zero: of statically quantized inputs.
    """

    layer: nn.Linear
    scheme: QuantizationScheme
    grid: Grid
    latent: Tensor
    fixed: bool
    input_scale: Tensor | None = None
    input_zero: Tensor | None = None


@technique(
    "lkd",
    family="quantization",
    paper=Paper(
        "2206.01861",
        "ZeroQuant: Efficient and Affordable Post-Training Quantization for Large-Scale Transformers",
        2022,
    ),
    contract=Contract(adds={traits.QUANTIZED}, drops={traits.FLOAT_WEIGHTS}, keeps={traits.SPARSE, traits.SPARSE_NM}),
    reload=Reload.STOCK_FORMAT,
)
class LKD(Technique):
    """Train each quantized block to match the block it replaces, on the inputs of the original block.

    Works on the blocks of the model; layers outside them (an output head) are left unquantized. The model must come
    with floating-point weights: a checkpoint that is already quantized has no original block to match.

    Attributes:
        targets: linear layers to quantize, by class, name or pattern.
        skip: patterns of layers to leave out.
        bits: of a weight, 2 to 8, if no earlier step of the recipe quantizes (``group_size``, ``symmetric``,
            ``observer`` and ``activations`` likewise); bits that an earlier step has assigned take precedence.
        group_size: inputs that share a scale; the largest divisor of the layer's width up to it is used. None: one
            scale per output channel.
        symmetric: no zero points. Asymmetric codes are stored one to a byte (see ``hf_optim.compressed.scheme``).
        observer: scales from ``"minmax"`` of the weights, or from a search for the least squared error (``"mse"``);
            recomputed at every step.
        activations: quantize the inputs of the layers to ``"int8"`` or ``"int4"``, each token on its own grid.
        learning_rate: of Adam, in units of the weights; it decays linearly to 0. 0 trains nothing. A code that a
            quantizer chose changes once its weight has moved half a grid step: after a quantizer, the rate times
            ``steps`` should exceed that.
        steps: optimizer steps per block.
        batch_size: sequences per step, in whole calibration batches.
        learn_scales: train the scales too (LSQ, 1902.08153); zero points stay.
        train: ``"block"`` trains the quantized weights and the biases and norm weights of the block, ``"weights"``
            only the quantized weights.
        seed: of the order of the batches.
    """

    targets: tuple[str, ...] = ("Linear",)
    skip: tuple[str, ...] = ()
    bits: int = option(4, low=2, high=8)
    group_size: int | None = option(128, low=1)
    symmetric: bool = True
    observer: Literal["minmax", "mse"] = "minmax"
    activations: Literal["int8", "int4"] | None = None
    learning_rate: float = option(5e-4, low=0.0)
    steps: int = option(100, low=0)
    batch_size: int = option(32, low=1)
    learn_scales: bool = False
    train: Literal["block", "weights"] = "block"
    seed: int = 0

    @classmethod
    def for_testing(cls) -> Technique:
        return cls.from_dict({"steps": 20})

    def needs_teacher(self) -> bool:
        return True

    def phases(self) -> frozenset[Phase]:
        # The check in transform_model changes nothing, so the step may come after steps that calibrate.
        return frozenset({Phase.CALIBRATE})

    def check_model(self, model: Any, label: str) -> None:
        require_storable(self, model, label)

    @hookimpl
    def transform_model(self, run: Run) -> None:
        if traits.FLOAT_WEIGHTS not in run.traits:
            raise ModelError(
                f"{run.label(self)}: the model was quantized before this stage, so there is no original block to "
                "match; start from the floating-point checkpoint, and quantize in the stage of this step"
            )

    @hookimpl
    def calibrate(self, run: Run, scope: Scope) -> Iterator[None]:
        label = run.label(self)
        if scope.index == 0:
            cover_outside_blocks(self, run)
        quantized = self._follows_quantizer(run)
        students, skipped = self._from_codes(scope) if quantized else self._from_floats(run, scope)
        run.cover(self, students, skipped)
        if students:
            examples = block_reconstruction.BlockExamples(scope.teacher, next(scope.module.parameters()).device)
            examples.require_finite(f"{label}: {scope.name}")
            self._learn(run, scope, students, examples)
        yield from ()  # no pass of the data: the teacher's examples hold the inputs

    def _follows_quantizer(self, run: Run) -> bool:
        """Return True if an earlier step of the recipe quantizes."""
        return any(traits.QUANTIZED in step.contract().adds for step in run.recipe.steps[: run.index(self)])

    # -- layers in training ---------------------------------------------------------------------------------------
    def _from_codes(self, scope: Scope) -> tuple[dict[str, Student], dict[str, list[str]]]:
        students: dict[str, Student] = {}
        skipped: dict[str, list[str]] = {}
        for name, layer in scope.select(self.targets, self.skip).items():
            if reason := _unsupported_reason(layer):
                skipped.setdefault(reason, []).append(name)
                continue
            assert isinstance(layer, nn.Linear)
            grid = grid_on(layer)
            inputs = (layer._parameters.get("input_scale"), layer._parameters.get("input_zero_point"))
            students[name] = Student(
                layer, compressed.scheme_on(layer), grid, _wide(layer.weight).requires_grad_(), True, *inputs
            )
        return students, skipped

    def _from_floats(self, run: Run, scope: Scope) -> tuple[dict[str, Student], dict[str, list[str]]]:
        layers, skipped = select_layers(self, run, scope)
        students = {}
        for name, layer in layers.items():
            bits = run.bits_of(name, self.bits)
            spec = weight_spec(layer.weight.shape[1], bits, self.group_size, self.symmetric)
            grid = make_grid(layer.weight.detach(), spec, self.observer)
            scheme = compressed.scheme_of(spec, self.activations)
            students[name] = Student(layer, scheme, grid, _wide(layer.weight).requires_grad_(), False)
        return students, skipped

    # -- training -------------------------------------------------------------------------------------------------
    def _learn(
        self, run: Run, scope: Scope, students: Mapping[str, Student], examples: block_reconstruction.BlockExamples
    ) -> None:
        masks = {id(student.latent): run.masks.get(f"{name}.weight") for name, student in students.items()}
        with (
            block_reconstruction.trainable_vectors(scope.module, self.train == "block") as vectors,
            _in_training(students, self.observer, self.learn_scales) as layers,
        ):
            scales = [layer.weight_step for layer in layers.values()] if self.learn_scales else []
            losses = block_reconstruction.reconstruct_block(
                scope.module,
                [*(student.latent for student in students.values()), *scales, *vectors],
                examples,
                learning_rate=self.learning_rate,
                steps=self.steps,
                batch_size=self.batch_size,
                seed=self.seed,
                masks={key: mask for key, mask in masks.items() if mask is not None},
                label=f"{run.label(self)}: {scope.name}",
            )
        run.report(self, losses={scope.name: [float(f"{loss:.6g}") for loss in losses]})

    @hookimpl
    def finalize_model(self, run: Run) -> None:
        compressed.attach_quantizer(run.model)

    def recompute(self, case: Any) -> dict[str, Any]:
        before = _recompute.block_losses(case, _recompute.rounded(case, self.bits, self.group_size))
        after = _recompute.block_losses(case, case.after)
        return {"losses": {name: [before[name], after[name]] for name in after}}

    @hookimpl
    def export(self, run: Run, directory: Path, card: Card) -> None:
        losses = run.reported(self).get("losses")
        if not losses:
            return
        card.paragraph(
            "Layer-by-layer distillation",
            f"Each of {len(losses)} quantized blocks was trained for {self.steps} steps to reproduce the outputs of "
            "the original block on the original model's inputs. Errors are those on at least 32 calibration "
            "sequences, or on all.",
        )
        card.table(
            "Layer-by-layer distillation: mean squared error of the blocks' outputs",
            ["block", "before", "after"],
            [[f"`{name}`", f"{first:.3e}", f"{last:.3e}"] for name, (first, last) in losses.items()],
        )


def _wide(weight: Tensor) -> Tensor:
    """Return a copy to train, in at least float32: half precision would round optimizer steps away."""
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    return weight.detach().to(dtype, copy=True)


def _unsupported_reason(layer: nn.Module) -> str:
    """Return why the codes of a layer cannot be trained, or an empty string if they can."""
    scheme = compressed.scheme_on(layer)
    if scheme is None or scheme.weights is None:
        return "its weights are not on a grid"
    if scheme.weights.strategy not in ("tensor", "channel", "group"):
        return f"scales by {scheme.weights.strategy} are not supported"
    return "its groups are of scattered columns" if "weight_g_idx" in layer._parameters else ""


def grid_on(layer: nn.Linear) -> Grid:
    """Return the grid of a quantized layer."""
    args = compressed.scheme_on(layer).weights
    spec = GridSpec(args.num_bits, str(args.type), str(args.strategy), args.group_size, bool(args.symmetric))  # type: ignore[arg-type]
    scale: Any = layer._parameters["weight_scale"]
    zero = None if args.symmetric else layer._parameters["weight_zero_point"]
    return Grid(spec, _wide(scale), None if zero is None else zero.detach().clone())


@contextmanager
def _in_training(
    students: Mapping[str, Student], observer: Literal["minmax", "mse"], learn_scales: bool
) -> Iterator[dict[str, fake_quant.FakeQuantLinear]]:
    """Attach fake quantization to the layers, yield them by name, and store their final codes at the end."""
    layers: dict[str, fake_quant.FakeQuantLinear] = {}
    try:
        for name, student in students.items():
            compressed.clear(student.layer)
            layers[name] = layer = fake_quant.attach_fake_quant(
                student.layer,
                student.grid.spec,
                observer,
                fixed_grid=student.grid if student.fixed else None,
                latent=student.latent,
                quantize_input=_inputs(student),
            )
            if learn_scales:
                layer.learn_scale(student.grid)
        yield layers
        found = {name: layer.quantize_weight() for name, layer in layers.items()}
    finally:
        for layer in layers.values():
            fake_quant.detach_fake_quant(layer)
    for name, (codes, grid) in found.items():
        student = students[name]
        compressed.store(
            student.layer, student.scheme, codes, grid.scale, grid.zero_point, student.input_scale, student.input_zero
        )


def _inputs(student: Student) -> fake_quant.InputQuantizer | None:
    if student.scheme.input_activations is None:
        return None
    rounded = compressed.input_quantizer(student.scheme, student.input_scale, student.input_zero)
    return lambda layer, input: rounded(input)


@hookimpl
def register_techniques(register):
    register(LKD)
