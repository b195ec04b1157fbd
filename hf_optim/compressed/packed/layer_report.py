"""What each linear layer of a model runs on: ``report``."""

from __future__ import annotations

import copy
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import nn

from ...errors import require_any_model
from ...toolkit import experts, topology
from ...toolkit.distributed.tensor_parts import RANK, part_of
from ...toolkit.offloading import stored_weights
from ...toolkit.topology.experts import fused_experts, matrix_names, matrix_shape
from ...trust.figures import format_count
from ..codes import is_sparse24
from ..experts import PACKED_EXPERTS, expert_schemes
from ..float4 import STOCK_DTYPE, float4_format
from ..outlier_columns import outlier_thresholds
from ..weights import Codes, QuantizedWeight
from . import codebook_layers
from .accelerate import (
    NOT_COMPRESSED,
    UNSUPPORTED,
    WRITES_WEIGHTS,
    decompress,
    kernels_for,
    shared_weights,
    tied_reason,
)
from .checkpoint_formats import UNAPPLIED_CACHE
from .describe import OFFLOADED, describe_module, describe_weight, scheme_unsupported_reason
from .expert_swap import describe_stored, first_experts_kernel
from .kernel import NO_KERNEL, Kernel
from .model_settings import model_settings
from .packed_experts import PackedExperts
from .packed_linear import PackedLinear
from .swap import first_kernel, unsupported_reason, writes_weights

__all__ = ["LayerReport", "Report", "report"]

NOT_ACCELERATED = "accelerate() was not called"
LAYER, EXPERTS = "it would run this layer on", "it would run these experts on"
FEW = 3


@dataclass(frozen=True)
class LayerReport:
    """A linear layer: its name, its shape ``[out, in]``, and the kernel it runs on or the reason why it runs dense.

    For a quantized matrix of the experts of a mixture, ``experts`` is their number; it is 0 for a linear layer. Of a
    model that several ranks share, shape and number are those of this rank, and ``part`` says what it holds.
    """

    name: str
    shape: tuple[int, int]
    kernel: str | None
    reason: str = ""
    experts: int = 0
    part: str = ""

    @property
    def runs_on(self) -> str:
        """The kernel, or the reason, as text; then this rank's part."""
        found = self.kernel or f"dense: {self.reason}"
        return f"{found}; {self.part}" if self.part else found


class Report(list[LayerReport]):
    """The linear layers of a model and the quantized matrices of its experts, one ``LayerReport`` each.

    Attributes:
        experts: what the experts of each mixture layer that is not quantized run on, by the name of their module.
        rank: ``"rank 0 of 2"`` for a model that several ranks share, else empty.
        cache: ``"int8"`` if the checkpoint asks for such keys and values and the model does not have them, else empty.
        settings: what else the model computes otherwise than its stock class, one line each: quantized keys and values,
            the attention of a technique, exits, early exit.

    ``str()`` gives ``summary`` and ``settings``, then one row for layers that differ only in the number of their block.
    ``full()`` has one row per layer, and ``to_json()`` all of it in JSON types.
    """

    experts: dict[str, str]
    rank: str
    cache: str
    settings: list[str]

    def __init__(
        self,
        rows: Iterable[LayerReport] = (),
        experts: Mapping[str, str] | None = None,
        rank: str = "",
        cache: str = "",
        settings: Iterable[str] = (),
    ) -> None:
        super().__init__(rows)
        self.settings = list(settings)
        self.rank, self.cache = rank, cache
        self.experts = dict(experts or {})

    @property
    def layers(self) -> list[LayerReport]:
        """The layers, in the order of the model."""
        return list(self)

    @property
    def summary(self) -> str:
        """One line: how many layers run on which kernel, and how many run dense, with the reasons; then experts."""
        parts = [_summarize([row for row in self if not row.experts], "linear layers")]
        quantized = [row for row in self if row.experts]
        if quantized:
            parts.append(_summarize(quantized, "matrices of experts"))
        found = Counter(self.experts.values())
        cut = Counter(re.split(r"[:(]", row.part)[0].strip() for row in self if row.part)
        if cut:
            counts = ", ".join(f"{format_count(count)} by {how}" for how, count in cut.items())
            parts.insert(0, f"{self.rank}: {counts.replace('by whole on each rank', 'whole')}")
        parts += [f"experts of {format_count(count)} layers on {what}" for what, count in found.items()]
        if self.cache:
            parts.append(f"keys and values in full precision (kv_cache_scheme {self.cache} not applied)")
        return "; ".join(parts)

    def __str__(self) -> str:
        groups: dict[tuple[str, tuple[int, ...], str], int] = {}
        for row in self:
            shape = (row.experts, *row.shape) if row.experts else row.shape
            key = re.sub(r"(?<=\.)\d+(?=\.|$)", "*", row.name), shape, row.runs_on
            groups[key] = groups.get(key, 0) + 1
        rows = [(name, format_count(count), shape, what) for (name, shape, what), count in groups.items()]
        return self._page(("layer", "count", "out x in", "runs on"), rows)

    def full(self) -> str:
        """Return the summary and a table with one row per layer."""
        rows = [(row.name, (row.experts, *row.shape) if row.experts else row.shape, row.runs_on) for row in self]
        return self._page(("layer", "out x in", "runs on"), rows)

    def _page(self, header: tuple[str, ...], rows: list[tuple[Any, ...]]) -> str:
        """Return the summary, the settings and a table."""
        lines = [self.summary, *self.settings]
        return "\n".join([*lines, "", _table(header, rows)] if rows else lines)

    def to_json(self) -> dict[str, Any]:
        """Return ``summary``; ``layers``, each with the fields of ``LayerReport``; and ``experts``."""
        layers = [asdict(row) | {"shape": list(row.shape)} for row in self]
        for each in layers:
            if not each["part"]:
                del each["part"]
        found = {"summary": self.summary, "layers": layers, "experts": self.experts}
        return found | {name: value for name in ("rank", "cache", "settings") if (value := getattr(self, name))}


