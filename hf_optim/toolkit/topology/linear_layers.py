"""Linear layers of either class: `nn.Linear` (weight [out, in]) and GPT-2's `Conv1D` (weight [in, out])."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

LINEAR_TYPES = (nn.Linear, Conv1D)


def is_linear(module: nn.Module) -> bool:
    """Whether the module is a linear layer: an `nn.Linear`, a subclass of it, or a `Conv1D`."""
    return isinstance(module, LINEAR_TYPES)


def linears(model: nn.Module) -> dict[str, nn.Module]:
    """Every linear layer of `model` by qualified name, in the order of registration."""
    return {name: module for name, module in model.named_modules() if is_linear(module)}


def is_codebook_matrix(module: nn.Module) -> bool:
    """Whether a module of remote code holds the codes of one matrix: `shape` [out, in], which it can `decode()`."""
    return bool(getattr(module, "holds_codes", False)) and hasattr(module, "shape") and hasattr(module, "decode")


def weight_out_in(module: nn.Module) -> Tensor:
    """The weight as [out_features, in_features].

    A view for both classes: writing into it changes the module (under `torch.no_grad()`). A module of remote code that
    holds codes of a matrix decodes it. Raises `TypeError` for a module that is no linear layer.
    """
    if is_codebook_matrix(module):
        return module.decode()  # type: ignore[operator]
    if isinstance(module, Conv1D):
        return module.weight.T
    if isinstance(module, nn.Linear):
        return module.weight
    raise TypeError(f"{type(module).__name__} is no linear layer")


def features(module: nn.Module) -> tuple[int, int]:
    """(out_features, in_features) of a linear layer; raises `TypeError` for any other module."""
    if is_codebook_matrix(module):
        return module.shape  # type: ignore[return-value]
    if isinstance(module, Conv1D):
        return int(module.weight.shape[1]), int(module.weight.shape[0])
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    raise TypeError(f"{type(module).__name__} is no linear layer")


def parameter_names(model: nn.Module) -> Mapping[int, list[str]]:
    """The qualified names under which each parameter is registered, by its identity."""
    names: dict[int, list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names[id(parameter)].append(name)
    return names


def tied_weights(module: nn.Module, name: str, held_by: Mapping[int, list[str]]) -> list[str]:
    """One line for each parameter of a module that another one holds too; `held_by` is `owners(model)`."""
    own = {f"{name}.{key}": parameter for key, parameter in module.named_parameters()}
    return [
        f"{key}: tied to {other}"
        for key, parameter in own.items()
        for other in held_by.get(id(parameter), ())
        if other not in own
    ]
