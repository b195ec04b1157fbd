"""Loading the experts of a compressed checkpoint without a dense copy.

A checkpoint has a linear layer for each matrix of each expert, and transformers has stacked parameters. So before the
weights are read, the module of experts gets such layers instead of its parameters (``expose_experts``); the loader then
treats them like any others. Afterwards their codes are packed, one expert at a time, and the layers are gone.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ...errors import CheckpointError, ModelError
from ...toolkit.checkpoint.safetensors import SafetensorsHeaders, UnsupportedCheckpoint
from ...toolkit.topology.experts import expert_stacks, fused_experts, matrix_names, matrix_shape
from ..experts import WEIGHT, attach_expert_schemes, checkpoint_rows
from ..weights import Codes
from .expert_swap import describe_experts, pack_experts, prepack_experts
from .layouts import Layout
from .packed_experts import SIDES

if TYPE_CHECKING:
    from compressed_tensors.quantization import QuantizationScheme

    from .kernel import Kernel

EXPOSED = "_hf_optim_exposed"
# The matrix of an expert in the key of a checkpoint, and the names that most architectures have for it.
EXPERT_LEAF = re.compile(r"\.experts\.\d+\.(\w+)\.")
USUAL_NAMES = {"up": ("gate_proj", "up_proj"), "down": ("down_proj",)}
# Local names that mark a layer whose weight is compressed, under any layout.
CODES = ("weight_packed", "weight_scale", "qweight")


@dataclass(eq=False)
class ExposedExperts:
    """What is needed to turn a module with one layer per matrix back into experts.

    Attributes:
        former: its class.
        dtype: of its stacked parameters.
        shapes: ``(E, out, in)`` of each of them.
        layers: of each of them, for each expert, the local names of the layers that its rows come from, top to bottom.
        children: the names of the submodules that hold these layers.
    """

    former: type[nn.Module]
    dtype: torch.dtype
    shapes: dict[str, tuple[int, int, int]]
    layers: dict[str, list[list[str]]]
    children: list[str]


class PlaceholderExperts(nn.Module):
    """A module of experts while their compressed tensors are loaded."""


def placeholder_class(former: type[nn.Module], key: str) -> Any:
    """Return the class of such a module: its stacked parameters are tensors without data, marked as initialized.

    ``key`` is the instance attribute with their ``shapes``.
    """

    def stacked(name: str) -> property:
        def read(self: Any) -> Tensor:
            shape = vars(self)[key].shapes.get(name)
            if shape is None:
                raise AttributeError(f"{former.__name__!r} object has no attribute {name!r}")
            found = nn.Parameter(torch.empty(shape, device="meta"), requires_grad=False)
            found._is_hf_initialized = True  # type: ignore[attr-defined]
            return found

        return property(read)

    body = {name: stacked(name) for name in SIDES}
    return type(former.__name__, (PlaceholderExperts, former), body)


def expose_experts(model: Any, packs_experts: bool) -> None:
    """Give the modules of experts of a model on the meta device a linear layer for each matrix of a checkpoint.

    Raises ``UnsupportedCheckpoint`` for experts that cannot be packed; ``packs_experts``: a kernel takes experts.
    """
    stacks, fused = expert_stacks(model), fused_experts(model)
    if not stacks:
        return
    other = next((name for name in stacks if name not in fused), None)
    if other is not None or not packs_experts:
        why = f"{other} does not run its experts through transformers' interface" if other else "no kernel runs experts"
        raise UnsupportedCheckpoint(f"its experts are stacked matrices, and {why}")
    for name, module in fused.items():
        if getattr(module, "has_bias", False):
            raise UnsupportedCheckpoint(
                f"the experts of {name} have biases, for which this format has no reader: use the dense checkpoint, or "
                "gpt-oss's own in MXFP4"
            )
        if getattr(module, "_is_expert_parallel", False):
            raise UnsupportedCheckpoint(f"the experts of {name} are spread over ranks: load the model on one")
        try:
            rows = {key: checkpoint_rows(model, f"{name}.{key}", module) for key in matrix_names(module)}
        except ModelError as error:
            raise UnsupportedCheckpoint(str(error)) from error
        _expose(name, module, rows)


def _expose(name: str, module: nn.Module, rows: Mapping[str, Mapping[str, tuple[int, int, int]]]) -> None:
    dtype = module.get_parameter(next(iter(rows))).dtype
    shapes = {key: matrix_shape(module, key) for key in rows}
    layers: dict[str, list[list[str]]] = {}
    children: list[str] = []
    for key, parts in rows.items():
        count, _, columns = shapes[key]
        layers[key] = [[] for _ in range(count)]
        for stored, (expert, begin, end) in sorted(parts.items(), key=lambda item: item[1]):
            own = stored.removesuffix(WEIGHT).removeprefix(f"{name}.")
            if own == stored.removesuffix(WEIGHT) or own.count(".") != 1:
                raise UnsupportedCheckpoint(f"the checkpoint has {stored} for {name}")
            layers[key][expert].append(own)
            child, _, leaf = own.partition(".")
            if child not in module._modules:
                module.add_module(child, nn.Module())
                children.append(child)
            layer = nn.Linear(columns, end - begin, bias=False, device="meta", dtype=dtype)
            module._modules[child].add_module(leaf, layer)  # type: ignore[union-attr]
        del module._parameters[key]
    vars(module)[EXPOSED] = ExposedExperts(type(module), dtype, shapes, layers, children)
    module.__class__ = placeholder_class(type(module), EXPOSED)


def exposed_experts(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules with a layer per matrix, by name."""
    return {name: module for name, module in model.named_modules() if EXPOSED in vars(module)}


