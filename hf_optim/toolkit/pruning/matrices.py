"""The weights that pruning ranks, by name: those of linear layers, and the matrices of experts.

The name of a weight is that of its parameter (``model.layers.0.self_attn.q_proj.weight``). A matrix of an expert is a
part of a stacked parameter ``[E, ., .]``: ``model.layers.0.mlp.experts.3.down_proj``, the name of its ``ExpertLinear``,
is part 3 of ``model.layers.0.mlp.experts.down_proj``. Rankings take and return matrices under these names.
``run.masks`` holds one mask for each parameter, also for a stack of experts, since that is what an optimizer updates.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..distributed import fsdp
from ..topology.experts import ExpertLinear

_PART = re.compile(r"(?:(.*)\.)?(\d{1,9})\.([^.]+)")


def weight_name(name: str, layer: Any) -> str:
    """Return the name of the weight of a layer: its own for an ``ExpertLinear``, else that of its parameter."""
    return name if isinstance(layer, ExpertLinear) else f"{name}.weight"


def weight_names(layers: Mapping[str, Any]) -> dict[str, str]:
    """Return layer name -> name of its weight; of layers that share a parameter, only the first."""
    seen: set[tuple[int, int]] = set()
    names: dict[str, str] = {}
    for name, layer in layers.items():
        if isinstance(layer, ExpertLinear):
            key = (id(layer.experts.get_parameter(layer.parameter)), layer.index)
        else:
            key = (id(layer.weight), -1)
        if key not in seen:
            seen.add(key)
            names[name] = weight_name(name, layer)
    return names


def split_part(name: str) -> tuple[str, int] | None:
    """Return the parameter and the index of a matrix of an expert by its name; None for a name of another form."""
    found = _PART.fullmatch(name)
    if found is None:
        return None
    prefix, index, parameter = found.groups()
    return (f"{prefix}.{parameter}" if prefix else parameter), int(index)


def locate(model: nn.Module, name: str) -> tuple[str, int | None]:
    """Return the parameter of a weight, and the part of it, or None if the weight is the whole parameter.

    Raises ``AttributeError`` if the model has no such weight.
    """
    try:
        model.get_parameter(name)
    except AttributeError:
        part = split_part(name)
        if part is None or not part[1] < len(model.get_parameter(part[0])):
            raise
        return part
    return name, None


def parameters_of(masks: Mapping[str, Tensor], layers: Iterable[str]) -> list[str]:
    """Return the parameters with a mask that hold the weights of layers and matrices of experts, each once."""
    found: dict[str, None] = {}
    for name in layers:
        part = split_part(name)
        if f"{name}.weight" in masks:
            found[f"{name}.weight"] = None
        elif part is not None and part[0] in masks:
            found[part[0]] = None
    return list(found)


class MaskParts(Mapping[str, Tensor]):
    """Masks by the name of a weight: masks of parameters, and in them those of the matrices of experts (views)."""

    def __init__(self, masks: Mapping[str, Tensor]) -> None:
        self._masks = masks

    def __getitem__(self, name: str) -> Tensor:
        if name in self._masks:
            return self._masks[name]
        part = split_part(name)
        if part is None or part[0] not in self._masks:
            raise KeyError(name)
        return self._masks[part[0]][part[1]]

    def __contains__(self, name: object) -> bool:
        part = split_part(name) if isinstance(name, str) else None
        return name in self._masks or (part is not None and part[0] in self._masks)

    def __iter__(self) -> Iterator[str]:
        return iter(self._masks)

    def __len__(self) -> int:
        return len(self._masks)


class MatrixWeights(fsdp.FullWeights):
    """Name of a weight -> full weight as it is stored, detached; see ``FullWeights``.

    Experts that follow one another in a stack are parts of one gathered copy.
    """

    def __init__(self, model: nn.Module, names: Iterable[str]) -> None:
        super().__init__(model, names)
        self._places = {name: locate(model, name) for name in self}
        self._stack: tuple[str, Tensor] | None = None

    def __getitem__(self, name: str) -> Tensor:
        parameter, index = self._places[name]
        if index is None:
            return super().__getitem__(parameter)
        parameter_of_stack, whole = self._stack or ("", None)
        if whole is None or parameter_of_stack != parameter:
            whole = super().__getitem__(parameter)
            self._stack = (parameter, whole)
        return whole[index]


def whole_masks(model: nn.Module, masks: Mapping[str, Tensor], new: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return ``new``, by parameter: masks of matrices of experts in the whole mask of their stack.

    What ``new`` does not mention of a stack is as in ``masks``, or kept.
    """
    found: dict[str, Tensor] = {}
    for name, mask in new.items():
        parameter, index = locate(model, name)
        if index is None:
            found[parameter] = mask
            continue
        if parameter not in found:
            weight = model.get_parameter(parameter)
            former = masks.get(parameter)
            home = fsdp.mask_device(weight)
            found[parameter] = (
                torch.ones(weight.shape, dtype=torch.bool, device=home) if former is None else former.to(home).clone()
            )
        found[parameter][index] &= mask.to(found[parameter].device)
    return found


def is_stored_transposed(layer: Any) -> bool:
    """Return True if a layer stores its weight as ``[in, out]``: a ``Conv1D``, or an expert of some families."""
    return isinstance(layer, Conv1D) or (isinstance(layer, ExpertLinear) and layer.transposed)


def mask_out_in(layer: Any, masks: Mapping[str, Tensor], weight: str) -> Tensor | None:
    """Return the mask of a layer's weight as ``[out, in]``, or None if there is none.

    Args:
        layer: a linear layer, or an ``ExpertLinear``.
        masks: parameter name -> mask.
        weight: the name of the weight (``weight_name``).
    """
    mask = MaskParts(masks).get(weight)
    return mask.T if mask is not None and is_stored_transposed(layer) else mask


def as_stored(layer: Any, mask: Tensor) -> Tensor:
    """Return a mask ``[out, in]`` in the layout of the layer's weight: ``[in, out]`` for a ``Conv1D``, for example."""
    return mask.T.contiguous() if is_stored_transposed(layer) else mask
