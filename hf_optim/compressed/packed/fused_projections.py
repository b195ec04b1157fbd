"""Joining the layers that read the same tensor (q, k and v; gate and up) into one product, and undoing it.

Which layers do is not known by name, but found by looking: one forward of the model is traced without weights.
"""

from __future__ import annotations

import contextlib
import logging
from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from ...toolkit.topology.block_lists import block_of, blocks
from ...toolkit.topology.graph import Trace
from ...toolkit.topology.tracing import trace
from .packed_linear import PACKED_WEIGHT, PackedLinear
from .shared_output import FusedOutput, FusedSlice, slice_rows

log = logging.getLogger(__name__)


class FusedProjections:
    """Layers that run as one product wherever their kernel has a packed weight for all of them.

    Attributes:
        layers: in the order in which they run.
        contiguous: see ``FusedOutput``.
        fused: the packed weight of all; None while each has its own.
    """

    def __init__(self, layers: list[PackedLinear], contiguous: bool) -> None:
        self.layers, self.contiguous = layers, contiguous
        self.fused: Any = None

    @torch.no_grad()
    def fuse(self) -> bool:
        """Replace the packed weights by slices of one fused weight. Return False where the kernel does not allow it."""
        kinds = {_kind(layer) for layer in self.layers}
        description = self.layers[0].packing.description
        if self.fused is not None or len(kinds) > 1 or None in kinds or description.device.type == "meta":
            return False
        fused = _fuse_weights(self.layers)
        if fused is None:
            return False
        fused_output = FusedOutput([layer.out_features for layer in self.layers], self.contiguous)
        short = _short([layer.packing.description.name for layer in self.layers])
        for i, layer in enumerate(self.layers):
            others = ", ".join(name for name in short if name != short[i])
            layer._modules[PACKED_WEIGHT] = FusedSlice(fused, fused_output, i, f"{fused.label}, with {others}")
            layer.packing.group = self
            layer.tie()
        self.fused = fused
        return True

    @torch.no_grad()
    def unfuse(self) -> None:
        """Give every layer a packed weight of its own again, with the same codes. ``fuse`` may follow."""
        if self.fused is None:
            return
        found, start = self.fused.codes(), 0
        for layer in self.layers:
            layer.packing.unfuse_norm()
            bias = layer._parameters["bias"]
            if bias is not None:
                bias.data = bias.data.clone()
            codes = partial(slice_rows, found, start, start + layer.out_features)
            weight = replace(layer.packing.description, bias=None if bias is None else bias.detach(), codes=codes)
            layer._modules[PACKED_WEIGHT] = layer.packing.kernel.prepack(weight)
            layer.tie()
            start += layer.out_features
        self.fused = None

    def disband(self) -> None:
        """``unfuse`` for good."""
        self.unfuse()
        for layer in self.layers:
            layer.packing.group = None


def _kind(layer: PackedLinear) -> Hashable:
    """Equal for layers that a kernel may join; None for one that has none."""
    packing, description = layer.packing, layer.packing.description
    if packing.failure or packing.kernel.join is None:
        return None
    inputs = description.inputs and (description.inputs.type, description.inputs.dynamic, description.inputs.symmetric)
    form = (
        description.kind,
        description.bits,
        description.group_size,
        description.symmetric,
        description.ordered,
        description.sparse24,
        description.outliers,
    )
    biased = layer._parameters["bias"] is not None
    return packing.kernel, description.shape[1], description.dtype, description.device, *form, inputs, biased


def _fuse_weights(layers: list[PackedLinear]) -> Any:
    """The kernel's joint packed weight, or None."""
    join = layers[0].packing.kernel.join
    assert join is not None
    names = [layer.packing.description.name for layer in layers]
    try:
        fused = join([layer._modules[PACKED_WEIGHT] for layer in layers])
    except Exception as error:
        log.debug("%s are not joined: %s: %s", names, type(error).__name__, error)
        return None
    if fused is None or layers[0]._parameters["bias"] is None:
        return fused
    bias = fused._buffers.get("bias")
    if bias is None or bias.shape != (sum(layer.out_features for layer in layers),):
        log.debug("%s are not joined: the joint packed weight has no buffer of their biases", names)
        return None
    return fused


def _short(names: list[str]) -> list[str]:
    """Names without what all of them begin or end with."""
    split = [name.split(".") for name in names]
    while all(len(parts) > 1 for parts in split) and len({parts[-1] for parts in split}) == 1:
        split = [parts[:-1] for parts in split]
    while all(len(parts) > 1 for parts in split) and len({parts[0] for parts in split}) == 1:
        split = [parts[1:] for parts in split]
    return [".".join(parts) for parts in split]


