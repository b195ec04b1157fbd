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

On a pruned model the mask stays. Updates may move a pruned weight away from zero; when its column is processed it is
"rounded" to zero, and that error is compensated like any other: the joint treatment of SparseGPT (2301.00774, section
3.5). One factor ``U`` serves all rows, whatever their masks. That is exact for none of them, and the price of a single
factorization.

Differences from the paper's settings: its grids are asymmetric, here they are symmetric by default (a choice, for the
packed format); its columns come in their own order, ``act_order`` is a later addition; and it computes the scales of a
group from the compensated weights when the recursion reaches the group, where static groups use the original ones.

In a mixture of experts each matrix of each expert is a separate layer, with the Hessian of the tokens that the router
sends to that expert. An expert that sees fewer tokens than it has inputs is reported, and is also calibrated on other
tokens of its layer (``hf_optim.toolkit.statistics.augment_undersampled``). The codes of experts have no zero points.
"""

from __future__ import annotations

import logging
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from hf_optim import Paper, Reload, Technique, compressed, hookimpl, option, technique
from hf_optim.toolkit.quantization import Grid, inverse_cholesky, make_grid, output_error, round_codes
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
from ._weights import (
    QUANTIZES,
    add_worst_layers,
    bits_phrase,
    keep_bits,
    report_bits,
    report_errors,
    select_layers,
    weight_spec,
)

if TYPE_CHECKING:
    from hf_optim import Card, Run, Scope

log = logging.getLogger(__name__)
# Rows whose scales are fitted at a time.
STRIP = 2048


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
        observer: scales from ``"minmax"`` of the weights, or from a search for the least squared error (``"mse"``),
            in which each weight is weighted by the mean square of its input.
        act_order: process the columns of the largest inputs (mean square) first.
        activations: quantize the inputs of the layers to ``"int8"``, each token on its own grid (W4A8); later blocks
            are calibrated on the result.
        damp: share of the mean diagonal of the Hessian added to its diagonal; raised tenfold if the factorization
            fails. The paper's is 1 %.
        block_size: columns between two updates of the rest (on CUDA, 256 at most); changes the result by rounding
            errors only.
        true_sequential: quantize linears that read the outputs of other linears of the block after those, on inputs
            that include their quantization: several passes per block.
        precision: of the Hessian and the recursion, ``"float32"`` or ``"float64"``.
    """

    targets: tuple[str, ...] = ("Linear",)
    skip: tuple[str, ...] = ()
    bits: int = option(4, low=2, high=8)
    group_size: int | None = option(128, low=1)
    symmetric: bool = True
    observer: Literal["minmax", "mse"] = "minmax"
    activations: Literal["int8"] | None = None
    act_order: bool = True
    damp: float = option(0.01, above=0.0, high=1.0)
    block_size: int = option(128, low=1)
    true_sequential: bool = False
    precision: Literal["float32", "float64"] = "float32"

    @hookimpl
    def calibrate(self, run: Run, scope: Scope) -> Iterator[None]:
        layers, skipped = select_layers(self, run, scope, experts=True, symmetric=self.symmetric)
        wide = [name for name in layers if run.bits_of(name, self.bits) > 8]
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
                while grams:
                    gram = grams.pop(0)  # its memory is freed once its layers are quantized
                    self._quantize(run, {name: waiting.pop(name) for name in gram.names}, gram)

    def _observe(self, run: Run, layers: Mapping[str, nn.Linear]) -> Generator[None, None, list[GramMatrix]]:
        """Accumulate the Gram matrix of each input over one pass of the data, in the order of execution."""
        label = run.label(self)
        with (
            TokenSample(layers, label) as sample,
            SecondMoment(layers, label, getattr(torch, self.precision)) as grams,
        ):
            yield
        self._report_scarce(run, augment_undersampled(layers, grams, sample))
        return list({id(gram): gram for gram in grams.values()}.values())

    def _quantize(self, run: Run, layers: Mapping[str, nn.Linear], gram: GramMatrix) -> None:
        """Quantize layers that read the same input; rows of equally many bits in one recursion."""
        what = f"{run.label(self)}: the Hessian of the inputs of {', '.join(layers)}"
        order = column_order(gram.total, self.act_order)
        upper = inverse_cholesky(gram.total, self.damp, what, order).upper
        bits_of = {name: run.bits_of(name, self.bits) for name in layers}
        errors = {}
        for bits in dict.fromkeys(bits_of.values()):
            names = [name for name, own in bits_of.items() if own == bits]
            # A copy, because storing writes into the weights.
            dense = torch.cat([layers[name].weight.detach() for name in names])
            grid = self._grid(dense, bits, gram.total.diagonal())
            codes = recurse(dense, upper, order, grid, self.block_size)
            begin = 0
            for name in names:
                rows = slice(begin, begin := begin + len(layers[name].weight))
                own = grid.rows(rows.start, rows.stop)
                # The inputs of experts are not quantized: transformers reads no scheme for them.
                inputs = self.activations if isinstance(layers[name], nn.Linear) else None
                compressed.store(
                    layers[name], compressed.scheme_of(own.spec, inputs), codes[rows], own.scale, own.zero_point
                )
                errors[name] = output_error(dense[rows], layers[name].weight, gram.total)
        report_errors(self, run, {name: errors[name] for name in layers})
        keep_bits(self, run, bits_of)
        run.cover(self, layers)

    def _grid(self, weight: Tensor, bits: int, hessian_diagonal: Tensor) -> Grid:
        """Return fixed scales, from the original weights."""
        spec = weight_spec(weight.shape[1], bits, self.group_size, self.symmetric)
        importance = hessian_diagonal if self.observer == "mse" else None
        # In strips of rows, because the search holds several copies of them.
        return stack([make_grid(rows, spec, self.observer, None, importance) for rows in weight.split(STRIP)])

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


