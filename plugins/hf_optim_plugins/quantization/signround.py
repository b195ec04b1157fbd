r"""SignRound (AutoRound): offsets of the rounding and ranges of the scales, learned block by block by signed gradients.

Cheng et al., "Optimize Weight Rounding via Signed Gradient Descent for the Quantization of LLMs", arXiv 2309.05516.
For each weight an offset ``V`` in [-0.5, 0.5], for each group of weights the shares ``a`` and ``b`` of its range
(equations 3 to 5, in ``hf_optim.toolkit.quantization.LearnedRounding``), and for each block (equation 6)::

    s = (b high - a low) / (2^bits - 1),    q = clamp(round(w / s + z + V)),    w^ = (q - z) s
    min over V, a, b   MSE(block(x; w), block(x'; w^(V, a, b)))

by ``V <- V - rate sign(dL/dV)``, where ``x`` are the inputs of the block in the original model and ``x'`` those that
the quantized blocks before it produce. With a rate of ``1 / steps`` that falls linearly to 0 an offset moves by at most
0.5: a weight is rounded up or down, and no further. The best state is kept, and the one before training counts, so that
the loss of no block rises. The authors keep that of the best batch; here states are compared on the same 32 sequences,
and a gain below a tenth over the state before training is confirmed on all data.

The paper's method is what the defaults are. Ours, each by its own option:

- ``signed_scales``: a symmetric grid has one more negative code than positive ones, and the scale of a group may be
  negative, so that this code stands for the weight that is largest in magnitude, whatever its sign.
- ``optimizer: adam`` with ``largest_offset: null``: offsets move as far as the block's error asks, not up or down
  alone. This is what few bits need.
- ``tune_norms``: the vectors of the block (gains of norms, biases) are trained, too. They stay floating-point numbers.
- ``observer: mse`` starts from the range with the least squared error; ``inputs: dense`` has ``x`` in place of ``x'``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from hf_optim import Paper, RecipeError, Reload, Technique, compressed, hookimpl, option, technique
from hf_optim.toolkit.quantization import LearnedRounding, ProjectedAdam, SignedDescent, block_reconstruction

from . import _recompute
from ._block_inputs import BlockInputs
from ._rounded_block import RoundedBlock, rounded_inputs
from ._weights import (
    QUANTIZES,
    bits_of,
    cover_outside_blocks,
    keep_bits,
    report_bits,
    require_float4_fields,
    require_signs,
    select_layers,
    weight_spec,
)

if TYPE_CHECKING:
    from hf_optim import Card, Run, Scope

ADAM_BETAS = (0.9, 0.99)  # of 200 steps, each of a few sequences; the usual 0.999 remembers more than that


@technique(
    "signround",
    family="quantization",
    paper=Paper(
        "2309.05516", "Optimize Weight Rounding via Signed Gradient Descent for the Quantization of LLMs", 2024
    ),
    contract=QUANTIZES,
    reload=Reload.STOCK_FORMAT,
)
class SignRound(Technique):
    """Learn the rounding of each block's weights, so that the quantized block reproduces the original one.

    Works on the blocks of the model; layers outside of them (an output head) are left unquantized. The matrices of
    experts are trained with their block.

    Attributes:
        targets: linear layers to quantize, by class, name or pattern.
        skip: patterns of layers to leave out.
        bits: of a weight, 2 to 8; bits that an earlier step has assigned take precedence.
        group_size: inputs that share a scale; the largest divisor of the layer's width up to it is used. None: one
            scale per output channel.
        symmetric: no zero points. Asymmetric codes are stored one to a byte (see ``hf_optim.compressed.scheme``).
        format: ``"int"``, or the 4-bit floats ``"nvfp4"`` and ``"mxfp4"``, in groups of 16 or 32 inputs, of models in
            bfloat16. An offset of 0.5 then is half the distance between the codes around a weight.
        observer: the range that is learned is a share of that of the weights (``"minmax"``, the paper), or of the range
            with the least squared error of the weights (``"mse"``).
        signed_scales: scales of symmetric grids may be negative; not the paper's.
        activations: quantize the inputs of the layers to ``"int8"`` or ``"int4"``, each token on its own
            grid, in training too.
        optimizer: ``"sign"``, the paper's, or ``"adam"``.
        steps: of the optimizer for each block.
        batch_size: sequences per step, in whole calibration batches.
        batch_tokens: tokens per step, at least: where sequences are short a step takes more of them.
        learning_rate: of the offsets at the start; None for ``1 / steps``.
        range_rate: of the shares of the ranges; None for that of the offsets, 0 keeps the ranges of the observer.
        largest_offset: how far an offset may move, in codes; None as far as it likes. The paper's is 0.5.
        tune_norms: train the vectors of the blocks, too; needs ``optimizer: adam``. Not the paper's.
        norm_rate: of these vectors.
        inputs: ``"quantized"``, what the quantized blocks before this one produce; or ``"dense"``, the inputs in the
            original model.
        seed: of the order of the batches.
    """

    targets: tuple[str, ...] = ("Linear",)
    skip: tuple[str, ...] = ()
    bits: int = option(4, low=2, high=8)
    group_size: int | None = option(128, low=1)
    symmetric: bool = True
    format: Literal["int", "nvfp4", "mxfp4"] = "int"
    observer: Literal["minmax", "mse"] = "minmax"
    signed_scales: bool = False
    activations: Literal["int8", "int4"] | None = None
    optimizer: Literal["sign", "adam"] = "sign"
    steps: int = option(200, low=0)
    batch_size: int = option(8, low=1)
    batch_tokens: int = option(0, low=0)
    learning_rate: float | None = option(None, low=0.0)
    range_rate: float | None = option(None, low=0.0)
    largest_offset: float | None = option(0.5, low=0.5)
    tune_norms: bool = False
    norm_rate: float = option(0.001, low=0.0)
    inputs: Literal["quantized", "dense"] = "quantized"
    seed: int = 0

    @classmethod
    def for_testing(cls) -> Technique:
        return cls.from_dict({"steps": 12, "group_size": 16, "bits": 3})

    def needs_teacher(self) -> bool:
        return True

    def validate(self) -> None:
        require_float4_fields(self, "signround", (None, 128))
        require_signs(self, "signround")
        wrong = {
            "tune_norms needs optimizer: adam, since norms have no rate in codes": (
                self.tune_norms and self.optimizer != "adam"
            ),
        }
        for reason, holds in wrong.items():
            if holds:
                raise RecipeError(f"signround: {reason}")

    @property
    def rate(self) -> float:
        """The learning rate of the offsets."""
        return (1.0 / self.steps if self.steps else 0.0) if self.learning_rate is None else self.learning_rate

    @hookimpl
    def calibrate(self, run: Run, scope: Scope) -> Iterator[None]:
        label = run.label(self)
        if scope.index == 0:
            cover_outside_blocks(self, run)
        layers, skipped = select_layers(self, run, scope, experts=True, symmetric=self.symmetric)
        run.cover(self, [], skipped)
        with BlockInputs(scope.module, scope.teacher) as seen:
            yield
        if not layers:
            return
        found = scope.teacher if self.inputs == "dense" else seen.examples(label, scope.name)
        device = next(scope.module.parameters()).device
        examples = block_reconstruction.BlockExamples(found, device)
        examples.require_finite(f"{label}: {scope.name}")
        self._learn(run, scope, layers, examples)

    def _learn(
        self, run: Run, scope: Scope, layers: Mapping[str, Any], examples: block_reconstruction.BlockExamples
    ) -> None:
        """Learn the rounding of the layers of one block, and store their codes."""
        bits = {name: bits_of(self, run, name) for name in layers}
        made = {name: self._rounding(layer, bits[name]) for name, layer in layers.items()}
        block = RoundedBlock(scope.module, scope.name, layers, made)
        schemes = {
            name: compressed.scheme_of(made[name].spec, self.activations if isinstance(layer, nn.Linear) else None)
            for name, layer in layers.items()
        }
        linear = [scheme for name, scheme in schemes.items() if isinstance(layers[name], nn.Linear)]
        rounding = compressed.input_quantizer(linear[0]) if self.activations and linear else None
        with (
            rounded_inputs(layers, rounding),
            block_reconstruction.trainable_vectors(scope.module, self.tune_norms) as vectors,
        ):
            losses = block_reconstruction.reconstruct_block(
                block,
                [*(tensor for each in made.values() for tensor in each.parameters()), *vectors],
                examples,
                learning_rate=self.rate,
                steps=self.steps,
                batch_size=self.batch_size,
                seed=self.seed,
                masks=self._masks(run, made),
                label=f"{run.label(self)}: {scope.name}",
                optimizer=lambda tensors: self._descent(made, tensors[len(tensors) - len(vectors) :]),
                evaluate_every=2,
                weights=block.weights,
                batch_tokens=self.batch_tokens,
            )
        for name, layer in layers.items():
            codes, grid = made[name].quantize()
            compressed.store(layer, schemes[name], codes, grid.scale, grid.zero_point, global_scale=grid.global_scale)
        run.report(self, losses={scope.name: [float(f"{loss:.6g}") for loss in losses]})
        keep_bits(self, run, bits)
        run.cover(self, layers)

    def _rounding(self, layer: Any, bits: int) -> LearnedRounding:
        spec = weight_spec(layer.weight.shape[1], bits, self.group_size, self.symmetric, format=self.format)
        return LearnedRounding(
            layer.weight,
            spec,
            self.observer,
            learn_range=self.range_rate != 0,
            signed=self.signed_scales,
            largest_offset=self.largest_offset,
        )

    def _descent(self, made: Mapping[str, LearnedRounding], vectors: list[torch.Tensor]) -> torch.optim.Optimizer:
        range_rate = self.rate if self.range_rate is None else self.range_rate
        offsets = [each.offset for each in made.values()]
        shares = [share for each in made.values() for share in each.shares]
        groups = [{"params": offsets, "lr": self.rate}]
        if shares:
            groups.append({"params": shares, "lr": range_rate})
        if vectors:
            groups.append({"params": vectors, "lr": self.norm_rate})

        def project() -> None:
            for each in made.values():
                each.project()

        if self.optimizer == "adam":
            return ProjectedAdam(groups, self.rate, ADAM_BETAS, project)
        return SignedDescent(groups, self.rate, project)

    def _masks(self, run: Run, made: Mapping[str, LearnedRounding]) -> dict[int, torch.Tensor]:
        """Return which offsets may move: those of pruned weights may not, so that zero stays zero."""
        masks = {id(each.offset): run.masks.get(f"{name}.weight") for name, each in made.items()}
        return {key: mask for key, mask in masks.items() if mask is not None}

    @hookimpl
    def finalize_model(self, run: Run) -> None:
        compressed.attach_quantizer(run.model)
        report_bits(self, run)

    def recompute(self, case: Any) -> dict[str, Any]:
        before = _recompute.sequential_losses(case, _recompute.rounded(case, self.bits, self.group_size))
        after = _recompute.sequential_losses(case, case.after)
        return {
            "layers_by_bits": _recompute.layers_by_bits(case),
            "losses": {name: [before[name], after[name]] for name in after},
        }

    @hookimpl
    def export(self, run: Run, directory: Path, card: Card) -> None:
        losses = run.reported(self).get("losses")
        if not losses:
            return
        before = (
            "that the quantized blocks before it produce" if self.inputs == "quantized" else "of the original model"
        )
        count = f"{len(losses)} block{'s' * (len(losses) != 1)}"
        method = "signed gradient descent" if self.optimizer == "sign" else "Adam"
        vectors = " Gains of norms and biases were trained with it." if self.tune_norms else ""
        card.paragraph(
            "SignRound",
            f"The rounding of the weights of {count} was learned in {self.steps} steps of {method} a block, so that "
            f"each block reproduces the outputs of the original one on the inputs {before}.{vectors} Errors are "
            "those on at least 32 calibration sequences, or on all.",
        )
        card.table(
            "SignRound: mean squared error of the blocks' outputs",
            ["block", "rounded to nearest", "learned"],
            [[f"`{name}`", f"{first:.3e}", f"{last:.3e}"] for name, (first, last) in losses.items()],
        )


@hookimpl
def register_techniques(register):
    register(SignRound)
