r"""OBQ, Optimal Brain Quantization: every row quantizes its weights one at a time, always the one that costs least.

With the inputs ``X`` of a layer, ``H = X Xᵀ + λI``, and ``F`` the weights of a row that are not quantized yet, the next
weight and the compensation in the others are (2208.11580, section 5)::

    p    = argmin over q in F of (quant(w_q) - w_q)² / [H_F⁻¹]_qq
    δ_F  = -(w_p - quant(w_p)) / [H_F⁻¹]_pp · [H_F⁻¹]_{:,p}

after which ``p`` is eliminated from ``H_F⁻¹`` by one step of Gaussian elimination (lemma 1). Every row has its own
order and therefore its own inverse: ``out · in³`` operations for a layer, against ``in³ + out · in²`` when all rows
share one order. OBQ suits layers of up to a few thousand inputs.

A weight that compensation has pushed beyond the ends of its grid, so that its error exceeds half a grid step, is
quantized immediately, while many free weights remain to compensate it (section 5); of several, the one that costs least
goes first.

Grids are fixed before the recursion. On a pruned model zeros stay: they leave the problem of their row first, so that
compensation is exact for the mask of each row.

The greedy order is not optimal: the cheapest weights are quantized first and the most expensive last, when no free
weight remains to compensate them. Where a few inputs hold nearly all of the Hessian's diagonal (layers of the first
block of babyllama-1m), one order for all rows that begins with those inputs has the smaller error; averaged over the
layers, a separate order for every row does better.

Differences from the paper: its grids are asymmetric and per channel, with ranges from a search; the defaults here are
symmetric grids for groups of 128 inputs, from minimum and maximum (``symmetric``, ``group_size``, ``observer``). A
block is calibrated on the outputs of the quantized blocks before it, which the paper calls sequential OBQ, and a
transformer has no batch-norm statistics to correct.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from hf_optim import ModelError, Paper, Reload, Scope, Technique, compressed, hookimpl, option, technique
from hf_optim.toolkit.quantization import Grid, make_grid, output_error, quantize_greedily
from hf_optim.toolkit.statistics import GramMatrix, SecondMoment
from hf_optim.toolkit.topology import group_by_block, not_reached

from . import _recompute
from ._weights import QUANTIZES, add_worst_layers, report_errors, require_storable, select_layers, weight_spec

if TYPE_CHECKING:
    from hf_optim import Card, Run

log = logging.getLogger(__name__)
# In seconds. A layer expected to take longer is announced.
LONG = 60.0


@technique(
    "obq",
    family="quantization",
    paper=Paper(
        "2208.11580",
        "Optimal Brain Compression: A Framework for Accurate Post-Training Quantization and Pruning",
        2022,
    ),
    contract=QUANTIZES,
    reload=Reload.STOCK_FORMAT,
)
class OBQ(Technique):
    """Quantize each row's weights one by one, those of least error first, and compensate each in the rest of its row.

    Attributes:
        targets: linear layers to quantize, by class, name or pattern.
        skip: patterns of layers to leave out.
        bits: of a weight, 2 to 8; bits that an earlier step has assigned to a layer take precedence.
        group_size: inputs that share a scale; the largest divisor of the layer's width up to it is used. None: one
            scale per output channel.
        symmetric: no zero points. Asymmetric codes are stored one to a byte (see ``hf_optim.compressed.scheme``).
        observer: scales from ``"minmax"`` of the weights, or from a search for the least squared error (``"mse"``),
            in which each weight is weighted by the mean square of its input.
        damp: share of the mean diagonal of the Hessian added to its diagonal; raised if the factorization fails.
        outliers_first: quantize weights beyond the ends of their grid immediately.
        precision: of the Hessian and the recursion, ``"float32"`` or ``"float64"``.
        memory: GiB for the inverses of the rows processed at a time; rows are taken in chunks that fit.
        widest: inputs of the widest layer to quantize; a wider one is refused before any layer is quantized.
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

    def check_model(self, model: Any, label: str) -> None:
        require_storable(self, model, label)
        for name, layer in Scope("", model, model).select(self.targets, self.skip).items():
            self._require_narrow(name, layer, label)

    @hookimpl
    def calibrate(self, run: Run, scope: Scope) -> Iterator[None]:
        layers, skipped = select_layers(self, run, scope)
        for name, layer in scope.select(self.targets, self.skip).items():
            self._require_narrow(name, layer, run.label(self))
        run.cover(self, [], skipped)
        for part in group_by_block(scope.model, layers) if scope.whole else [layers]:
            with SecondMoment(part, run.label(self), getattr(torch, self.precision)) as grams:
                yield
            for name, layer in part.items():
                if name in grams:
                    self._quantize(run, name, layer, grams[name])
            run.cover(self, [], not_reached(part, grams))

    def _require_narrow(self, name: str, layer: nn.Module, label: str) -> None:
        if isinstance(layer, nn.Linear) and layer.in_features > self.widest:
            rows, columns = layer.weight.shape
            raise ModelError(
                f"{label}: {name} has {columns} inputs, more than widest: {self.widest}. Its {rows} rows would take "
                f"{rows * columns**3 / 3:.1e} multiplications. Raise widest, skip the layer, or use a technique with "
                "one order of columns for all rows"
            )

    def _quantize(self, run: Run, name: str, layer: nn.Linear, gram: GramMatrix) -> None:
        # A copy, because storing writes into the weight.
        dense = layer.weight.detach().to(gram.total.dtype, copy=True)
        grid = self._grid(layer, run.bits_of(name, self.bits), gram.total.diagonal())
        codes = self._codes(run, name, dense, gram.mean, grid)
        compressed.store(layer, compressed.scheme_of(grid.spec), codes, grid.scale, grid.zero_point)
        report_errors(self, run, {name: output_error(dense, layer.weight, gram.total)})
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

    def _grid(self, layer: nn.Linear, bits: int, hessian_diagonal: torch.Tensor) -> Grid:
        weight = layer.weight.detach()
        spec = weight_spec(weight.shape[1], bits, self.group_size, self.symmetric)
        importance = hessian_diagonal if self.observer == "mse" else None
        return make_grid(weight, spec, self.observer, importance=importance)

    @hookimpl
    def finalize_model(self, run: Run) -> None:
        compressed.attach_quantizer(run.model)

    def recompute(self, case: Any) -> dict[str, Any]:
        return _recompute.output_errors(case)

    @hookimpl
    def export(self, run: Run, directory: Path, card: Card) -> None:
        metrics = run.reported(self)
        errors = metrics.get("relative_error")
        if not errors:
            return
        card.paragraph(
            "OBQ",
            f"{len(errors)} linear layers were quantized, every row in its own order. The relative squared error of "
            f"their outputs on the calibration data was {metrics['mean_relative_error']:.2e} on average.",
        )
        add_worst_layers(card, "OBQ", errors)


@hookimpl
def register_techniques(register):
    register(OBQ)