def column_order(hessian: Tensor, act_order: bool) -> Tensor:
    """Return the columns in the order in which they are rounded, int64 ``[in]``."""
    if not act_order:
        return torch.arange(len(hessian), device=hessian.device)
    return hessian.diagonal().argsort(descending=True, stable=True)


@torch.no_grad()
def recurse(weight: Tensor, upper: Tensor, order: Tensor, grid: Grid, block_size: int = 128) -> Tensor:
    """Round the columns of ``weight`` in ``order``; return int8 codes ``[out, in]``.

    Args:
        weight: ``[out, in]``, any float type. Exact zeros keep the code of zero.
        upper: ``[in, in]``, ``U`` of the columns in ``order``, in the dtype of the computation.
        order: int64 ``[in]``, a permutation.
        grid: per channel or per group of neighbouring columns.
        block_size: columns between two updates of the rest.
    """
    size = grid.spec.group_size or weight.shape[1]
    if upper.is_cuda and upper.dtype == torch.float32:
        try:
            from hf_optim_kernels.column_recursion import launch as kernels
        except ImportError as error:
            log.debug("no kernel for GPTQ's recursion (%s): torch runs it, column by column", error)
        else:
            ends = (grid.spec.low, grid.spec.high)
            return kernels.recurse(weight, upper, order, grid.scale.float(), grid.zero_point, size, *ends, block_size)
    # Transposed, so that a column is contiguous in memory.
    rest = weight.T[order].to(upper.dtype)
    work = _Columns(grid, rest, rest != 0, upper, order // size)
    codes = torch.empty(weight.T.shape, dtype=torch.int8, device=weight.device)
    for begin in range(0, len(rest), block_size):
        end = min(begin + block_size, len(rest))
        codes[order[begin:end]] = work.round_range(begin, end)
        rest[end:].addmm_(upper[begin:end, end:].T, rest[begin:end], alpha=-1)
    return codes.T.contiguous()


@dataclass
class _Columns:
    """The recursion in torch. ``rest`` ``[in, out]``: columns in order; rounded columns hold their errors instead."""

    grid: Grid
    rest: Tensor
    kept: Tensor
    upper: Tensor
    group: Tensor

    def round_range(self, begin: int, end: int) -> Tensor:
        """Round columns ``begin`` to ``end`` by halves; return int8 codes ``[end - begin, out]``."""
        if end - begin == 1:
            return self.round_one(begin)[None]
        middle, rest = (begin + end) // 2, self.rest
        first = self.round_range(begin, middle)
        rest[middle:end].addmm_(self.upper[begin:middle, middle:end].T, rest[begin:middle], alpha=-1)
        return torch.cat([first, self.round_range(middle, end)])

    def round_one(self, q: int) -> Tensor:
        free, group = self.rest[q], self.group[q]
        scale = self.grid.scale[:, group].to(free.dtype)
        zero = torch.zeros_like(scale) if self.grid.zero_point is None else self.grid.zero_point[:, group].to(scale)
        code = torch.where(self.kept[q], round_codes(free, scale, zero, self.grid.spec), zero)
        self.rest[q] = (free - (code - zero) * scale) / self.upper[q, q]
        return code.to(torch.int8)


@hookimpl
def register_techniques(register):
    register(GPTQ)
