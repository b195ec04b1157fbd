r"""LLM.int8(): int8 products of all but the outlier columns of the input, which are multiplied in 16 bits.

A few input columns of a large transformer's linear layers hold magnitudes twenty times those of the others, and degrade
the single scale of an int8 row. With O the columns of X [tokens, in] in which some ``|x|`` is above the threshold
(6.0), ``c`` and ``w`` int8 codes, one scale ``s`` for each row (token) of X and one ``t`` for each row of the weight
[out, in] (vector-wise absmax, equations 3 to 8)::

    Y[m, n] = s[m] t[n] sum_{k not in O} c[m, k] w[n, k]  +  sum_{k in O} X[m, k] W[n, k]  +  b[n]
    s[m] = max_{k not in O} |X[m, k]| / 127      t[n] = max_k |W[n, k]| / 127      w[n, k] = round(W[n, k] / t[n])

Dettmers, Lewis, Belkada, Zettlemoyer, "LLM.int8(): 8-bit Matrix Multiplication for Transformers at Scale", arXiv
2208.07339.

Differences from the paper: the columns of O are unknown until the inputs are known, so the paper keeps the weight in 16
bits, or decodes its columns as bitsandbytes does. Here only the int8 codes are stored, and ``W[n, k]`` of an outlier
column is ``w[n, k] t[n]``. So with a threshold of 0 the layer is the dense layer *of the decoded weight*, and with none
(null) it is plain vector-wise int8. A magnitude below the threshold counts for ``s`` even if its column is an outlier
because of another token, so that a token's scale depends on that token alone.

The checkpoint holds int8 weights with one scale per row (W8A16 of compressed-tensors). Stock transformers decodes them
and does not round inputs: more exact than LLM.int8(), and slower. ``hf_optim.accelerate`` and ``from_pretrained(...,
optim_config="auto")`` compute as above: on a CUDA device all layers, on a CPU the layers large enough to gain. The
threshold is stored in ``config.json`` (``"hf_optim": {"outliers": ...}``).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from hf_optim import Kernel, Paper, Reload, Technique, compressed, hookimpl, option, technique, traits
from hf_optim.toolkit.quantization import Grid, GridSpec, storable_scale

from ._weights import QUANTIZES, require_storable, select_layers

if TYPE_CHECKING:
    from hf_optim import Card, Run, Scope

LEVELS = 127.0


@technique(
    "llm_int8",
    family="quantization",
    paper=Paper("2208.07339", "LLM.int8(): 8-bit Matrix Multiplication for Transformers at Scale", 2022),
    contract=QUANTIZES,
    reload=Reload.STOCK_FORMAT,
)
class LLMInt8(Technique):
    """Quantize weights to int8, and at run time the inputs except for their outlier columns.

    Attributes:
        threshold: input columns with a larger magnitude are multiplied unquantized. 6.0 is the paper's, for models in
            16-bit floating point; 0 quantizes no input column, null every one.
        targets: linear layers to quantize, by class, name or pattern.
        skip: patterns of layers to leave out.
    """

    threshold: float | None = option(6.0, low=0.0, below=float("inf"))
    targets: tuple[str, ...] = ("Linear",)
    skip: tuple[str, ...] = ()

    def needs_data(self) -> bool:
        return False

    def check_model(self, model: Any, label: str) -> None:
        require_storable(self, model, label)

    @hookimpl
    def calibrate(self, run: Run, scope: Scope) -> Iterator[None]:
        yield
        layers, skipped = select_layers(self, run, scope)
        scheme = compressed.scheme(8)
        for layer in layers.values():
            quantize(layer, scheme.model_copy(deep=True))
        run.cover(self, layers, skipped)

    @hookimpl
    def finalize_model(self, run: Run) -> None:
        names, _ = run.covered(self) or (set(), {})
        compressed.set_outlier_threshold(run.model, sorted(names), self.threshold)
        compressed.attach_quantizer(run.model)
        run.report(self, threshold=self.threshold, layers=len(names))

    def recompute(self, case: Any) -> dict[str, Any]:
        (entry,) = case.config["hf_optim"]["outliers"]
        return {"threshold": entry["threshold"], "layers": len(case.bits())}

    @hookimpl
    def export(self, run: Run, directory: Path, card: Card) -> None:
        count = run.reported(self).get("layers", 0)
        columns = "no column" if self.threshold is None else f"the columns with a magnitude above {self.threshold:g}"
        inference = card.when(
            "Stock transformers decodes them and does not round their inputs. On the kernels of hf_optim "
            '(`optim_config="auto"`) inputs are int8 too, one scale per token, with '
            f"{columns} multiplied in the model's own dtype.",
            has=[traits.QUANTIZED],
            reload=[Reload.STOCK_FORMAT, Reload.STOCK_ARCH],
        )
        card.paragraph(
            "LLM.int8()",
            f"{count} linear layers were quantized to int8 with one scale per row.{inference}",
        )


def kernel(everywhere: bool = False) -> Kernel:
    """Return the kernel of LLM.int8().

    Args:
        everywhere: support every layer on a CPU as well, even if that is slower than the decoded weight:
            ``hf_optim.accelerate(model, [kernel(everywhere=True)])`` shows what a GPU would compute.
    """
    from hf_optim_kernels.llm_int8 import layer

    supports = layer.supports_everywhere if everywhere else layer.supports
    return Kernel("llm_int8", supports=supports, prepack=layer.prepack, join=layer.join, outliers=True)


@torch.no_grad()
def quantize(layer: nn.Linear, scheme: object) -> None:
    """Quantize and store a linear layer: codes in [-127, 127], where the largest weight of a row has code ±127.

    The scale is rounded to the layer's dtype, in which the checkpoint stores it, before the codes are computed. A row
    of zeros has the codes 0. Weights that are 0 stay 0.
    """
    weight = layer.weight.detach()
    wide = weight.to(torch.float64 if weight.dtype == torch.float64 else torch.float32)
    scale = storable_scale(wide.abs().amax(1, keepdim=True) / LEVELS, weight.dtype, LEVELS)
    codes = Grid(GridSpec(8), scale).quantize(wide).clamp_(-127, 127)
    compressed.store(layer, scheme, codes, scale)  # type: ignore[arg-type]


@hookimpl
def register_techniques(register):
    register(LLMInt8)
