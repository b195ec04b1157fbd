r"""GPTQ: quantize weights column by column, and compensate each column's error in the columns not yet quantized.

With the inputs ``X`` of a layer and ``H = X Xᵀ + λI``, the output error ``‖(Q - W) X‖²`` is reduced row by row: column
``q`` is rounded, and the columns after it compensate its rounding error (2210.17323, equations 2 and 3; OBQ's update in
one fixed order for all rows)::

    e_q        = (w_q - quant(w_q)) / U_qq                 H⁻¹ = Uᵀ U  (Cholesky, upper)
    w_{q+1:}  -= e_q · U_{q, q+1:}

Columns are processed in blocks of ``block_size``; the columns behind a block are updated by one matrix product at its
end. On CUDA a block is one launch of a Triton kernel that keeps its rows in registers; elsewhere a block is split in
halves recursively.

Scales are fixed before the recursion, from the original weights and in groups of *neighbouring* columns ("static
groups"), so ``act_order`` costs nothing at run time and no ``g_idx`` is stored.

The recursion never returns to a column: it rounds the first ones as if all later ones could compensate anything, and
for the last none is left to compensate. So ``refine`` rounds follow (ours; ``refine: 0`` is the paper's method). Each
fits the scales to the codes by least squares in the metric of ``H`` (``hf_optim.toolkit.quantization.refit_scales``),
and then sets each column's code to the best one while all others stay, in one sweep of coordinate descent (QuantEase,
2309.01885; ``_column_recursion``). Neither raises the output error on the calibration data (of the damped Hessian).

On a pruned model the mask stays. Updates may move a pruned weight away from zero; when its column is processed it is
"rounded" to zero, and that error is compensated like any other: the joint treatment of SparseGPT (2301.00774, section
3.5). One factor ``U`` serves all rows, whatever their masks. That is exact for none of them, and the price of a single
factorization.

Further differences from the paper's settings: its grids are asymmetric, here they are symmetric by default (a choice,
for the packed format); its columns come in their own order, ``act_order`` is a later addition; and it computes the
scales of a group from the compensated weights when the recursion reaches the group, where static groups use the
original ones. The search for scales (``observer: mse``) is ours; its exponent, 2.4, is that of compressed-tensors'
observer: with 2 the search clips more, and what is clipped at 2 bits no other column can compensate.

Ranks that share the calibration data divide the layers of a block: one rank rounds those that read the same input, and
all get its codes.

In a mixture of experts each matrix of each expert is a separate layer, with the Hessian of the tokens that the router
sends to that expert. An expert that sees fewer tokens than it has inputs is reported, and is also calibrated on other
tokens of its layer (``hf_optim.toolkit.statistics.augment_undersampled``). The codes of experts have no zero points.
"""

from __future__ import annotations

import logging
from collections.abc import Generator, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from hf_optim import Paper, Reload, Technique, compressed, hookimpl, option, technique
from hf_optim.toolkit.distributed import divided
from hf_optim.toolkit.quantization import Grid, damped, descent_factor, inverse_cholesky, make_grid, output_error
from hf_optim.toolkit.statistics import (
    GramMatrix,
    SecondMoment,
    TokenSample,
    augment_undersampled,
    few_tokens_message,
    few_tokens_paragraph,
)
from hf_optim.toolkit.topology import group_by_block, not_reached

from . import _recompute
from ._column_recursion import column_order, recurse, refine
from ._weights import (
    QUANTIZES,
    add_worst_layers,
    bits_of,
    bits_phrase,
    keep_bits,
    report_bits,
    report_errors,
    require_float4_fields,
    require_signs,
    select_layers,
    weight_spec,
)

if TYPE_CHECKING:
    from hf_optim import Card, Run, Scope

log = logging.getLogger(__name__)
# Rows whose scales are fitted at a time.
STRIP = 2048
Rounded = list[tuple[list[str], Tensor, Grid]]
"""For each number of bits: the layers, their codes one below the other, and the grid of these."""


