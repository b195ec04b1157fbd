"""What a captured forward depends on: whether it is still right, and why a model has none."""

from __future__ import annotations

import math
import weakref

import torch
from torch import Tensor, nn

# How far a replayed result may be from the launched one, root mean square: other sizes of products round otherwise.
TOLERANCE = {torch.float16: 5e-3, torch.bfloat16: 4e-2}

Addresses = list[tuple[weakref.ref[nn.Module], list[tuple[str, str, int]]]]


def addresses_of(model: nn.Module) -> Addresses:
    """Return the modules that hold tensors: for each, which dict, which name, and the address."""
    found = []
    for module in model.modules():
        known = [
            (kind, name, tensor.data_ptr())
            for kind in ("_parameters", "_buffers")
            for name, tensor in vars(module)[kind].items()
            if tensor is not None
        ]
        if known:
            found.append((weakref.ref(module), known))
    return found


def are_there(addresses: Addresses) -> bool:
    """Return True if weights are still at their addresses. This reads no module's settings, so it is fast."""
    for reference, known in addresses:
        module = reference()
        if module is None:
            return False
        held = vars(module)
        for kind, name, address in known:
            tensor = held[kind].get(name)
            if tensor is None or tensor.data_ptr() != address:
                return False
    return True


def has_global_hooks() -> bool:
    """Return True if there are hooks of all modules of the process."""
    return bool(torch.nn.modules.module._global_forward_hooks or torch.nn.modules.module._global_forward_pre_hooks)


def why_not(model: nn.Module) -> str:
    """Return why replays of a forward would leave something out, or ``""``. Hooks of the model itself are called."""
    devices = {parameter.device for parameter in model.parameters()}
    if len(devices) > 1:
        return f"its weights are on several devices ({', '.join(sorted(map(str, devices)))})"
    if has_global_hooks():
        return "there are hooks of all modules, which a replay does not call"
    if hasattr(model, "why_not_captured") and (reason := model.why_not_captured()):  # type: ignore[operator]
        return reason
    for name, module in model.named_modules():
        if module is not model and (module._forward_hooks or module._forward_pre_hooks):
            return f"{name} has hooks, which a replay does not call"
        if module.training:
            return f"{name} is in training mode, in which it may draw numbers"
        if any(".toolkit.offloading" in each.__module__ for each in type(module).__mro__):
            return f"{name or 'it'} is offloaded"
    return ""


def how_wrong(found: Tensor, right: Tensor) -> str | None:
    """Return what is wrong with the result of a graph, ``""`` for nothing; None if nothing could be held against it."""
    bound = TOLERANCE.get(right.dtype, 1e-4)
    right, found = right.double(), found.double()
    if not math.isfinite(float(right.norm())):
        return None
    off = float((found - right).norm() / right.norm().clamp_min(1e-30))
    return "" if off <= bound else f"the result of its graph is off by {off:.1e}"
