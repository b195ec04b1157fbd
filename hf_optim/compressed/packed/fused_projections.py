"""Running layers that read the same tensor (q, k and v; gate and up) as one product, and undoing it.

Such layers are not recognized by name: one forward of the model is traced without weights.
"""

from __future__ import annotations

import contextlib
import logging
import weakref
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator
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
    """Layers that run as one product if their kernel can join their packed weights.

    The layers own the group, so it refers to them weakly; in a copy of one layer alone the others do not exist.

    Attributes:
        sizes: the rows of each layer.
        contiguous: see ``FusedOutput``.
        fused: the packed weight of all layers; None while each layer has its own.
    """

    def __init__(self, layers: list[PackedLinear], contiguous: bool) -> None:
        self.sizes, self.contiguous = [layer.out_features for layer in layers], contiguous
        self.fused: Any = None
        self._layers = [_reference(layer) for layer in layers]

    @property
    def layers(self) -> list[PackedLinear | None]:
        """The layers in the order in which they run; None for one that no longer exists."""
        return [layer() for layer in self._layers]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_layers": self.layers}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _layers=[_reference(layer) for layer in state["_layers"]])

    @torch.no_grad()
    def fuse(self) -> bool:
        """Replace the packed weights by slices of one fused weight. Return False if the kernel does not allow it."""
        layers = [layer for layer in self.layers if layer is not None]
        kinds = {_fusion_key(layer) for layer in layers}
        if self.fused is not None or len(kinds) > 1 or None in kinds or len(layers) < len(self.sizes):
            return False
        if layers[0].packing.description.device.type == "meta":
            return False
        fused = _fuse_weights(layers)
        if fused is None:
            return False
        output = FusedOutput(self.sizes, self.contiguous)
        short = _short_names([layer.packing.description.name for layer in layers])
        for i, layer in enumerate(layers):
            others = ", ".join(name for name in short if name != short[i])
            layer._modules[PACKED_WEIGHT] = FusedSlice(fused, output, i, f"{fused.label}, with {others}")
            layer.packing.group = self
            layer.refresh()
        self.fused = fused
        return True

    @torch.no_grad()
    def unfuse(self) -> None:
        """Give every layer its own packed weight again, with the same codes. ``fuse`` may follow."""
        if self.fused is None:
            return
        codes, stop = self.fused.codes(), 0
        for layer, size in zip(self.layers, self.sizes, strict=True):
            start, stop = stop, stop + size
            if layer is None:
                continue
            layer.packing.unfuse_norm()
            bias = layer._parameters["bias"]
            if bias is not None:
                bias.data = bias.data.clone()
            own = partial(slice_rows, codes, start, stop)
            weight = replace(layer.packing.description, bias=None if bias is None else bias.detach(), codes=own)
            layer._modules[PACKED_WEIGHT] = layer.packing.kernel.prepack(weight)
            layer.refresh()
        self.fused = None

    def disband(self) -> None:
        """Call ``unfuse`` and dissolve the group."""
        self.unfuse()
        for layer in self.layers:
            if layer is not None:
                layer.packing.group = None


def _reference(layer: PackedLinear | None) -> Callable[[], PackedLinear | None]:
    return weakref.ref(layer) if layer is not None else _gone


def _gone() -> None:
    """Replace the reference to a layer that no longer exists."""


def _fusion_key(layer: PackedLinear) -> Hashable:
    """Return a key that is equal for layers that a kernel may join; None if the layer's kernel joins none."""
    packing, weight = layer.packing, layer.packing.description
    if packing.failure or packing.kernel.join is None:
        return None
    inputs = weight.inputs and (weight.inputs.type, weight.inputs.dynamic, weight.inputs.symmetric)
    form = weight.kind, weight.bits, weight.group_size, weight.symmetric, weight.ordered, weight.sparse24
    biased = layer._parameters["bias"] is not None
    return packing.kernel, weight.shape[1], weight.dtype, weight.device, *form, weight.outliers, inputs, biased


def _fuse_weights(layers: list[PackedLinear]) -> Any:
    """Join the packed weights of layers; return None if their kernel does not."""
    join = layers[0].packing.kernel.join
    assert join is not None
    names = [layer.packing.description.name for layer in layers]
    try:
        fused = join([layer._modules[PACKED_WEIGHT] for layer in layers])
    except Exception as error:
        log.debug("%s are not fused: %s: %s", names, type(error).__name__, error)
        return None
    if fused is None or layers[0]._parameters["bias"] is None:
        return fused
    bias = fused._buffers.get("bias")
    if bias is None or bias.shape != (sum(layer.out_features for layer in layers),):
        log.debug("%s are not fused: the fused weight has no buffer with their biases", names)
        return None
    return fused