@technique(
    "gptq",
    family="quantization",
    paper=Paper(
        "2210.17323", "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers", 2022
    ),
    contract=QUANTIZES,
    reload=Reload.STOCK_FORMAT,
    parallel={"calibration": "yes", "tensor": "yes"},
)
class GPTQ(Technique):
    """Quantize weights one column at a time, and let the remaining columns compensate the error.

    Blocks are quantized in execution order, each on the outputs of the quantized blocks before it. Within a block, all
    linears are quantized on one pass of the data, or group by group with ``true_sequential``. Over a whole model there
    is one pass per block, and one for the layers outside the blocks.

    Attributes:
        targets: linear layers to quantize, by class, name or pattern.
        skip: patterns of layers to leave out.
        bits: of a weight, 2 to 8. Bits that an earlier step has assigned to a layer take precedence; a layer with more
            than 8 is left unquantized.
        group_size: inputs that share a scale; the largest divisor of the layer's width up to it is used. None: one
            scale per output channel.
        symmetric: no zero points. Asymmetric codes are stored one to a byte (see ``hf_optim.compressed.scheme``).
        format: ``"int"``, or the 4-bit floats ``"nvfp4"`` and ``"mxfp4"``, in groups of 16 or 32 inputs, of models in
            bfloat16; layers that read one input share NVFP4's scale of a tensor. Without a kernel for the recursion,
            and without refinement.
        observer: scales from ``"minmax"`` of the weights, or from a search for the least sum of their rounding errors
            (``"mse"``), each weighted by the mean square of its input.
        norm: exponent of the errors in that search, 2 for squares; a larger one clips less.
        signed_scales: scales of symmetric grids may be negative, so that the code more at one end stands for the larger
            side of a group.
        refine: rounds of refinement after the recursion: scales fitted to the codes, then one sweep over the codes.
            0 for the recursion alone, the paper's method.
        act_order: process the columns of the largest inputs (mean square) first.
        activations: quantize the inputs of the layers to ``"int8"`` or ``"int4"``, each token on its own grid
            (W4A8, W4A4); later blocks are calibrated on the result.
        damp: share of the mean diagonal of the Hessian added to its diagonal; raised tenfold if the factorization
            fails. The paper's is 1 %.
        block_size: columns between two updates of the rest (on CUDA, 256 at most); changes the result by rounding
            errors only.
        true_sequential: quantize linears that read the outputs of other linears of the block after those, on inputs
            that include their quantization: several passes per block.
        precision: of the Hessian and the recursion, ``"float32"`` or ``"float64"``; ``"mixed"``: sums of batches in
            float64, rounded once, and the recursion in float32. Ranks that share the data in whole batches then find
            the codes of one rank, at twice the memory of the Hessians during a pass.
    """

    targets: tuple[str, ...] = ("Linear",)
    skip: tuple[str, ...] = ()
    bits: int = option(4, low=2, high=8)
    group_size: int | None = option(128, low=1)
    symmetric: bool = True
    format: Literal["int", "nvfp4", "mxfp4"] = "int"
    observer: Literal["minmax", "mse"] = "minmax"
    activations: Literal["int8", "int4"] | None = None
    norm: float = option(2.4, low=1.0)
    signed_scales: bool = False
    refine: int = option(3, low=0)
    act_order: bool = True
    damp: float = option(0.01, above=0.0, high=1.0)
    block_size: int = option(128, low=1)
    true_sequential: bool = False
    precision: Literal["float32", "mixed", "float64"] = "float32"

    def validate(self) -> None:
        require_float4_fields(self, "gptq", (None, 128))
        require_signs(self, "gptq")

    @hookimpl
    def calibrate(self, run: Run, scope: Scope) -> Iterator[None]:
        layers, skipped = select_layers(self, run, scope, experts=True, symmetric=self.symmetric)
        wide = [name for name in layers if bits_of(self, run, name) > 8]
        layers = {name: layer for name, layer in layers.items() if name not in wide}
        run.cover(self, [], {**skipped, **({"more than 8 bits are assigned to it": wide} if wide else {})})
        yield from self._passes(run, scope, layers)

    def _passes(self, run: Run, scope: Scope, layers: Mapping[str, nn.Linear]) -> Generator[None, None, None]:
        """Quantize block by block, each on its own pass of the data; on several with ``true_sequential``."""
        for waiting in group_by_block(scope.model, layers) if scope.whole else [layers]:
            while waiting:
                grams = yield from self._observe(run, waiting)
                reached = {name for gram in grams for name in gram.names}
                run.cover(self, [], not_reached(waiting, reached))
                waiting = {name: layer for name, layer in waiting.items() if name in reached}
                if self.true_sequential:
                    grams = leading(grams, waiting)
                self._quantize_all(run, waiting, grams)

    def _observe(self, run: Run, layers: Mapping[str, nn.Linear]) -> Generator[None, None, list[GramMatrix]]:
        """Accumulate the Gram matrix of each input over one pass of the data, in the order of execution."""
        label = run.label(self)
        mixed = self.precision == "mixed"
        dtype = torch.float32 if self.precision == "float32" else torch.float64
        with TokenSample(layers, label) as sample, SecondMoment(layers, label, dtype, single=mixed) as grams:
            yield
        if mixed:
            for gram in grams.values():
                gram.total = gram.total.float()
        self._report_scarce(run, augment_undersampled(layers, grams, sample))
        return list({id(gram): gram for gram in grams.values()}.values())

    def _quantize_all(self, run: Run, waiting: dict[str, nn.Linear], grams: list[GramMatrix]) -> None:
        """Quantize the layers of each Gram matrix, and take them out of ``waiting``. Several ranks share the work."""
        parts = [{name: waiting.pop(name) for name in gram.names} for gram in grams]
        costs = [_cost(gram, layers) for gram, layers in zip(grams, parts, strict=True)]
        held = dict(enumerate(grams))
        grams.clear()

        def rounded(number: int) -> Rounded:
            return self._rounded(run, parts[number], held[number])

        for number, found in enumerate(divided([partial(rounded, number) for number in held], costs)):
            self._store(run, parts[number], held.pop(number), found)  # the matrix's memory is free then

    def _store(self, run: Run, layers: Mapping[str, nn.Linear], gram: GramMatrix, rounded: Rounded) -> None:
        """Store the codes of layers that read the same input, and report their errors."""
        errors = {}
        for names, codes, grid in rounded:
            begin = 0
            for name in names:
                rows = slice(begin, begin := begin + len(layers[name].weight))
                own = grid.rows(rows.start, rows.stop)
                # The inputs of experts are not quantized: transformers reads no scheme for them.
                inputs = self.activations if isinstance(layers[name], nn.Linear) else None
                dense = layers[name].weight.detach().clone()  # storing writes into the weights
                compressed.store(
                    layers[name], compressed.scheme_of(own.spec, inputs), codes[rows], own.scale, own.zero_point,
                    global_scale=own.global_scale,
                )  # fmt: skip
                errors[name] = output_error(dense, layers[name].weight, gram.total)
        report_errors(self, run, {name: errors[name] for name in layers})
        keep_bits(self, run, {name: bits_of(self, run, name) for name in layers})
        run.cover(self, layers)

    def _rounded(self, run: Run, layers: Mapping[str, nn.Linear], gram: GramMatrix) -> Rounded:
        """Return the codes of layers that read the same input; rows of equally many bits in one recursion."""
        hessian = gram.total
        what = f"{run.label(self)}: the Hessian of the inputs of {', '.join(layers)}"
        order = column_order(hessian, self.act_order)
        known = {name: bits_of(self, run, name) for name in layers}
        factor = inverse_cholesky(hessian, self.damp, what, order)
        upper, damp = factor.upper, factor.damp
        found = []
        for bits in dict.fromkeys(known.values()):
            names = [name for name, own in known.items() if own == bits]
            dense = torch.cat([layers[name].weight.detach() for name in names])
            grid = self._grid(dense, bits, hessian.diagonal())
            found.append((names, dense, recurse(dense, upper, order, grid, self.block_size), grid))
        if not self.refine or self.format != "int":  # scales of 4-bit floats are few: least squares does not find them
            return [(names, codes, grid) for names, _, codes, grid in found]
        del factor, upper  # the other factor takes their memory
        with damped(hessian, damp):
            upper = descent_factor(hessian, order)
            return [
                (names, *refine(dense, codes, grid, hessian, upper, order, self.refine, self.block_size))
                for names, dense, codes, grid in found
            ]

    def _grid(self, weight: Tensor, bits: int, energy: Tensor) -> Grid:
        """Return the scales of the recursion, from the original weights."""
        spec = weight_spec(weight.shape[1], bits, self.group_size, self.symmetric, format=self.format).fitted(weight)
        # In strips of rows, because the search holds several copies of them.
        importance = energy if self.observer == "mse" else None
        return stack(
            [
                make_grid(rows, spec, self.observer, None, importance, signed=self.signed_scales, norm=self.norm)
                for rows in weight.split(STRIP)
            ]
        )

    def _report_scarce(self, run: Run, scarce: Mapping[str, int]) -> None:
        """Record and log the matrices of experts that saw fewer tokens than they have inputs."""
        if not scarce:
            return
        run.report(self, experts_with_few_tokens=dict(scarce))
        log.warning("%s: %s", run.label(self), few_tokens_message(scarce))

    @hookimpl
    def finalize_model(self, run: Run) -> None:
        compressed.attach_quantizer(run.model)
        report_bits(self, run)

    def recompute(self, case: Any) -> dict[str, Any]:
        return {"layers_by_bits": _recompute.layers_by_bits(case), **_recompute.output_errors(case)}

    @hookimpl
    def export(self, run: Run, directory: Path, card: Card) -> None:
        metrics = run.reported(self)
        errors = metrics.get("relative_error")
        if not errors:
            return
        bits = bits_phrase(metrics["layers_by_bits"])
        card.paragraph(
            "GPTQ",
            f"{len(errors)} linear layers were quantized to {bits}. The relative squared error of their outputs on the "
            f"calibration data was {metrics['mean_relative_error']:.2e} on average.",
        )
        if few := metrics.get("experts_with_few_tokens"):
            card.paragraph("GPTQ: experts with few tokens", few_tokens_paragraph(few))
        add_worst_layers(card, "GPTQ", errors)