def require_compressed(model: nn.Module, layouts: Mapping[str, Layout], headers: SafetensorsHeaders) -> None:
    """Raise ``UnsupportedCheckpoint`` unless every matrix of every expert is compressed and has a layout."""
    for name, module in exposed_experts(model).items():
        for expert in (own for each in vars(module)[EXPOSED].layers.values() for own in each):
            for layer in (f"{name}.{local}" for local in expert):
                if layer in layouts:
                    continue
                coded = any(headers.find(f"{layer}.{local}") is not None for local in CODES)
                what = "compressed, but no part of its configuration says how" if coded else "not compressed"
                raise UnsupportedCheckpoint(f"its experts are stacked matrices, and {layer} is {what}")


def without_experts(conversions: list[Any]) -> list[Any]:
    """Return transformers' conversions without those that stack the matrices of experts."""
    from transformers.core_model_loading import WeightConverter

    def stacks(each: Any) -> bool:
        sources = getattr(each, "_original_source_patterns", ())
        return isinstance(each, WeightConverter) and any("experts" in source for source in sources)

    return [each for each in conversions if not stacks(each)]


def expert_renamings(model: nn.Module, keys: Iterable[str]) -> list[Any]:
    """Return transformers' renamings for a checkpoint that calls the matrices of experts otherwise than the model does.

    AutoRound writes ``gate_proj``, ``up_proj`` and ``down_proj`` for every architecture, also where its own checkpoints
    have other names (Mixtral: ``w1``, ``w3``, ``w2``). ``keys`` are those of the checkpoint.
    """
    from transformers.core_model_loading import WeightRenaming

    stored = {found.group(1) for found in map(EXPERT_LEAF.search, keys) if found}
    own: dict[str, str] = {}  # the usual name of a matrix -> the model's
    for module in exposed_experts(model).values():
        for key, layers in vars(module)[EXPOSED].layers.items():
            leaves = [name.rpartition(".")[2] for name in layers[0]]
            usual = USUAL_NAMES[SIDES[key]][-len(leaves) :]
            own.update(zip(usual, leaves, strict=False))
    if not own.keys() <= stored or stored & set(own.values()):
        return []
    return [
        WeightRenaming(rf"\.experts\.(\d+)\.{usual}\.", rf".experts.\1.{leaf}.") for usual, leaf in sorted(own.items())
    ]