def report(model: nn.Module) -> Report:
    """Return what linear layers, quantized matrices of experts, and the other experts run on, or why they run dense.

    For a compressed model that is not accelerated, the reason names the kernel that ``accelerate`` would use.
    """
    require_any_model(model)
    with stored_weights(model):  # of an offloaded model
        return _report(model)


def _report(model: nn.Module) -> Report:
    unsupported = model.__dict__.get(UNSUPPORTED)
    linears = topology.linears(model)
    kernels = kernels_for(model)
    thresholds = outlier_thresholds(model, linears) if unsupported is None else {}
    shared = shared_weights(model)
    writes = WRITES_WEIGHTS if unsupported is None and writes_weights(model) else ""
    mixtures = {name: module for name, module in fused_experts(model).items() if not expert_schemes(module)}
    rank = str(vars(model).get(RANK, ""))
    running = {name: experts.implementation_of(module) for name, module in mixtures.items()}
    rows = Report((), running, rank, str(vars(model).get(UNAPPLIED_CACHE, "")), model_settings(model))
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
            other = shared.get(f"{name}.weight", "")
            reason = writes or _unaccelerated(name, module, kernels, thresholds.get(name), other)
            rows.append(LayerReport(name, shape, None, reason))
        else:
            on, reason = codebook_layers.promised(module, kernels)
            rows.append(LayerReport(name, shape, None, f"{NOT_ACCELERATED}; {LAYER} {on}" if on else reason))
    for name, module in model.named_modules():
        if expert_schemes(module):
            rows.extend(_experts(name, module, kernels, unsupported))
    if rank:
        parts = {name: str(part) for name, module in model.named_modules() if (part := part_of(module)) is not None}
        rows[:] = [replace(row, part=_part_of(row.name, parts)) for row in rows]
    return rows


def _part_of(name: str, parts: Mapping[str, str]) -> str:
    """Return the part of a layer, or of the module of experts that a matrix is in."""
    return parts.get(name) or parts.get(name.rpartition(".")[0], "")


def _experts(
    name: str, module: Any, kernels: tuple[Kernel, ...], unsupported: Mapping[str, str] | None
) -> Iterator[LayerReport]:
    """Yield the report of each matrix of the quantized experts of a module."""
    kernel, reason = None, ""
    if isinstance(module, PackedExperts):
        reason = module.packing.failure
        kernel = None if reason else str(module.get_submodule(PACKED_EXPERTS).label)
    elif unsupported is not None:
        reason = unsupported.get(name, NOT_COMPRESSED)
    else:
        weight = describe_stored(name, module)
        found = weight if isinstance(weight, str) else first_experts_kernel(weight, kernels)
        reason = found if isinstance(found, str) else f"{NOT_ACCELERATED}; {EXPERTS} {found.promise(weight)}"
    for parameter in matrix_names(module):
        count, rows, columns = matrix_shape(module, parameter)
        yield LayerReport(f"{name}.{parameter}", (rows, columns), kernel, reason, count)


