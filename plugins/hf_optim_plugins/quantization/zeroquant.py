r"""ZeroQuant: group-wise weights and token-wise activations, without calibration data.

A weight W [out, in] is cut into groups with one scale each, and so is the input X [tokens, in], whose groups are its
tokens; the scales of tokens are computed at run time (section 4.1)::

    W ~ t_g w,  t_g = max_{g} |W| / ((2^b - 1) / 2)     w = round(W / t_g)      for the weights of group g
    X ~ s_m c,  s_m = max_k |X[m, k]| / 127.5           c = round(X[m, k] / s_m)
    Y[m, n] = s_m t_{g(n)} sum_k c[m, k] w[n, k] + b[n]

Yao, Aminabadi, Zhang, Wu, Li, He, "ZeroQuant: Efficient and Affordable Post-Training Quantization for Large-Scale
Transformers", arXiv 2206.01861.

Which weights share a scale decides which kernel can run the layer. Groups of whole rows (``groups``) keep the sum over
k in integers, which is how the paper fits them to the tiles of the tensor cores; they are stored as one scale per row,
equal within a group, and run on the W8A8 kernels. So does a separate scale for each row, the finest such grouping,
which costs these kernels nothing more and is the default. Groups along the inputs (``group_size``) are finer still and
better at 4 bits, but no integer kernel supports them here: such layers compute on decoded weights.

The paper's mix of INT4 weights in the feed-forward layers and INT8 in attention is two steps with different targets, or
a bit allocation made by another step. Its backend quantizes inside the preceding layer: on a CUDA device
``hf_optim.accelerate`` does so where norms feed only layers on the W8A8 kernel
(``hf_optim.compressed.packed.fused_norm``). Its layer-by-layer distillation is the technique ``lkd``.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from hf_optim import Contract, Paper, RecipeError, Reload, Technique, compressed, hookimpl, option, technique
from hf_optim.toolkit.quantization import Grid, GridSpec, fit_group_size, make_grid

from . import _recompute
from ._weights import QUANTIZES, keep_bits, report_bits, require_storable, select_layers, weight_spec

if TYPE_CHECKING:
    from hf_optim import Card, Run, Scope

ALL = ("Linear",)
DONE = "it is quantized already"


@technique(
    "zeroquant",
    family="quantization",
    paper=Paper(
        "2206.01861",
        "ZeroQuant: Efficient and Affordable Post-Training Quantization for Large-Scale Transformers",
        2022,
    ),
    contract=QUANTIZES,
    reload=Reload.STOCK_FORMAT,
)
class ZeroQuant(Technique):
    """Quantize weights in groups and activations per token, without calibration data.

    Attributes:
        bits: of a weight; bits that an earlier step has assigned to a layer take precedence.
        groups: cut the rows of each weight into this many groups of neighbours with one scale each; the largest divisor
            of its rows up to it is used. None: one scale per row.
        group_size: instead, inputs that share a scale within a row; the largest divisor of the width up to it is used.
        activations: ``"int8"``, with a scale per token computed at run time; None leaves them unquantized.
        symmetric_activations: no zero point for a token's grid.
        targets: linear layers to quantize, by class, name or pattern. With other targets than the default, the step may
            follow one that has quantized other layers.
        skip: patterns of layers to leave out.
    """

    bits: int = option(8, low=2, high=8)
    groups: int | None = option(None, low=1)
    group_size: int | None = option(None, low=1)
    activations: Literal["int8"] | None = "int8"
    symmetric_activations: bool = True
    targets: tuple[str, ...] = ALL
    skip: tuple[str, ...] = ()

    def validate(self) -> None:
        if self.groups is not None and self.group_size is not None:
            raise RecipeError("zeroquant: groups (of rows) and group_size (inputs) exclude each other")

    def contract(self) -> Contract:
        own = self.spec.contract
        needs = own.needs if self.targets == ALL else frozenset()
        return Contract(needs=needs, adds=own.adds, drops=own.drops, keeps=own.keeps)

    def needs_data(self) -> bool:
        return False

    def check_model(self, model: Any, label: str) -> None:
        require_storable(self, model, label)

    @hookimpl
    def calibrate(self, run: Run, scope: Scope) -> Iterator[None]:
        yield
        layers, skipped = select_layers(self, run, scope)
        done = [name for name, layer in layers.items() if compressed.scheme_on(layer) is not None]
        if done:
            skipped = {**skipped, DONE: done}
            layers = {name: layer for name, layer in layers.items() if name not in done}
        for name, layer in layers.items():
            self._quantize(layer, run.bits_of(name, self.bits))
        keep_bits(self, run, {name: run.bits_of(name, self.bits) for name in layers})
        run.cover(self, layers, skipped)

    def _quantize(self, layer: nn.Linear, bits: int) -> None:
        weight = layer.weight.detach()
        grid = self._grid(weight, bits)
        scheme = compressed.scheme_of(grid.spec, self.activations, False, self.symmetric_activations)
        compressed.store(layer, scheme, grid.quantize(weight), grid.scale)

    def _grid(self, weight: torch.Tensor, bits: int) -> Grid:
        if self.group_size is not None:
            return make_grid(weight, weight_spec(weight.shape[1], bits, self.group_size))
        return row_groups(weight, bits, self.groups)

    @hookimpl
    def finalize_model(self, run: Run) -> None:
        compressed.attach_quantizer(run.model)
        report_bits(self, run)

    def recompute(self, case: Any) -> dict[str, Any]:
        return {"layers_by_bits": _recompute.layers_by_bits(case)}

    @hookimpl
    def export(self, run: Run, directory: Path, card: Card) -> None:
        layers = run.reported(self).get("layers_by_bits", {})
        widths = ", ".join(f"{count} to {bits} bits" for bits, count in layers.items())
        shared = f"up to {self.group_size} inputs of a row" if self.group_size else "a row"
        shared = f"a group of rows ({self.groups} groups)" if self.groups else shared
        inputs = "inputs to int8, one scale per token" if self.activations else "inputs are not quantized"
        card.paragraph(
            "ZeroQuant",
            f"Linear layers were quantized without calibration data: {widths or 'none'}, one scale for {shared}; "
            f"{inputs}.",
        )


def row_groups(weight: torch.Tensor, bits: int, groups: int | None) -> Grid:
    """Return a symmetric grid whose scales ``[out, 1]`` are equal within each group of rows.

    Args:
        weight: ``[out, in]``.
        bits: of a code.
        groups: number of groups; the largest divisor of ``out`` up to it is used. None: one for each row.
    """
    rows = len(weight)
    count = rows if groups is None else fit_group_size(rows, groups)
    grid = make_grid(weight.reshape(count, -1), GridSpec(bits))
    return Grid(grid.spec, grid.scale.repeat_interleave(rows // count, 0))


@hookimpl
def register_techniques(register):
    register(ZeroQuant)
