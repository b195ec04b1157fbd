r"""GPTQ: weights quantized column by column, each column's error passed on to those that are still free.

With the inputs ``X`` of a layer and ``H = X Xᵀ + λI`` the output error ``‖(Q - W) X‖²`` is kept low row by row: column
``q`` is rounded, and the rounding error is compensated in the columns after it (2210.17323, equations 2 and 3; OBQ's
update in one fixed order for all rows)::

    e_q        = (w_q - quant(w_q)) / U_qq                 H⁻¹ = Uᵀ U  (Cholesky, upper)
    w_{q+1:}  -= e_q · U_{q, q+1:}

Columns go in blocks of ``block_size``; what a block owes to the columns beyond it is applied in one product at its end.
On CUDA a block is one launch of a Triton kernel, which keeps its rows in registers; elsewhere a block goes by halves.

Scales are fixed before the recursion from the weights as they were, in groups of *neighbouring* columns ("static
groups"), so ``act_order`` costs nothing at run time and no ``g_idx`` is stored.

On a pruned model the mask stays. Updates may push a pruned weight off zero; when its column comes it is "rounded" to
zero, and that error is compensated like any other: the joint treatment of SparseGPT (2301.00774, section 3.5). One
factor ``U`` serves all rows, whatever their masks, which is exact for none of them and the price of one factorization
for all.

In a mixture of experts each matrix of each expert is a layer of its own, with the Hessian of the tokens that the router
sends there. An expert that sees fewer tokens than it has inputs is named, and is calibrated on the tokens of its layer
as well (``hf_optim.toolkit.experts.top_up``). Their codes have no zero points.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from hf_optim import Contract, Paper, Reload, Technique, compressed, hookimpl, option, technique, traits
from hf_optim.toolkit.pruning import require_finite
from hf_optim.toolkit.quantization import (
    Grid,
    GridSpec,
    fit_group_size,
    inverse_factor,
    make_grid,
    output_error,
    round_codes,
)
from hf_optim.toolkit.statistics import Moment, SecondMoment, TokenSample, top_up
from hf_optim.toolkit.topology import by_block

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
    contract=Contract(
        needs={traits.FLOAT_WEIGHTS},
        adds={traits.QUANTIZED},
        drops={traits.FLOAT_WEIGHTS},
        keeps={traits.SPARSE, traits.SPARSE_NM},
    ),
    reload=Reload.STOCK_FORMAT,
)
class GPTQ(Technique):
    """Quantize weights one column at a time and let the others make up for the error.

    Blocks are quantized in execution order, each on the outputs of the quantized blocks before it. Within a block, all
    linears are quantized on one pass of the data, or group by group with ``true_sequential``. Over a whole model there
    is one pass per block, and one for what lies outside the blocks.

    Attributes:
        targets: which linears.
        skip: which of them to leave out.
        bits: of a weight, 2 to 8. Where an earlier step has assigned bits to a layer, those are used; a layer with
            more than 8 stays as it is.
        group_size: inputs that share a scale; the largest divisor of the layer's width up to it is used. None: one
            scale per output channel.
        symmetric: no zero points. Asymmetric codes are stored one to a byte (see ``hf_optim.formats.scheme``).
        observer: scales from ``"minmax"`` of the weights, or from a search for the least squared error (``"mse"``),
            in which each weight counts by the energy of its input.
        act_order: columns of the largest input energy first.
        activations: quantize the inputs of the layers to ``"int8"``, each token on a grid of its own (W4A8); blocks
            that follow are calibrated on what that gives.
        damp: share of the mean diagonal of the Hessian added to its diagonal; raised tenfold where it does not do. 1 %
            is the paper's.
        block_size: columns between two updates of the rest (on CUDA, 256 at most); changes the result by rounding
            errors only.
        true_sequential: quantize linears that read the outputs of others in the block after those, on what they
            compute by then: several passes per block.
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
        layers, skipped = compressed.storable(
            scope, self.targets, self.skip, label=run.label(self), experts=True, symmetric=self.symmetric
        )
        require_finite({f"{name}.weight": layer.weight for name, layer in layers.items()}, run.label(self))
        wide = [name for name in layers if run.bits_of(name, self.bits) > 8]
        layers = {name: layer for name, layer in layers.items() if name not in wide}
        run.cover(self, [], {**skipped, **({"more than 8 bits are assigned to it": wide} if wide else {})})
        for waiting in by_block(scope.model, layers) if scope.whole else [layers]:
            while waiting:
                label = run.label(self)
                with (
                    TokenSample(waiting, label) as sample,
                    SecondMoment(waiting, label, getattr(torch, self.precision)) as moments,
                ):
                    yield
                self._report_scarce(run, top_up(waiting, moments, sample))
                groups = list({id(moment): moment for moment in moments.values()}.values())
                idle = [name for name in waiting if name not in moments]
                if idle:
                    run.cover(self, [], {"no calibration input reached it": idle})
                waiting = {name: layer for name, layer in waiting.items() if name in moments}
                moments.clear()  # each is gone as soon as its layers are done
                if self.true_sequential:
                    groups = leading(groups, waiting)
                while groups:
                    moment = groups.pop(0)
                    self._quantize(run, {name: waiting.pop(name) for name in moment.names}, moment)

    def _quantize(self, run: Run, layers: Mapping[str, nn.Linear], moment: Moment) -> None:
        """Quantize layers that read the same inputs; rows of equally many bits in one recursion."""
        what = f"{run.label(self)}: the Hessian of the inputs of {', '.join(layers)}"
        order = column_order(moment.total, self.act_order)
        upper = inverse_factor(moment.total, self.damp, what, order).upper
        widths = {name: run.bits_of(name, self.bits) for name in layers}
        errors = {}
        for bits in dict.fromkeys(widths.values()):
            names = [name for name, own in widths.items() if own == bits]
            # A copy: storing writes into the weights.
            dense = torch.cat([layers[name].weight.detach() for name in names])
            grid = self._grid(dense, bits, moment.total.diagonal())
            codes = recurse(dense, upper, order, grid, self.block_size)
            begin = 0
            for name in names:
                rows = slice(begin, begin := begin + len(layers[name].weight))
                own = grid.rows(rows.start, rows.stop)
                # The inputs of experts stay as they are: transformers reads no scheme for them.
                inputs = self.activations if isinstance(layers[name], nn.Linear) else None
                compressed.store(
                    layers[name], compressed.scheme_of(own.spec, inputs), codes[rows], own.scale, own.zero_point
                )
                errors[name] = output_error(dense[rows], layers[name].weight, moment.total)
        self._report(run, {name: errors[name] for name in layers})
        run.cover(self, layers)

    def _grid(self, weight: Tensor, bits: int, energy: Tensor) -> Grid:
        """Fixed scales, from the weights as they are."""
        strategy: Literal["group", "channel"] = "group" if self.group_size else "channel"
        size = fit_group_size(weight.shape[1], self.group_size) if self.group_size else None
        spec = GridSpec(bits, "int", strategy, size, self.symmetric)
        importance = energy if self.observer == "mse" else None
        # Rows in strips: the search holds several copies of them.
        return stack([make_grid(rows, spec, self.observer, None, importance) for rows in weight.split(STRIP)])

    def _report_scarce(self, run: Run, scarce: Mapping[str, int]) -> None:
        """Name the experts that saw fewer tokens than they have inputs."""
        if not scarce:
            return
        state = run.state(self)
        state.scarce = getattr(state, "scarce", {}) | dict(scarce)
        run.report(self, experts_with_few_tokens=state.scarce)
        few = ", ".join(f"{name} ({count})" for name, count in list(scarce.items())[:5])
        log.warning(
            "%s: %d matrices of experts saw fewer tokens than they have inputs, and were calibrated on tokens that the "
            "router sent elsewhere as well; more calibration data would help: %s%s",
            run.label(self),
            len(scarce),
            few,
            ", ..." if len(scarce) > 5 else "",
        )

    def _report(self, run: Run, errors: Mapping[str, float]) -> None:
        state = run.state(self)
        state.errors = getattr(state, "errors", {}) | {name: float(f"{error:.6g}") for name, error in errors.items()}
        mean = sum(state.errors.values()) / len(state.errors)
        run.report(self, relative_error=state.errors, mean_relative_error=float(f"{mean:.6g}"))

    @hookimpl
    def finalize_model(self, run: Run) -> None:
        compressed.attach_quantizer(run.model)

    @hookimpl
    def export(self, run: Run, directory: Path, card: Card) -> None:
        figures = run.reported(self)
        errors = figures.get("relative_error")
        if not errors:
            return
        worst = sorted(errors, key=lambda name: errors[name], reverse=True)[:5]
        card.paragraph(
            "GPTQ",
            f"{len(errors)} linear layers were quantized to {self.bits} bits. The relative squared error of their "
            f"outputs on the calibration data is {figures['mean_relative_error']:.2e} in the mean.",
        )
        if few := figures.get("experts_with_few_tokens"):
            card.paragraph(
                "GPTQ: experts with few tokens",
                f"{len(few)} matrices of experts saw fewer calibration tokens than they have inputs. They were "
                "calibrated as if more tokens, average ones of their layer, had been sent to them, up to that number.",
            )
        card.table(
            "GPTQ: layers with the largest error",
            ["layer", "relative squared output error"],
            [[f"`{name}`", f"{errors[name]:.2e}"] for name in worst],
        )


