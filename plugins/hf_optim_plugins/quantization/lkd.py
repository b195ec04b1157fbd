r"""Layer-by-layer knowledge distillation: each quantized block learns to give what the original block gave.

ZeroQuant (2206.01861, section 3.3 and its equation for ``L_LKD``) trains one transformer block ``L̂_k`` at a time,
with weights on their grid, towards the block ``L_k`` that it replaces, and both read what the *original* blocks before
them make of the data::

    loss_k = MSE(L_k(x), L̂_k(x)),      x = L_{k-1}(... L_1(X))

So there is no second model in memory, one block's gradients and optimizer state at a time, and no label: any text
serves, and random tokens do (``calibration="random"``, or ``calibration: {dataset: random}`` in a recipe).

The gradient passes through the rounding (``hf_optim.toolkit.fake_quant``). The state kept for a block is the best one
seen on all of the data, the one before training included: the loss of no block rises.

Two uses. From floating-point weights the grid follows from the weights as they are trained; with a learning rate of
0 it is plain rounding. After a step of the same stage that quantized the model, the layers keep the scheme and the
grid they have, and training moves their codes.
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
    Reload,
    Scope,
    Technique,
    compressed,
    hookimpl,
    option,
    technique,
    traits,
)
from hf_optim.toolkit import topology
from hf_optim.toolkit.pruning import require_finite
from hf_optim.toolkit.quantization import (
    BlockExamples,
    Grid,
    GridSpec,
    fake_quant,
    fit_group_size,
    make_grid,
    reconstruct_block,
    trainable_vectors,
)

if TYPE_CHECKING:
    from compressed_tensors.quantization import QuantizationScheme

    from hf_optim import Card, Run


@dataclasses.dataclass(frozen=True, eq=False)
class Student:
    """A layer in training: what it is stored with afterwards, and the weights that the optimizer moves.

    Attributes:
        layer: the layer.
        scheme: what it will be stored with.
        grid: its grid before training.
        latent: ``[out, in]``, float32 (float64 for float64 layers), what is rounded.
        fixed: whether the grid stays.
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
    """Train each quantized block to match the block it replaces, on that block's own inputs.

    Works on the blocks of the model; layers outside them (an output head) stay as they are. The model must come with
    floating-point weights: of a checkpoint that is quantized already nobody knows what to match.

    Attributes:
        targets: which linears.
        skip: which of them to leave out.
        bits: of a weight, 2 to 8, where no step before it in the recipe quantized (``group_size``, ``symmetric``,
            ``observer`` and ``activations`` likewise); a plan of bits comes first.
        group_size: inputs that share a scale; the largest divisor of the layer's width up to it is used. None: one
            scale per output channel.
        symmetric: no zero points. Asymmetric codes are stored one to a byte (see ``hf_optim.compressed.scheme``).
        observer: scales from ``"minmax"`` of the weights, or from a search for the least squared error (``"mse"``);
            made anew at every step.
        activations: quantize the inputs of the layers to ``"int8"``, each token on a grid of its own.
        learning_rate: of Adam, in units of the weights; it falls to 0 along a straight line. 0 trains nothing. A code
            that a quantizer chose moves once its weight has travelled half a grid step: on top of one, the rate times
            ``steps`` should exceed that.
        steps: optimizer steps per block.
        batch_size: sequences per step, in whole calibration batches.
        learn_scales: train the scales too (LSQ, 1902.08153); zero points stay.
        train: ``"block"`` trains the biases and norm weights of the block beside the quantized weights, ``"weights"``
            those alone.
        seed: of the order of the batches.
    """

    targets: tuple[str, ...] = ("Linear",)
    skip: tuple[str, ...] = ()
    bits: int = option(4, low=2, high=8)
    group_size: int | None = option(128, low=1)
    symmetric: bool = True
    observer: Literal["minmax", "mse"] = "minmax"
    activations: Literal["int8"] | None = None
    learning_rate: float = option(5e-4, low=0.0)
    steps: int = option(100, low=0)
    batch_size: int = option(32, low=1)
    learn_scales: bool = False
    train: Literal["block", "weights"] = "block"
    seed: int = 0

    def needs_teacher(self) -> bool:
        return True

    def phases(self) -> Any:
        # Looking at the model before the stage begins changes nothing: the step may stand behind ones that calibrate.
        return frozenset(phase for phase in super().phases() if phase.name == "CALIBRATE")

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
        self._name_the_rest(run, scope)
        students, skipped = self._on_top(run, scope) if self._follows(run) else self._afresh(run, scope)
        run.cover(self, students, skipped)
        if students:
            examples = BlockExamples(scope.teacher, next(scope.module.parameters()).device)
            examples.require_finite(f"{label}: {scope.name}")
            self._learn(run, scope, students, examples)
        yield from ()  # the teacher's examples are all the data there is to see

    def _name_the_rest(self, run: Run, scope: Scope) -> None:
        if scope.index == 0:
            whole = Scope("", scope.model, scope.model).select(self.targets, self.skip)
            blocks = {name for name in whole if self._outside_blocks(scope, name)}
            run.cover(self, [], {"it lies outside the blocks": sorted(blocks)} if blocks else {})

    def _outside_blocks(self, scope: Scope, name: str) -> bool:
        return not any(block.holds(name) for block in topology.blocks(scope.model))

    def _follows(self, run: Run) -> bool:
        """Whether a step before this one quantizes."""
        return any(traits.QUANTIZED in step.contract().adds for step in run.recipe.steps[: run.index(self)])

    # -- what is trained ------------------------------------------------------------------------------------------
    def _on_top(self, run: Run, scope: Scope) -> tuple[dict[str, Student], dict[str, list[str]]]:
        students: dict[str, Student] = {}
        skipped: dict[str, list[str]] = {}
        for name, layer in scope.select(self.targets, self.skip).items():
            reason = _obstacle(layer)
            if reason:
                skipped.setdefault(reason, []).append(name)
                continue
            assert isinstance(layer, nn.Linear)
            grid = grid_on(layer)
            inputs = (layer._parameters.get("input_scale"), layer._parameters.get("input_zero_point"))
            students[name] = Student(
                layer, compressed.scheme_on(layer), grid, _wide(layer.weight).requires_grad_(), True, *inputs
            )
        return students, skipped

    def _afresh(self, run: Run, scope: Scope) -> tuple[dict[str, Student], dict[str, list[str]]]:
        label = run.label(self)
        layers, skipped = compressed.storable(scope, self.targets, self.skip, label=label)
        require_finite({f"{name}.weight": layer.weight for name, layer in layers.items()}, label)
        students = {}
        for name, layer in layers.items():
            spec = self._spec(layer.weight.shape[1], run.bits_of(name, self.bits))
            grid = make_grid(layer.weight.detach(), spec, self.observer)
            scheme = compressed.scheme_of(spec, self.activations)
            students[name] = Student(layer, scheme, grid, _wide(layer.weight).requires_grad_(), False)
        return students, skipped

    def _spec(self, in_features: int, bits: int) -> GridSpec:
        strategy: Literal["group", "channel"] = "group" if self.group_size else "channel"
        size = fit_group_size(in_features, self.group_size) if self.group_size else None
        return GridSpec(bits, "int", strategy, size, self.symmetric)

    # -- training -------------------------------------------------------------------------------------------------
    def _learn(self, run: Run, scope: Scope, students: Mapping[str, Student], examples: BlockExamples) -> None:
        masks = {id(student.latent): run.masks.get(f"{name}.weight") for name, student in students.items()}
        with (
            trainable_vectors(scope.module, self.train == "block") as vectors,
            _in_training(students, self.observer, self.learn_scales) as layers,
        ):
            scales = [layer.weight_step for layer in layers.values()] if self.learn_scales else []
            losses = reconstruct_block(
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
        state = run.state(self)
        state.losses = getattr(state, "losses", {}) | {scope.name: [float(f"{loss:.6g}") for loss in losses]}
        run.report(self, losses=state.losses)

    @hookimpl
    def finalize_model(self, run: Run) -> None:
        compressed.attach_quantizer(run.model)

    @hookimpl
    def export(self, run: Run, directory: Path, card: Card) -> None:
        losses = run.reported(self).get("losses")
        if not losses:
            return
        card.paragraph(
            "Layer-by-layer distillation",
            f"Each of {len(losses)} quantized blocks was trained for {self.steps} steps to give what the original "
            "block gives on the original model's inputs.",
        )
        card.table(
            "Layer-by-layer distillation: mean squared error of the blocks' outputs",
            ["block", "before", "after"],
            [[f"`{name}`", f"{first:.3e}", f"{last:.3e}"] for name, (first, last) in losses.items()],
        )


def _wide(weight: Tensor) -> Tensor:
    """A copy to train: a step of the optimizer is lost in half precision."""
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    return weight.detach().to(dtype, copy=True)


def _obstacle(layer: nn.Module) -> str:
    """Why the codes of a layer cannot be trained; empty if they can."""
    scheme = compressed.scheme_on(layer)
    if scheme is None or scheme.weights is None:
        return "its weights are not on a grid"
    if scheme.weights.strategy not in ("tensor", "channel", "group"):
        return f"scales by {scheme.weights.strategy}: their grid is not known here"
    return "its groups are of scattered columns" if "weight_g_idx" in layer._parameters else ""


def grid_on(layer: nn.Linear) -> Grid:
    """The grid of a layer in the quantized state."""
    args = compressed.scheme_on(layer).weights
    spec = GridSpec(args.num_bits, str(args.type), str(args.strategy), args.group_size, bool(args.symmetric))  # type: ignore[arg-type]
    scale: Any = layer._parameters["weight_scale"]
    zero = None if args.symmetric else layer._parameters["weight_zero_point"]
    return Grid(spec, _wide(scale), None if zero is None else zero.detach().clone())


@contextmanager
def _in_training(
    students: Mapping[str, Student], observer: Literal["minmax", "mse"], learn_scales: bool
) -> Iterator[dict[str, fake_quant.FakeQuantLinear]]:
    """The layers with their latent weights on the grid; stored with the codes these have at the end."""
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