def _summarize(rows: list[LayerReport], what: str) -> str:
    """Return one line on rows of one kind."""
    kernels = Counter(_kernel_name(row.kernel) for row in rows if row.kernel)
    dense: dict[str, list[str]] = {}
    for row in rows:
        if not row.kernel:
            dense.setdefault(row.reason, []).append(row.name)
    if not rows:
        return f"no {what}"
    reasons = "; ".join(f"{_few(names)}: {reason}" for reason, names in dense.items())
    if not kernels:
        reasons = next(iter(dense)) if len(dense) == 1 else reasons
        return f"all {format_count(len(rows))} {what} run dense ({reasons})"
    on = [f"{format_count(count)} on {kernel}" for kernel, count in kernels.most_common()]
    on[0] = on[0].replace(" on ", f" of {format_count(len(rows))} {what} on ", 1)
    rest = [f"{format_count(sum(map(len, dense.values())))} dense ({reasons})"] if dense else []
    return "; ".join([", ".join(on), *rest])


def _unaccelerated(
    name: str, module: nn.Module, kernels: tuple[Kernel, ...], outliers: float | None, shared: str
) -> str:
    """Return what ``accelerate`` would change about a layer; ``NOT_COMPRESSED`` if it would change nothing.

    It decides from the description of the weight alone: that its codes cannot be recovered is found when it is packed.
    """
    scheme = getattr(module, "quantization_scheme", None)
    if not isinstance(module, nn.Linear):
        return NOT_COMPRESSED if scheme is None else f"a {type(module).__name__} is not laid out as nn.Linear"
    if scheme is not None and "weight_packed" in module._parameters:
        weight = _describe_packed(name, module, scheme, outliers, kernels)
    else:
        weight = describe_module(name, module, any(kernel.sparse24 for kernel in kernels), outliers)
    if isinstance(weight, str):
        return weight or NOT_COMPRESSED
    if shared:
        return NOT_COMPRESSED if scheme is None else tied_reason(shared)
    found = first_kernel(weight, kernels)
    if isinstance(found, str):
        return found or (NOT_COMPRESSED if scheme is None else NO_KERNEL)
    return unsupported_reason(module) or f"{NOT_ACCELERATED}; {LAYER} {found.promise(weight)}"


def _describe_packed(
    name: str, module: nn.Linear, scheme: Any, outliers: float | None, kernels: tuple[Kernel, ...]
) -> QuantizedWeight | str:
    """Describe a layer that stock transformers has loaded, and will decompress at the first forward."""
    scale = module._parameters.get("weight_scale")
    if scale is None or scale.is_meta:
        return OFFLOADED if scale is not None else "it has no weight_scale"
    if reason := scheme_unsupported_reason(scheme):
        return reason
    shape = (module.out_features, module.in_features)
    ordered = "weight_g_idx" in module._parameters
    like = scale.new_empty(0, dtype=STOCK_DTYPE) if float4_format(scheme.weights) else scale
    weight = describe_weight(name, shape, scheme, like, module.bias, _no_codes, ordered=ordered, outliers=outliers)
    sparse = replace(weight, sparse24=True)
    if any(kernel.sparse24 and kernel.check(sparse) is None for kernel in kernels) and _is_sparse24(module):
        return sparse
    return weight


def _is_sparse24(module: nn.Linear) -> bool:
    """Return True if the decoded weight of a layer has the 2:4 pattern; the layer stays as it is."""
    decoded = copy.copy(module)
    decoded.__dict__["_parameters"] = dict(module._parameters)
    decompress(decoded)
    weight = decoded._parameters.get("weight")
    return weight is not None and is_sparse24(weight.detach())


def _no_codes() -> Codes:
    raise RuntimeError("the layer is described, not packed")


def _kernel_name(label: str | None) -> str:
    """Return the first words of a kernel's label: not which layers share its product."""
    return str(label).split(", ", 1)[0]


def _few(names: list[str]) -> str:
    rest = f" and {format_count(len(names) - FEW)} more" if len(names) > FEW else ""
    return ", ".join(names[:FEW]) + rest


def _table(header: tuple[str, ...], rows: list[tuple[Any, ...]]) -> str:
    texts = [[" x ".join(map(str, cell)) if isinstance(cell, tuple) else str(cell) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in [list(header), *texts]) for i in range(len(header))]
    lines = []
    for row in [list(header), *texts]:
        cells = [row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:-1], widths[1:-1], strict=True)), row[-1]]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
