"""What each linear layer of a model runs on: ``report``."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from ...toolkit import experts, topology
from ...toolkit.topology.experts import fused_experts
from ...trust.figures import format_count
from ..outlier_columns import outlier_thresholds
from ..weights import Codes, QuantizedWeight
from . import codebook_layers
from .accelerate import NOT_COMPRESSED, UNSUPPORTED, kernels_for
from .describe import OFFLOADED, describe_module, describe_weight, scheme_unsupported_reason
from .kernel import NO_KERNEL, Kernel
from .packed_linear import PackedLinear
from .swap import first_kernel

__all__ = ["LayerReport", "Report", "report"]

NOT_ACCELERATED = "accelerate() was not called"
FEW = 3


@dataclass(frozen=True)
class LayerReport:
    """A linear layer: its name, its shape ``[out, in]``, and the kernel it runs on or the reason why it runs dense."""

    name: str
    shape: tuple[int, int]
    kernel: str | None
    reason: str = ""

    @property
    def runs_on(self) -> str:
        """The kernel, or the reason, as text."""
        return self.kernel or f"dense: {self.reason}"


class Report(list[LayerReport]):
    """The linear layers of a model, one ``LayerReport`` each.

    Attributes:
        experts: what the experts of each mixture layer run on, by the name of their module.

    ``str()`` gives ``summary``, then one row for layers that differ only in the number of their block. ``full()`` has
    one row per layer, and ``to_json()`` all of it in JSON types.
    """

    experts: dict[str, str]

    def __init__(self, rows: Iterable[LayerReport] = (), experts: Mapping[str, str] | None = None) -> None:
        super().__init__(rows)
        self.experts = dict(experts or {})

    @property
    def layers(self) -> list[LayerReport]:
        """The layers, in the order of the model."""
        return list(self)

    @property
    def summary(self) -> str:
        """One line: how many layers run on which kernel, how many run dense, with the reasons, and the experts."""
        found = Counter(self.experts.values())
        mixtures = [f"experts of {format_count(count)} layers on {what}" for what, count in found.items()]
        return "; ".join([self._linears, *mixtures])

    @property
    def _linears(self) -> str:
        kernels = Counter(_kernel_name(row.kernel) for row in self if row.kernel)
        dense: dict[str, list[str]] = {}
        for row in self:
            if not row.kernel:
                dense.setdefault(row.reason, []).append(row.name)
        if not self:
            return "no linear layers"
        reasons = "; ".join(f"{_few(names)}: {reason}" for reason, names in dense.items())
        if not kernels:
            reasons = next(iter(dense)) if len(dense) == 1 else reasons
            return f"all {format_count(len(self))} linear layers run dense ({reasons})"
        on = [f"{format_count(count)} on {kernel}" for kernel, count in kernels.most_common()]
        on[0] = on[0].replace(" on ", f" of {format_count(len(self))} linear layers on ", 1)
        rest = [f"{format_count(sum(map(len, dense.values())))} dense ({reasons})"] if dense else []
        return "; ".join([", ".join(on), *rest])

    def __str__(self) -> str:
        groups: dict[tuple[str, tuple[int, int], str], int] = {}
        for row in self:
            key = re.sub(r"(?<=\.)\d+(?=\.|$)", "*", row.name), row.shape, row.runs_on
            groups[key] = groups.get(key, 0) + 1
        rows = [(name, format_count(count), shape, what) for (name, shape, what), count in groups.items()]
        return f"{self.summary}\n\n{_table(('layer', 'count', 'out x in', 'runs on'), rows)}" if rows else self.summary

    def full(self) -> str:
        """Return the summary and a table with one row per layer."""
        rows = [(row.name, row.shape, row.runs_on) for row in self]
        return f"{self.summary}\n\n{_table(('layer', 'out x in', 'runs on'), rows)}" if rows else self.summary

    def to_json(self) -> dict[str, Any]:
        """Return ``{"summary": str, "layers": [{"name", "shape", "kernel", "reason"}], "experts": {name: str}}``."""
        layers = [asdict(row) | {"shape": list(row.shape)} for row in self]
        return {"summary": self.summary, "layers": layers, "experts": self.experts}


def report(model: nn.Module) -> Report:
    """Return, for each linear layer, the kernel it runs on or the reason why it runs dense, and what experts run on.

    For a compressed model that is not accelerated, the reason names the kernel that ``accelerate`` would use.
    """
    unsupported = model.__dict__.get(UNSUPPORTED)
    linears = topology.linears(model)
    kernels = kernels_for(model)
    thresholds = outlier_thresholds(model, linears) if unsupported is None else {}
    mixtures = fused_experts(model)
    rows = Report((), {name: experts.implementation_of(module) for name, module in mixtures.items()})
    for name, module in (linears | codebook_layers.codebook_linears(model)).items():
        shape = topology.features(module)
        if isinstance(module, codebook_layers.PackedCodebookLayer):
            rows.append(LayerReport(name, shape, str(module.packed_weight.label)))  # type: ignore[union-attr]
        elif isinstance(module, PackedLinear):
            failure = module.packing.failure
            rows.append(LayerReport(name, shape, None if failure else str(module.packed_weight.label), failure))
        elif unsupported is not None:
            rows.append(LayerReport(name, shape, None, unsupported.get(name, NOT_COMPRESSED)))
        elif name in linears:
            rows.append(LayerReport(name, shape, None, _unaccelerated(name, module, kernels, thresholds.get(name))))
        else:
            rows.append(LayerReport(name, shape, None, NOT_ACCELERATED))
    return rows


def _unaccelerated(name: str, module: nn.Module, kernels: tuple[Kernel, ...], outliers: float | None) -> str:
    """Return what ``accelerate`` would change about a layer; ``NOT_COMPRESSED`` if it would change nothing."""
    scheme = getattr(module, "quantization_scheme", None)
    if not isinstance(module, nn.Linear):
        return NOT_COMPRESSED if scheme is None else f"a {type(module).__name__} is not laid out as nn.Linear"
    if scheme is not None and "weight_packed" in module._parameters:
        weight = _describe_packed(name, module, scheme, outliers)
    else:
        weight = describe_module(name, module, any(kernel.sparse24 for kernel in kernels), outliers)
    if isinstance(weight, str):
        return weight or NOT_COMPRESSED
    found = first_kernel(weight, kernels)
    if isinstance(found, str):
        return found or (NOT_COMPRESSED if scheme is None else NO_KERNEL)
    return f"{NOT_ACCELERATED}; it would run this layer on {found.name}"


def _describe_packed(name: str, module: nn.Linear, scheme: Any, outliers: float | None) -> QuantizedWeight | str:
    """Describe a layer that stock transformers has loaded, and will decompress at the first forward."""
    scale = module._parameters.get("weight_scale")
    if scale is None or scale.is_meta:
        return OFFLOADED if scale is not None else "it has no weight_scale"
    if reason := scheme_unsupported_reason(scheme):
        return reason
    shape = (module.out_features, module.in_features)
    ordered = "weight_g_idx" in module._parameters
    return describe_weight(name, shape, scheme, scale, module.bias, _no_codes, ordered=ordered, outliers=outliers)


def _no_codes() -> Codes:
    raise RuntimeError("the layer is described, not packed")


def _kernel_name(label: str | None) -> str:
    """Return the first words of a kernel's label: not which layers share its product."""
    return str(label).split(", ", 1)[0]


def _few(names: list[str]) -> str:
    rest = f" and {format_count(len(names) - FEW)} more" if len(names) > FEW else ""
    return ", ".join(names[:FEW]) + rest


def _table(header: tuple[str, ...], rows: list[tuple[Any, ...]]) -> str:
    texts = [[f"{cell[0]} x {cell[1]}" if isinstance(cell, tuple) else str(cell) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in [list(header), *texts]) for i in range(len(header))]
    lines = []
    for row in [list(header), *texts]:
        cells = [row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:-1], widths[1:-1], strict=True)), row[-1]]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