def fuse_projections(model: nn.Module) -> Trace | None:
    """Join what can be of the packed layers of a model that were not looked at before.

    A model that cannot be traced keeps its layers apart. The trace is returned, where one was made.
    """
    layers = [module for module in model.modules() if isinstance(module, PackedLinear)]
    alone = [layer for layer in layers if layer.packing.group is None and _kind(layer) is not None]
    by_kind: dict[Hashable, list[PackedLinear]] = defaultdict(list)
    for layer in alone:
        by_kind[_kind(layer)].append(layer)
    candidates = {id(layer) for members in by_kind.values() if len(members) > 1 for layer in members}
    if not any(not layer.packing.fusion_tried for layer in alone if id(layer) in candidates):
        return None
    for layer in alone:
        layer.packing.fusion_tried = True
    found = _wiring(model)
    if found is None:
        return None
    wiring, contiguous = found
    for members in _groups(wiring, candidates):
        FusedProjections(members, contiguous).fuse()
    return wiring


def trace_packed(model: nn.Module) -> Trace | None:
    """A trace of a model with packed layers; None if it cannot be traced."""
    found = _wiring(model)
    return None if found is None else found[0]


def _wiring(model: nn.Module) -> tuple[Trace, bool] | None:
    """A trace of the model, and whether outputs of its layers must be contiguous; None if it cannot be traced."""
    error: Exception | None = None
    for contiguous in (False, True):
        try:
            with _traceable(model, contiguous):
                return trace(model), contiguous
        except Exception as reason:
            error = reason
    log.debug("no layers are joined, since %s cannot be traced: %s", type(model).__name__, error)
    return None


class _TraceableLinear(PackedLinear):
    """A packed layer for tracing: its packed weight, which fake tensors may not be able to run, is left out."""

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """Of the right shape and type, which is what models look at."""
        return torch.zeros((), dtype=self.packing.description.dtype).expand(self.packing.description.shape)

    def forward(self, input: Tensor) -> Tensor:
        """The output laid out as it would be in a group."""
        wide = input.new_empty((*input.shape[:-1], self.out_features + 8))
        if not isinstance(input, FakeTensor):
            right = self._run(input) if self._accepts(input) else self.dense(input)
            wide[..., : self.out_features] = right
        return wide.narrow(-1, 0, self.out_features)


class _ContiguousTraceableLinear(_TraceableLinear):
    """One whose outputs are laid out as those of ``nn.Linear``."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).contiguous()


@contextlib.contextmanager
def _traceable(model: nn.Module, contiguous: bool) -> Iterator[None]:
    layers = [module for module in model.modules() if type(module) is PackedLinear]
    try:
        for layer in layers:
            layer.__class__ = _ContiguousTraceableLinear if contiguous else _TraceableLinear
        yield
    finally:
        for layer in layers:
            layer.__class__ = PackedLinear


def _groups(wiring: Trace, candidates: Iterable[int]) -> list[list[PackedLinear]]:
    """The layers of one block and kind that run one after the other on the same tensor, in every pass through them."""
    found: dict[tuple[str, ...], None] = {}
    runs: dict[str, set[tuple[str, ...]]] = defaultdict(set)
    for run in _runs(wiring, set(candidates)):
        found[run] = None
        for name in run:
            runs[name].add(run)
    groups = []
    for run in found:
        if len(set(run)) < len(run) or any(len(runs[name]) > 1 for name in run):
            continue
        by_kind: dict[Hashable, list[PackedLinear]] = defaultdict(list)
        for name in run:
            layer: Any = wiring.modules[name]
            by_kind[_kind(layer)].append(layer)
        groups += [members for members in by_kind.values() if len(members) > 1]
    return groups


def _runs(wiring: Trace, candidates: set[int]) -> Iterator[tuple[str, ...]]:
    """The candidates in the order of their calls, cut wherever another tensor is read or another block begins."""
    known = blocks(wiring)
    run: list[str] = []
    last: Hashable = None
    for op in wiring.ops:
        if op.linear is None or id(wiring.modules[op.linear]) not in candidates:
            continue
        block = block_of(known, op.linear)
        place = op.reads, None if block is None else block.name
        if run and place != last:
            yield tuple(run)
            run = []
        run.append(op.linear)
        last = place
    if run:
        yield tuple(run)
