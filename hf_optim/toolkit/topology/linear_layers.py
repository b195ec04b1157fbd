"""Linear layers of both classes: ``nn.Linear`` (weight ``[out, in]``) and GPT-2's ``Conv1D`` (weight ``[in, out]``).

A matrix of an expert (``ExpertLinear``) has a weight ``[out, in]`` and a size like them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .experts import ExpertLinear


def is_linear(module: nn.Module) -> bool:
    """Return True if the module is a linear layer: an ``nn.Linear``, a subclass of it, or a ``Conv1D``."""
    return isinstance(module, (nn.Linear, Conv1D))


def is_plain_linear(module: nn.Module) -> bool:
    """Return True if a linear layer runs the forward of its base class, ``nn.Linear`` or ``Conv1D``."""
    return type(module).forward in (nn.Linear.forward, Conv1D.forward)


def linears(model: nn.Module) -> dict[str, nn.Module]:
    """Return every linear layer of a model by qualified name, in the order of registration."""
    return {name: module for name, module in model.named_modules() if is_linear(module)}


def is_codebook_matrix(module: nn.Module) -> bool:
    """Return True if a codebook module of remote code stores one matrix: it has a ``shape`` and can ``decode()``."""
    return bool(getattr(module, "holds_codes", False)) and hasattr(module, "shape") and hasattr(module, "decode")


def weight_out_in(module: nn.Module | ExpertLinear) -> Tensor:
    """Return the weight as ``[out_features, in_features]``.

    A view for both classes and for matrices of experts: writing into it changes the module (under
    ``torch.no_grad()``). The matrix of a codebook module is decoded. Raises ``TypeError`` for any other module.
    """
    if isinstance(module, ExpertLinear):
        return module.weight
    if is_codebook_matrix(module):
        return module.decode()  # type: ignore[operator]
    if isinstance(module, Conv1D):
        return module.weight.T
    if isinstance(module, nn.Linear):
        return module.weight
    raise TypeError(f"{type(module).__name__} is not a linear layer")


def features(module: nn.Module | ExpertLinear) -> tuple[int, int]:
    """Return (out_features, in_features) of a linear layer. Raises ``TypeError`` for any other module."""
    if isinstance(module, ExpertLinear):
        return module.out_features, module.in_features
    if is_codebook_matrix(module):
        return module.shape  # type: ignore[return-value]
    if isinstance(module, Conv1D):
        return int(module.weight.shape[1]), int(module.weight.shape[0])
    if isinstance(module, nn.Linear):
        return int(module.out_features), int(module.in_features)  # some classes compute them as tensors (Inkling)
    raise TypeError(f"{type(module).__name__} is not a linear layer")


def parameter_names(model: nn.Module) -> Mapping[int, list[str]]:
    """Return id of a parameter -> the qualified names under which it is registered; several if it is tied."""
    names: dict[int, list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names[id(parameter)].append(name)
    return names


def tied_weights(module: nn.Module, name: str, names: Mapping[int, list[str]]) -> list[str]:
    """Describe the parameters of a module that are tied to another module, one line each.

    Args:
        module, name: the module and its qualified name.
        names: ``parameter_names(model)``.
    """
    own = {f"{name}.{key}": parameter for key, parameter in module.named_parameters()}
    return [
        f"{key}: tied to {other}"
        for key, parameter in own.items()
        for other in names.get(id(parameter), ())
        if other not in own
    ]
