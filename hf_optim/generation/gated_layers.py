"""Feed-forward layers with a gate, recognized by what they compute, whose first half is one launch at one row.

A class may scale, clamp or drop between its projections, and new ones come with every release. So the forward of a
module is run on drawn numbers, with small projections in place of its own, and compared with the formula.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

GATE, UP, DOWN = PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
# In the order of the kernels' specification (``experts.naive``).
ACTIVATIONS: tuple[Callable[[Tensor], Tensor], ...] = (
    F.silu, F.gelu, lambda x: F.gelu(x, approximate="tanh"), F.relu, lambda x: F.relu(x).square(),
)  # fmt: skip
INPUTS, INNER, ROWS = 6, 10, 24


@cache
def on_one_row(kind: Any, act: int, kernel: Any) -> type[nn.Module]:
    """Return a subclass whose gate, values and activation of one row are one launch of ``kernel.dense_rows``."""

    def forward(self: Any, x: Tensor) -> Any:
        gate, up = self.gate_proj, self.up_proj
        if x.numel() != gate.in_features or x.dtype != gate.weight.dtype:
            return kind.forward(self, x)
        biases = [] if gate.bias is None else [gate.bias, up.bias]
        (row,) = kernel.dense_rows(x, [gate.weight, up.weight], biases, act)
        return self.down_proj(row)

    return type(kind.__name__, (kind,), {"forward": forward, "__module__": kind.__module__})


def activation_of(module: Any, takes: Callable[[nn.Module], bool]) -> int | None:
    """Return the number of the activation of ``down_proj(act(gate_proj(x)) * up_proj(x))``; None for another layer.

    Args:
        module: any module.
        takes: True for a projection that the kernel multiplies.

    Projections with hooks are left: what these do happens at a call, and there is none.
    """
    own = dict(module.named_children())
    if not own.keys() >= set(PROJECTIONS) or "forward" in vars(module) or any(module.parameters(recurse=False)):
        return None
    gate, up, others = own[GATE], own[UP], [each for name, each in own.items() if name not in PROJECTIONS]
    if not (takes(gate) and takes(up)) or any(each.state_dict() for each in others):
        return None
    if any(each._forward_hooks or each._forward_pre_hooks for each in (gate, up, *others)):
        return None
    if gate.weight.shape != up.weight.shape or (gate.bias is None) != (up.bias is None):
        return None
    return _compare(module)


def _compare(module: Any) -> int | None:
    random = torch.Generator().manual_seed(0)
    small = copy.copy(module)
    small._modules = dict(module._modules)
    for name, (outputs, inputs) in zip(PROJECTIONS, ((INNER, INPUTS), (INNER, INPUTS), (INPUTS, INNER)), strict=True):
        made = nn.Linear(inputs, outputs, bias=False, device="meta")
        made.weight = nn.Parameter(torch.randn(outputs, inputs, generator=random, dtype=torch.float64), False)
        small._modules[name] = made
    x = torch.randn(ROWS, INPUTS, generator=random, dtype=torch.float64) * torch.logspace(-2, 1.3, ROWS)[:, None]
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        try:
            right = type(module).forward(small, x)
        except Exception:  # another signature, or a device that this one is not
            return None
        if not isinstance(right, Tensor) or right.shape != x.shape or right.dtype != x.dtype:
            return None
        for act, function in enumerate(ACTIVATIONS):
            found = small.down_proj(function(small.gate_proj(x)) * small.up_proj(x))
            if bool(((found - right).abs() <= 1e-9 * found.abs().amax(dim=1, keepdim=True)).all()):
                return act
    return None