class LayerReader:
    """The codes of the layers of one module of experts, and the schemes that were found in them.

    Attributes:
        schemes: parameter -> scheme; asymmetric if one of its layers has zero points.
    """

    def __init__(self, name: str, module: nn.Module, tensors: Mapping[str, tuple[Layout, dict[str, Tensor]]]) -> None:
        exposed: ExposedExperts = vars(module)[EXPOSED]
        self.name, self.tensors, self.layers = name, tensors, exposed.layers
        self.columns = {key: shape[2] for key, shape in exposed.shapes.items()}
        self.rows = {key: shape[1] for key, shape in exposed.shapes.items()}
        self.parameters = {SIDES[key]: key for key in exposed.shapes}
        self.schemes: dict[str, QuantizationScheme] = {}

    def codes(self, side: str, expert: int) -> list[Codes]:
        """Return the codes of one matrix, part by part: see ``QuantizedExperts``."""
        key = self.parameters[side]
        names = self.layers[key][expert]
        found = []
        for local in names:
            layout, tensors = self.tensors[local]
            try:
                part, scheme = layout.read(tensors, (self.rows[key] // len(names), self.columns[key]))
            except ValueError as error:
                raise CheckpointError(f"{self.name}.{local}: {error}") from error
            known = self.schemes.get(key)
            if known is None or (known.weights.symmetric and not scheme.weights.symmetric):
                self.schemes[key] = scheme
            found.append(part)
        return found


@torch.no_grad()
def convert_experts(
    name: str, module: nn.Module, tensors: dict[str, tuple[Layout, dict[str, Tensor]]], kernels: tuple[Kernel, ...]
) -> None:
    """Pack the experts of one module, whose layers are loaded, and free these.

    Args:
        name: of the module.
        tensors: layout and tensors of each layer, by local name; scales have the dtype of the model.

    Raises ``UnsupportedCheckpoint`` if no kernel takes them.
    """
    exposed: ExposedExperts = vars(module)[EXPOSED]
    for child in exposed.children:
        del module._modules[child]
    reader = LayerReader(name, module, tensors)
    scales = [reader.codes(SIDES[key], 0)[0].scale for key in exposed.shapes]  # with them, the schemes
    scale = scales[0]
    assert scale is not None
    # Zero points of GPTQ and AWQ are known only when all layers have been read.
    open_grid = any(not hasattr(layout, "scheme") for layout, _ in tensors.values())
    schemes = {key: _open(scheme) if open_grid else scheme for key, scheme in reader.schemes.items()}
    dtype = scale.dtype if scale.itemsize > 1 else exposed.dtype
    weight = describe_experts(
        name, module, exposed.shapes, schemes, dtype, scale.device, reader.codes,
        ordered=any(_reorders(own) for _, own in tensors.values()),
    )  # fmt: skip
    module.__class__ = exposed.former
    del vars(module)[EXPOSED]
    found = prepack_experts(weight, kernels)
    if isinstance(found, str):
        raise UnsupportedCheckpoint(f"no kernel runs the experts of {name}: {found}")
    pack_experts(module, exposed.shapes, weight, *found)
    attach_expert_schemes(module, reader.schemes)
    tensors.clear()


def _reorders(tensors: Mapping[str, Tensor]) -> bool:
    """Return True if the columns of a layer are not in the order of their groups."""
    groups = tensors.get("g_idx", tensors.get("weight_g_idx"))
    return groups is not None and bool((groups[1:] < groups[:-1]).any())


def _open(scheme: QuantizationScheme) -> QuantizationScheme:
    """Return a scheme under which zero points are possible."""
    copied = scheme.model_copy(deep=True)
    copied.weights.symmetric = False
    return copied
