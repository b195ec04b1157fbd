r"""GPTQ: weights quantized column by column, each column's error passed on to those that are still free.

With the inputs ``X`` of a layer and ``H = X Xᵀ + λI`` the output error ``‖(Q - W) X‖²`` is kept low row by row: column
``q`` is rounded, and the rounding error is compensated in the columns after it (2210.17323, equations 2 and 3; OBQ's
update in one fixed order for all rows)::

    e_q        = (w_q - quant(w_q)) / U_qq                 H⁻¹ = Uᵀ U  (Cholesky, upper)
    w_{q+1:}  -= e_q · U_{q, q+1:}

Columns go in blocks of ``block_size``; what a block owes to the columns beyond it is applied in one product at its end.

Scales are fixed before the recursion from the weights as they were, in groups of *neighbouring* columns ("static
groups"), so ``act_order`` costs nothing at run time and no ``g_idx`` is stored.

On a pruned model the mask stays. Updates may push a pruned weight off zero; when its column comes it is "rounded" to
zero, and that error is compensated like any other: the joint treatment of SparseGPT (2301.00774, section 3.5). One
factor ``U`` serves all rows, whatever their masks, which is exact for none of them and the price of one factorization
for all.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import nn

from hf_optim import Contract, Paper, Reload, Technique, formats, hookimpl, option, technique
from hf_optim.toolkit import topology
from hf_optim.toolkit.grids import Grid, GridSpec, fit_group_size, make_grid, round_codes
from hf_optim.toolkit.hessian import inverse_factor
from hf_optim.toolkit.least_squares import output_error
from hf_optim.toolkit.masks import require_finite
from hf_optim.toolkit.observers import Moment, SecondMoment
from hf_optim.traits import FLOAT_WEIGHTS, QUANTIZED, SPARSE, SPARSE_NM

if TYPE_CHECKING:
    from hf_optim import Run, Scope
    from hf_optim.cards import Card


@technique(
    "gptq",
    family="quantization",
    paper=Paper(
        "2210.17323", "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers", 2022
    ),
    contract=Contract(needs={FLOAT_WEIGHTS}, adds={QUANTIZED}, drops={FLOAT_WEIGHTS}, keeps={SPARSE, SPARSE_NM}),
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
        bits: of a weight, 2 to 8.
        group_size: inputs that share a scale; the largest divisor of the layer's width up to it is used. None: one
            scale per output channel.
        symmetric: no zero points. Asymmetric codes are stored one to a byte (see ``hf_optim.formats.scheme``).
        observer: scales from ``"minmax"`` of the weights, or from a search for the least squared error (``"mse"``),
            in which each weight counts by the energy of its input.
        act_order: columns of the largest input energy first.
        damp: share of the mean diagonal of the Hessian added to its diagonal; raised tenfold where it does not do.
        block_size: columns between two updates of the rest; changes the result by rounding errors only.
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
    act_order: bool = True
    damp: float = option(0.01, above=0.0, high=1.0)
    block_size: int = option(128, low=1)
    true_sequential: bool = False
    precision: Literal["float32", "float64"] = "float32"

    @hookimpl
    def register_kernels(self, register):
        from hf_optim import Kernel
        from hf_optim_kernels.w8a8 import layer as w8a8
        from hf_optim_kernels.wna16 import layer as wna16

        register(Kernel("wna16", serves=wna16.serves, bind=wna16.bind, join=wna16.join))
        register(Kernel("w8a8", serves=w8a8.serves, bind=w8a8.bind, join=w8a8.join))

    @hookimpl
    def calibrate(self, run: Run, scope: Scope) -> Iterator[None]:
        layers, skipped = formats.storable(scope, self.targets, self.skip, label=run.label(self))
        require_finite({f"{name}.weight": layer.weight for name, layer in layers.items()}, run.label(self))
        run.touch(self, [], skipped)
        for waiting in in_order(scope, layers):
            while waiting:
                with SecondMoment(waiting, run.label(self), getattr(torch, self.precision)) as moments:
                    yield
                groups = {id(moment): moment for moment in moments.values()}.values()
                for moment in list(groups)[: 1 if self.true_sequential else None]:
                    self._quantize(run, {name: waiting.pop(name) for name in moment.names}, moment)
                idle = [name for name in waiting if name not in moments]
                if idle:
                    run.touch(self, [], {"no calibration input reached it": idle})
                waiting = {name: layer for name, layer in waiting.items() if name in moments}

    def _quantize(self, run: Run, layers: Mapping[str, nn.Linear], moment: Moment) -> None:
        """Quantize layers that read the same inputs, all rows in one recursion."""
        where = f"{run.label(self)}: the Hessian of the inputs of {', '.join(layers)}"
        # Copies: storing writes into the weights.
        dense = {name: layer.weight.detach().to(moment.total.dtype, copy=True) for name, layer in layers.items()}
        energy = moment.total.diagonal()
        grids = {name: self._grid(layer, energy) for name, layer in layers.items()}
        codes = quantize_columns(
            torch.cat(list(dense.values())),
            moment.mean,
            stack(list(grids.values())),
            damp=self.damp,
            block_size=self.block_size,
            act_order=self.act_order,
            what=where,
        )
        errors = {}
        for (name, layer), own in zip(
            layers.items(), codes.split([len(weight) for weight in dense.values()]), strict=True
        ):
            grid = grids[name]
            formats.store(layer, formats.scheme_of(grid.spec), own, grid.scale, grid.zero_point)
            errors[name] = output_error(dense[name], layer.weight, moment.total)
        self._report(run, errors)
        run.touch(self, layers)

    def _grid(self, layer: nn.Linear, energy: torch.Tensor) -> Grid:
        weight = layer.weight.detach()
        strategy: Literal["group", "channel"] = "group" if self.group_size else "channel"
        size = fit_group_size(weight.shape[1], self.group_size) if self.group_size else None
        spec = GridSpec(self.bits, "int", strategy, size, self.symmetric)
        return make_grid(weight, spec, self.observer, importance=energy if self.observer == "mse" else None)

    def _report(self, run: Run, errors: Mapping[str, float]) -> None:
        state = run.state(self)
        state.errors = getattr(state, "errors", {}) | {name: float(f"{error:.6g}") for name, error in errors.items()}
        mean = sum(state.errors.values()) / len(state.errors)
        run.report(self, relative_error=state.errors, mean_relative_error=float(f"{mean:.6g}"))

    @hookimpl
    def finalize_model(self, run: Run) -> None:
        formats.attach_quantizer(run.model)

    @hookimpl
    def export(self, run: Run, directory: Path, card: Card) -> None:
        figures = run.record.steps.get(str(run.position(self)), {})
        errors = figures.get("relative_error")
        if not errors:
            return
        worst = sorted(errors, key=lambda name: errors[name], reverse=True)[:5]
        card.paragraph(
            "GPTQ",
            f"{len(errors)} linear layers were quantized to {self.bits} bits. The relative squared error of their "
            f"outputs on the calibration data is {figures['mean_relative_error']:.2e} in the mean.",
        )
        card.table(
            "GPTQ: layers with the largest error",
            ["layer", "relative squared output error"],
            [[f"`{name}`", f"{errors[name]:.2e}"] for name in worst],
        )


def in_order(scope: Scope, layers: Mapping[str, nn.Linear]) -> list[dict[str, nn.Linear]]:
    """The layers of a scope by block, in execution order, and last those outside the blocks."""
    if not scope.whole:
        return [dict(layers)]
    found = [block.holds for block in topology.blocks(scope.model)]
    inside = [{name: layer for name, layer in layers.items() if holds(name)} for holds in found]
    outside = {name: layer for name, layer in layers.items() if not any(holds(name) for holds in found)}
    return [part for part in (*inside, outside) if part]


def stack(grids: list[Grid]) -> Grid:
    """The grid of weights stacked along the output channels, all of one spec."""
    zeros = [grid.zero_point for grid in grids if grid.zero_point is not None]
    return Grid(grids[0].spec, torch.cat([grid.scale for grid in grids]), torch.cat(zeros) if zeros else None)


@torch.no_grad()
def quantize_columns(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    grid: Grid,
    *,
    damp: float = 0.01,
    block_size: int = 128,
    act_order: bool = True,
    what: str = "the Hessian",
) -> torch.Tensor:
    """The GPTQ recursion: codes that keep the error of ``weight @ x`` low.

    Args:
        weight: ``[out, in]``, float32 or float64 like ``hessian``. Exact zeros keep the code of zero.
        hessian: ``[in, in]``, ``E[x xᵀ]``, any scale.
        grid: fixed scales, per channel or per group of neighbouring columns.
        damp, block_size, act_order: see ``GPTQ``.
        what: what a ``NumericalError`` calls the Hessian.

    Returns:
        int8 codes ``[out, in]``.
    """
    columns = weight.shape[1]
    order = torch.arange(columns, device=weight.device)
    if act_order:
        order = hessian.diagonal().argsort(descending=True, stable=True)
    upper = inverse_factor(hessian[order][:, order], damp, what).upper
    rest = weight[:, order]
    kept = rest != 0
    group = order // (grid.spec.group_size or columns)
    scale = grid.scale.to(weight.dtype)[:, group]
    zero = torch.zeros_like(scale) if grid.zero_point is None else grid.zero_point.to(weight.dtype)[:, group]
    codes = torch.empty_like(rest)
    for begin in range(0, columns, block_size):
        end = min(begin + block_size, columns)
        errors = torch.empty_like(rest[:, begin:end])
        for j in range(begin, end):
            free = rest[:, j]
            code = round_codes(free, scale[:, j], zero[:, j], grid.spec)
            code = codes[:, j] = torch.where(kept[:, j], code, zero[:, j])
            error = errors[:, j - begin] = (free - (code - zero[:, j]) * scale[:, j]) / upper[j, j]
            rest[:, j + 1 : end] -= torch.outer(error, upper[j, j + 1 : end])
        rest[:, end:] -= errors @ upper[begin:end, end:]
    return codes[:, order.argsort()].to(torch.int8)


@hookimpl
def register_techniques(register):
    register(GPTQ)