def leading(moments: Sequence[Moment], layers: Mapping[str, nn.Linear]) -> list[Moment]:
    """The first of the moments in order of execution, with those of the same matrix of all experts beside it."""
    stage = {getattr(layers[moment.names[0]], "stage", moment.names[0]): None for moment in moments[:1]}
    return [moment for moment in moments if getattr(layers[moment.names[0]], "stage", moment.names[0]) in stage]


def stack(grids: Sequence[Grid]) -> Grid:
    """The grid of weights stacked along the output channels, all of one spec."""
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
    """The GPTQ recursion: codes that keep the error of ``weight @ x`` low.

    Args:
        weight: ``[out, in]``, any float type. Exact zeros keep the code of zero.
        hessian: ``[in, in]``, ``E[x xᵀ]``, any scale; float32 or float64, the type of the computation.
        grid: fixed scales, per channel or per group of neighbouring columns.
        damp, block_size, act_order: see ``GPTQ``.
        what: what a ``NumericalError`` calls the Hessian.

    Returns:
        int8 codes ``[out, in]``.
    """
    order = column_order(hessian, act_order)
    return recurse(weight, inverse_factor(hessian, damp, what, order).upper, order, grid, block_size)


def column_order(hessian: Tensor, act_order: bool) -> Tensor:
    """int64 ``[in]``: the columns in the order in which they are rounded."""
    if not act_order:
        return torch.arange(len(hessian), device=hessian.device)
    return hessian.diagonal().argsort(descending=True, stable=True)