def _short_names(names: list[str]) -> list[str]:
    """Strip the leading and trailing parts that all names have in common."""
    split = [name.split(".") for name in names]
    while all(len(parts) > 1 for parts in split) and len({parts[-1] for parts in split}) == 1:
        split = [parts[:-1] for parts in split]
    while all(len(parts) > 1 for parts in split) and len({parts[0] for parts in split}) == 1:
        split = [parts[1:] for parts in split]
    return [".".join(parts) for parts in split]


def fuse_projections(model: nn.Module) -> Trace | None:
    """Fuse the packed layers of a model that read the same tensor, unless it has been tried for all of them before.

    The layers of a model that cannot be traced stay separate. Returns the trace, if one was made.
    """
    layers = [module for module in model.modules() if isinstance(module, PackedLinear)]
    separate = [layer for layer in layers if layer.packing.group is None and _fusion_key(layer) is not None]
    by_key: dict[Hashable, list[PackedLinear]] = defaultdict(list)
    for layer in separate:
        by_key[_fusion_key(layer)].append(layer)
    candidates = {id(layer) for members in by_key.values() if len(members) > 1 for layer in members}
    if not any(not layer.packing.fusion_tried for layer in separate if id(layer) in candidates):
        return None
    for layer in separate:
        layer.packing.fusion_tried = True
    found = _trace_with_layout(model)
    if found is None:
        return None
    traced, contiguous = found
    for members in _fusable_groups(traced, candidates):
        FusedProjections(members, contiguous).fuse()
    return traced


def trace_packed(model: nn.Module) -> Trace | None:
    """Trace a model with packed layers; return None if it cannot be traced."""
    found = _trace_with_layout(model)
    return None if found is None else found[0]


def _trace_with_layout(model: nn.Module) -> tuple[Trace, bool] | None:
    """Trace a model. Also return True if the outputs of its layers must be contiguous. None if it cannot be traced."""
    error = ""
    for contiguous in (False, True):
        try:
            with _traceable(model, contiguous):
                return trace(model), contiguous
        except Exception as reason:
            error = f"{type(reason).__name__}: {reason}"  # not the exception: it refers to this frame
    log.debug("no layers are fused, since %s cannot be traced: %s", type(model).__name__, error)
    return None


class _TraceableLinear(PackedLinear):
    """A packed layer for tracing: it skips the packed weight, which fake tensors may not be able to run."""

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """A placeholder with the shape and dtype of the weight, which is what models read."""
        return torch.zeros((), dtype=self.packing.description.dtype).expand(self.packing.description.shape)

    def forward(self, input: Tensor) -> Tensor:
        """Return the output with the strides it would have in a fused product."""
        wide = input.new_empty((*input.shape[:-1], self.out_features + 8))
        if not isinstance(input, FakeTensor):
            real = self._run(input) if self._accepts(input) else self.dense(input)
            wide[..., : self.out_features] = real
        return wide.narrow(-1, 0, self.out_features)


class _ContiguousTraceableLinear(_TraceableLinear):
    """A packed layer for tracing whose outputs are contiguous, like those of ``nn.Linear``."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).contiguous()


@contextlib.contextmanager
def _traceable(model: nn.Module, contiguous: bool) -> Iterator[None]:
    """Replace the class of the packed layers by one that can be traced, for the duration of the context."""
    layers = [module for module in model.modules() if type(module) is PackedLinear]
    try:
        for layer in layers:
            layer.__class__ = _ContiguousTraceableLinear if contiguous else _TraceableLinear
        yield
    finally:
        for layer in layers:
            layer.__class__ = PackedLinear


def _fusable_groups(traced: Trace, candidates: Iterable[int]) -> list[list[PackedLinear]]:
    """Return the layers of one block and kind that run consecutively on the same tensor, in every pass over them."""
    found: dict[tuple[str, ...], None] = {}
    runs: dict[str, set[tuple[str, ...]]] = defaultdict(set)
    for run in _consecutive_calls(traced, set(candidates)):
        found[run] = None
        for name in run:
            runs[name].add(run)
    groups = []
    for run in found:
        if len(set(run)) < len(run) or any(len(runs[name]) > 1 for name in run):
            continue
        by_key: dict[Hashable, list[PackedLinear]] = defaultdict(list)
        for name in run:
            layer: Any = traced.modules[name]
            by_key[_fusion_key(layer)].append(layer)
        groups += [members for members in by_key.values() if len(members) > 1]
    return groups


def _consecutive_calls(traced: Trace, candidates: set[int]) -> Iterator[tuple[str, ...]]:
    """Yield the candidates in call order, split wherever another tensor is read or another block begins."""
    known = blocks(traced)
    run: list[str] = []
    last: Hashable = None
    for op in traced.ops:
        if op.linear is None or id(traced.modules[op.linear]) not in candidates:
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