def _cost(gram: GramMatrix, layers: Mapping[str, nn.Linear]) -> float:
    """Return how long the rounding takes, beside others': factors of the matrix, and sweeps over the rows."""
    width = len(gram.total)
    return float(width) ** 2 * (width + 4 * sum(len(layer.weight) for layer in layers.values()))


def leading(grams: Sequence[GramMatrix], layers: Mapping[str, nn.Linear]) -> list[GramMatrix]:
    """Return the first Gram matrix in order of execution, and for experts those of the same matrix of all experts."""

    def stage(gram: GramMatrix) -> str:
        return getattr(layers[gram.names[0]], "parameter_name", gram.names[0])

    return [gram for gram in grams if stage(gram) == stage(grams[0])]


def stack(grids: Sequence[Grid]) -> Grid:
    """Return the grid of weights that are stacked along the output channels; all grids have one spec."""
    zeros = [grid.zero_point for grid in grids if grid.zero_point is not None]
    return Grid(grids[0].spec, torch.cat([grid.scale for grid in grids]), torch.cat(zeros) if zeros else None)


def quantize_columns(
    weight: Tensor,
    hessian: Tensor,
    grid: Grid,
    *,
    damp: float = 0.01,
    block_size: int = 128,
    act_order: bool = True,
    what: str = "the Hessian",
) -> Tensor:
    """Run the GPTQ recursion; return codes that keep the error of ``weight @ x`` low.

    Args:
        weight: ``[out, in]``, any float type. Exact zeros keep the code of zero.
        hessian: ``[in, in]``, ``E[x xᵀ]``, any scale; float32 or float64, the dtype of the computation.
        grid: fixed scales, per channel or per group of neighbouring columns.
        damp, block_size, act_order: see ``GPTQ``.
        what: the name of the Hessian in a ``NumericalError``.

    Returns:
        int8 codes ``[out, in]``.
    """
    order = column_order(hessian, act_order)
    return recurse(weight, inverse_cholesky(hessian, damp, what, order).upper, order, grid, block_size)


@hookimpl
def register_techniques(register):
    register(GPTQ)