@torch.no_grad()
def recurse(weight: Tensor, upper: Tensor, order: Tensor, grid: Grid, block_size: int = 128) -> Tensor:
    """Round the columns of ``weight`` in ``order``: int8 codes ``[out, in]``.

    Args:
        weight: ``[out, in]``, any float type. Exact zeros keep the code of zero.
        upper: ``[in, in]``, ``U`` of the columns in ``order``; its type is that of the computation.
        order: int64 ``[in]``, a permutation.
        grid: per channel or per group of neighbouring columns.
        block_size: columns between two updates of the rest.
    """
    size = grid.spec.group_size or weight.shape[1]
    if upper.is_cuda and upper.dtype == torch.float32:
        try:
            from hf_optim_kernels.column_recursion import launch as kernels
        except ImportError:
            pass  # no Triton: torch does it, column by column
        else:
            ends = (grid.spec.low, grid.spec.high)
            return kernels.recurse(weight, upper, order, grid.scale.float(), grid.zero_point, size, *ends, block_size)
    # Columns as rows: each is read and written whole.
    rest = weight.T[order].to(upper.dtype)
    work = _Columns(grid, rest, rest != 0, upper, order // size)
    codes = torch.empty(weight.T.shape, dtype=torch.int8, device=weight.device)
    for begin in range(0, len(rest), block_size):
        end = min(begin + block_size, len(rest))
        codes[order[begin:end]] = work.settle(begin, end)
        rest[end:].addmm_(upper[begin:end, end:].T, rest[begin:end], alpha=-1)
    return codes.T.contiguous()


@dataclass
class _Columns:
    """The recursion in torch. ``rest`` ``[in, out]``: columns in order; those that are rounded hold their errors."""

    grid: Grid
    rest: Tensor
    kept: Tensor
    upper: Tensor
    group: Tensor

    def settle(self, begin: int, end: int) -> Tensor:
        """Round columns ``begin`` to ``end``, by halves: int8 codes ``[end - begin, out]``."""
        if end - begin == 1:
            return self.round_one(begin)[None]
        middle, rest = (begin + end) // 2, self.rest
        first = self.settle(begin, middle)
        rest[middle:end].addmm_(self.upper[begin:middle, middle:end].T, rest[begin:middle], alpha=-1)
        return torch.cat([first, self.settle(middle, end)])

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
