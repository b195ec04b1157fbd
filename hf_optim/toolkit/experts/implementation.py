"""Let the mixture layers of a model compute with hf_optim's experts function, and undo it.

A model changes in its configuration, which names the implementation (in memory alone: it is not saved), and each module
of experts keeps what was recognized of its activation.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ..compat import set_experts_implementation
from ..topology.experts import fused_experts, interface_experts
from . import kernels, registry
from .capped_layer import layer_of
from .gates import forget_gate, note_gate
from .registry import NAME
from .routers import require_fitting_routers

FORMER = "_hf_optim_plain_experts"
# A user who chose another implementation keeps it.
REPLACED = ("grouped_mm", "batched_mm", "eager")


class User:
    """Keeps the experts function registered while a model has it in its attributes; copies and pickles do so too."""

    def __init__(self, former: Any) -> None:
        self.former = former
        registry.use(self)

    def __reduce__(self) -> Any:
        return User, (self.former,)


def attach_experts(model: nn.Module) -> list[str]:
    """Let the experts of a model compute with hf_optim's function, in place; return the names of their modules.

    Modules with a capacity do already, and implementations that are not transformers' own are kept. Undone by
    ``detach_experts``. Raises ``ModelError`` for a router that does not fit its experts.
    """
    for part in model.modules():
        if isinstance(part, PreTrainedModel):
            require_fitting_routers(part, interface_experts(part))
            break
    found = fused_experts(model)
    if not found:
        return []
    kernels.load()
    for module in found.values():
        note_gate(module)
    inner = next((part for part in model.modules() if isinstance(part, PreTrainedModel)), None)
    if inner is None or any(layer_of(module) is not None for module in found.values()) or FORMER in vars(inner):
        return [name for name, module in found.items() if runs_here(module)]
    if not _is_replaced(former := inner.get_experts_implementation()):
        return []
    vars(inner)[FORMER] = User(former)
    try:
        set_experts_implementation(inner, NAME)
    except (ValueError, RuntimeError):  # in transformers 5.17 some classes do not let their experts be set
        detach_experts(model)
    return [name for name, module in found.items() if runs_here(module)]


def detach_experts(model: nn.Module) -> None:
    """Give a model the implementation of experts back that it had before ``attach_experts``."""
    for module in list(model.modules()):
        forget_gate(module)
        user = vars(module).pop(FORMER, None)
        if user is not None:
            set_experts_implementation(module, user.former)
            registry.drop(user)


def runs_here(module: Any) -> bool:
    """Return True if a module of experts computes with hf_optim's function."""
    return _implementation(module) == NAME


def implementation_of(module: Any) -> str:
    """Return what a module of experts runs on, as text for a report."""
    if not runs_here(module):
        return str(_implementation(module) or "eager")
    reason = kernels.unsupported_reason(module)
    if not reason and module.down_proj.device.type == "cpu":
        reason = "on a CPU"
    return f"{NAME}: grouped_mm ({reason})" if reason else f"{NAME}: kernels"


def _implementation(module: Any) -> Any:
    return getattr(getattr(module, "config", None), "_experts_implementation", None)


def _is_replaced(former: Any) -> bool:
    names = former.values() if isinstance(former, dict) else [former]
    return all(name is None or name in REPLACED for name in names)
