"""Norms of a captured step as two kernels each, where ``torch.compile`` does not fuse them.

transformers computes a root mean square norm in six operations, each a kernel; a step of an 8B Llama has 65 norms.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EPSILONS = ("variance_epsilon", "eps")
TOLERANCE = 1e-5
_IS_PLAIN: weakref.WeakKeyDictionary[type[nn.Module], bool] = weakref.WeakKeyDictionary()


@contextmanager
def fused_norms(model: nn.Module) -> Iterator[None]:
    """Compute plain root mean square norms of a model by PyTorch's own operator inside the context.

    As in transformers, values are rounded to 16 bits before they are multiplied with the weight: results differ by the
    order of a sum in float32 alone. Norms with hooks, with a forward of their own, or that compute anything else, are
    left as they are.
    """
    replaced = [module for module in model.modules() if _is_replaceable(module)]
    for module in replaced:
        module.forward = _Fused(module)
    try:
        yield
    finally:
        for module in replaced:
            del module.forward


class _Fused:
    """The forward of a norm, which falls back to that of its class."""

    def __init__(self, module: Any) -> None:
        self.module = module
        self.epsilon = _epsilon(module)

    def __call__(self, hidden: Tensor) -> Tensor:
        weight = self.module.weight
        if hidden.dtype != weight.dtype:
            return type(self.module).forward(self.module, hidden)
        return weight * F.rms_norm(hidden, weight.shape, None, self.epsilon)


def _is_replaceable(module: nn.Module) -> bool:
    if "forward" in vars(module) or module._forward_hooks or module._forward_pre_hooks:
        return False
    kind = type(module)
    if kind not in _IS_PLAIN:
        _IS_PLAIN[kind] = _is_plain(module)
    return _IS_PLAIN[kind]


def _is_plain(module: Any) -> bool:
    """Return True if a module is the norm of its last dimension times its weight, by what it computes."""
    weight = getattr(module, "weight", None)
    if "RMSNorm" not in type(module).__name__ or not isinstance(weight, Tensor) or weight.dim() != 1:
        return False
    if len(list(module.parameters())) != 1 or _epsilon(module) is None or weight.is_meta:
        return False
    values = torch.linspace(-2, 3, 2 * len(weight), device=weight.device).view(2, -1)
    try:
        with torch.no_grad():
            expected = F.rms_norm(values, weight.shape, weight.float(), _epsilon(module))
            return torch.allclose(module(values).float(), expected, rtol=TOLERANCE, atol=TOLERANCE)
    except Exception:  # another signature
        return False


def _epsilon(module: Any) -> Any:
    return next((getattr(module, name) for name in EPSILONS if isinstance(getattr(module, name, None), float)), None)
