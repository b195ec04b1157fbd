"""Ternary weight networks: ``W ~ s * t`` with ``t`` in {-1, 0, 1}, per output channel.

The threshold ``d = 0.7 * mean |W_i|`` and the scale ``s_i = mean of |W_ij| over |W_ij| > d_i`` are the closed-form
approximation of the least-squares fit. Li, Zhang and Liu, "Ternary Weight Networks", arXiv 1605.04711,
equations 5 and 6.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from hf_optim import Contract, Paper, Reload, Run, Scope, Technique, hookimpl, option, technique, traits
from hf_optim.toolkit.topology import weight_out_in


@technique(
    "ternary",
    family="quantization",
    paper=Paper("1605.04711", "Ternary Weight Networks", 2016),
    contract=Contract(needs={traits.FLOAT_WEIGHTS}, keeps={traits.SPARSE, traits.SPARSE_NM}),
    reload=Reload.STOCK_DENSE,
)
class Ternary(Technique):
    """Round weights to three values per output channel; the checkpoint stays dense.

    Attributes:
        threshold: weights below this multiple of the channel's mean magnitude become 0; 0.7 in the paper.
        targets: linear layers to round, by class, name or pattern.
        skip: patterns of layers to leave out.
    """

    threshold: float = option(0.7, low=0.0)
    targets: tuple[str, ...] = ("Linear",)
    skip: tuple[str, ...] = ()

    def needs_data(self) -> bool:
        return False

    @hookimpl
    def calibrate(self, run: Run, scope: Scope) -> Iterator[None]:
        yield
        modules = scope.select(self.targets, self.skip)
        with torch.no_grad():
            for module in modules.values():
                weight = weight_out_in(module)
                weight.copy_(ternary(weight, self.threshold))
        run.cover(self, modules)


def ternary(weight: torch.Tensor, threshold: float) -> torch.Tensor:
    """Return the ternary approximation of ``weight`` (equations 5 and 6).

    Args:
        weight: ``[out, in]``, any float dtype.
        threshold: weights below this multiple of the channel's mean magnitude become 0.

    Returns:
        A tensor of the same shape and dtype.
    """
    magnitude = weight.abs().float()
    large = magnitude > threshold * magnitude.mean(dim=1, keepdim=True)
    scale = (magnitude * large).sum(dim=1, keepdim=True) / large.sum(dim=1, keepdim=True).clamp(min=1)
    return (weight.sign() * large * scale).to(weight.dtype)


@hookimpl
def register_techniques(register) -> None:  # type: ignore[no-untyped-def]
    register(Ternary)
