r"""OBQ, Optimal Brain Quantization: every row quantizes its weights one by one, always the one that costs least.

With the inputs ``X`` of a layer, ``H = X Xᵀ + λI``, and ``F`` the weights of a row that are not quantized yet, the next
weight and the compensation in the others are (2208.11580, section 5)::

    p    = argmin over q in F of (quant(w_q) - w_q)² / [H_F⁻¹]_qq
    δ_F  = -(w_p - quant(w_p)) / [H_F⁻¹]_pp · [H_F⁻¹]_{:,p}

after which ``p`` leaves ``H_F⁻¹`` by one step of Gaussian elimination (lemma 1). Every row has an order of its own and
so an inverse of its own: ``out · in³`` operations a layer, against ``in³ + out · in²`` where all rows share one order.
It is for layers of up to a few thousand inputs.

A weight that compensation has pushed beyond the ends of its grid, so that its error exceeds half a step, is quantized
as soon as it appears, while there are many free weights left to make up for it (section 5); of several, the one that
costs least goes first.

Grids are fixed before the recursion. On a pruned model zeros stay: they leave the problem of their row first, so that
compensation is exact for the mask of each row.

Greed is not optimal: the cheapest weights go first, and the dear ones last, when nothing is left to make up for them.
Where a few inputs hold nearly all the energy (layers of the first block of babyllama-1m), one order for all rows that
begins with those inputs has the smaller error; in the mean over the layers every row in its own order does better.

Differences to the paper: a block is calibrated on the outputs of the quantized blocks before it, which the paper calls
sequential OBQ, and there are no batch-norm statistics to correct in a transformer.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import nn

from hf_optim import Contract, ModelError, Paper, Reload, Technique, compressed, hookimpl, option, technique, traits
from hf_optim.toolkit.pruning import require_finite
from hf_optim.toolkit.quantization import Grid, GridSpec, fit_group_size, make_grid, output_error, quantize_greedily
from hf_optim.toolkit.statistics import GramMatrix, SecondMoment
from hf_optim.toolkit.topology import group_by_block

if TYPE_CHECKING:
    from hf_optim import Card, Run, Scope

log = logging.getLogger(__name__)
# A layer expected to take longer than this, in seconds, is announced.
LONG = 60.0


@technique(
    "obq",
    family="quantization",
    paper=Paper(
        "2208.11580",
        "Optimal Brain Compression: A Framework for Accurate Post-Training Quantization and Pruning",
        2022,
    ),
    contract=Contract(
        needs={traits.FLOAT_WEIGHTS},
        adds={traits.QUANTIZED},
        drops={traits.FLOAT_WEIGHTS},
        keeps={traits.SPARSE, traits.SPARSE_NM},
    ),
    reload=Reload.STOCK_FORMAT,
)
class OBQ(Technique):
    """Quantize the cheapest weight of every row, let the free ones make up for it, and so on.

    Attributes:
        targets: which linears.
        skip: which of them to leave out.
        bits: of a weight, 2 to 8; where an earlier step has assigned bits to a layer, those are used.
        group_size: inputs that share a scale; the largest divisor of the layer's width up to it is used. None: one
            scale per output channel.
        symmetric: no zero points. Asymmetric codes are stored one to a byte (see ``hf_optim.formats.scheme``).
        observer: scales from ``"minmax"`` of the weights, or from a search for the least squared error (``"mse"``),
            in which each weight counts by the energy of its input.
        damp: share of the mean diagonal of the Hessian added to its diagonal; raised where it does not do.
        outliers_first: quantize weights beyond the ends of their grid at once.
        precision: of the Hessian and the recursion, ``"float32"`` or ``"float64"``.
        memory: GiB for the inverses of the rows in work; rows are taken in chunks that fit.
        widest: inputs of the widest layer to work on; a wider one is refused before any work is done.
    """

    targets: tuple[str, ...] = ("Linear",)
    skip: tuple[str, ...] = ()
    bits: int = option(4, low=2, high=8)
    group_size: int | None = option(128, low=1)
    symmetric: bool = True
    observer: Literal["minmax", "mse"] = "minmax"
    damp: float = option(0.01, above=0.0, high=1.0)
    outliers_first: bool = True
    precision: Literal["float32", "float64"] = "float32"
    memory: float = option(1.0, above=0.0)
    widest: int = option(4096, low=1)

    @hookimpl
    def calibrate(self, run: Run, scope: Scope) -> Iterator[None]:
        layers, skipped = compressed.storable(scope, self.targets, self.skip, label=run.label(self))
        require_finite({f"{name}.weight": layer.weight for name, layer in layers.items()}, run.label(self))
        self._refuse_wide(run, scope)
        run.cover(self, [], skipped)
        for part in group_by_block(scope.model, layers) if scope.whole else [layers]:
            with SecondMoment(part, run.label(self), getattr(torch, self.precision)) as moments:
                yield
            for name, layer in part.items():
                if name in moments:
                    self._quantize(run, name, layer, moments[name])
            idle = [name for name in part if name not in moments]
            if idle:
                run.cover(self, [], {"no calibration input reached it": idle})

    def _refuse_wide(self, run: Run, scope: Scope) -> None:
        for name, layer in scope.select(self.targets, self.skip).items():
            if isinstance(layer, nn.Linear) and layer.in_features > self.widest:
                rows, columns = layer.weight.shape
                raise ModelError(
                    f"{run.label(self)}: {name} has {columns} inputs, more than widest: {self.widest}. Its {rows} rows "
                    f"would take {rows * columns**3 / 3:.1e} multiplications. Raise widest, skip the layer, or use a "
                    "technique with one order of columns for all rows"
                )

    def _quantize(self, run: Run, name: str, layer: nn.Linear, moment: GramMatrix) -> None:
        # A copy: storing writes into the weight.
        dense = layer.weight.detach().to(moment.total.dtype, copy=True)
        grid = self._grid(layer, run.bits_of(name, self.bits), moment.total.diagonal())
        codes = self._codes(run, name, dense, moment.mean, grid)
        compressed.store(layer, compressed.scheme_of(grid.spec), codes, grid.scale, grid.zero_point)
        self._report(run, name, output_error(dense, layer.weight, moment.total))
        run.cover(self, [name])

    def _codes(self, run: Run, name: str, dense: torch.Tensor, hessian: torch.Tensor, grid: Grid) -> torch.Tensor:
        started = time.monotonic()

        def announce(done: int, rows: int) -> None:
            expected = (time.monotonic() - started) * rows / done
            if not announced and expected > LONG and done < rows:
                log.warning("%s: %s, %d rows, will take about %.0f s", run.label(self), name, rows, expected)
                announced.append(name)

        announced: list[str] = []
        return quantize_greedily(
            dense,
            hessian,
            grid,
            damp=self.damp,
            outliers_first=self.outliers_first,
            memory=self.memory * 2**30,
            label=f"{run.label(self)}: the Hessian of the inputs of {name}",
            progress=announce,
        )

    def _grid(self, layer: nn.Linear, bits: int, energy: torch.Tensor) -> Grid:
        weight = layer.weight.detach()
        strategy: Literal["group", "channel"] = "group" if self.group_size else "channel"
        size = fit_group_size(weight.shape[1], self.group_size) if self.group_size else None
        spec = GridSpec(bits, "int", strategy, size, self.symmetric)
        return make_grid(weight, spec, self.observer, importance=energy if self.observer == "mse" else None)

    def _report(self, run: Run, name: str, error: float) -> None:
        state = run.state(self)
        state.errors = getattr(state, "errors", {}) | {name: float(f"{error:.6g}")}
        mean = sum(state.errors.values()) / len(state.errors)
        run.report(self, relative_error=state.errors, mean_relative_error=float(f"{mean:.6g}"))

    @hookimpl
    def finalize_model(self, run: Run) -> None:
        compressed.attach_quantizer(run.model)

    @hookimpl
    def export(self, run: Run, directory: Path, card: Card) -> None:
        figures: Mapping = run.reported(self)
        errors = figures.get("relative_error")
        if not errors:
            return
        worst = sorted(errors, key=lambda name: errors[name], reverse=True)[:5]
        card.paragraph(
            "OBQ",
            f"{len(errors)} linear layers were quantized, every row in an order of its own. The relative squared error "
            f"of their outputs on the calibration data is {figures['mean_relative_error']:.2e} in the mean.",
        )
        card.table(
            "OBQ: layers with the largest error",
            ["layer", "relative squared output error"],
            [[f"`{name}`", f"{errors[name]:.2e}"] for name in worst],
        )


@hookimpl
def register_techniques(register):
    register(OBQ)
