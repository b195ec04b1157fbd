"""What stands between the two matrices of an expert, recognized by what it computes.

Kernels compute the known activations in the launch of the first product. A class may clamp, scale or mix the gate in a
method of its own; so the method of a module is run on numbers drawn for that, and compared with the formulas that the
kernels have. A method that agrees with none of them, has weights, or is not transformers' code, is called as it is.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

GATE = "_hf_optim_gate"
SILU, GELU, GELU_TANH, RELU, RELU_SQUARED = range(5)
UNGATED, CONCATENATED, INTERLEAVED = range(3)
"""As in the kernels' specification."""

LIMITS, ALPHAS = ("limit", "swiglu_limit"), ("alpha", "swiglu_alpha")
COLUMNS, ROWS = 64, 48
_known: dict[tuple[Any, ...], tuple[Any, ...] | None] = {}


def note_gate(module: nn.Module) -> None:
    """Recognize the gate of a module of experts and keep what was found with it."""
    vars(module)[GATE] = recognize(module)


def forget_gate(module: nn.Module) -> None:
    """Undo ``note_gate``."""
    vars(module).pop(GATE, None)


def gate_of(module: nn.Module) -> tuple[int, int, float, float, float] | None:
    """Return what ``note_gate`` found. While ``torch.compile`` traces, nothing new is recognized."""
    if GATE not in vars(module) and not torch.compiler.is_compiling():
        note_gate(module)
    return vars(module).get(GATE)


def recognize(module: Any) -> tuple[int, int, float, float, float] | None:
    """Return layout, activation, alpha, offset and limit of the gate (``naive.Gate`` of the kernels), or None."""
    activation = getattr(module, "act_fn", None)
    method = getattr(type(module), "_apply_gate", None) if module.has_gate else None
    kind = type(activation) if isinstance(activation, nn.Module) else activation
    if not all(_is_stock(code) for code in (method, kind) if code is not None):
        return None
    if "_apply_gate" in vars(module) or (isinstance(activation, nn.Module) and activation.state_dict()):
        return None
    numbers = [_number(module, names) for names in (LIMITS, ALPHAS)]
    key = (method, kind, *numbers, bool(module.has_gate), bool(getattr(module, "is_concatenated", True)))
    inner = vars(activation).get("act") if isinstance(activation, nn.Module) else None
    key = (*key, repr(inner))  # the function of an activation that has several
    if key not in _known:
        _known[key] = _compare(module, *numbers)
    return _known[key]


def _is_stock(code: Any) -> bool:
    return str(getattr(code, "__module__", "")).split(".")[0] in ("transformers", "torch")


def _number(module: Any, names: tuple[str, ...]) -> float | None:
    found = next((getattr(module, name) for name in names if hasattr(module, name)), None)
    return float(found) if isinstance(found, (int, float)) and not isinstance(found, bool) else None


def _compare(module: Any, limit: float | None, alpha: float | None) -> tuple[int, int, float, float, float] | None:
    layout = UNGATED
    if module.has_gate:
        layout = CONCATENATED if getattr(module, "is_concatenated", True) else INTERLEAVED
    random = torch.Generator().manual_seed(0)
    rows = torch.randn(ROWS, 2 * COLUMNS, generator=random) * torch.logspace(-2, 1.3, ROWS)[:, None]
    with torch.no_grad():
        try:
            right = module._apply_gate(rows) if module.has_gate else module.act_fn(rows)
        except Exception:
            return None
    if not isinstance(right, torch.Tensor) or right.dtype != rows.dtype:
        return None
    # Rounding of 1 + tanh(x) is magnified by x and by up.
    sizes = rows.double().abs().amax(dim=1, keepdim=True)
    sizes = torch.maximum(sizes, sizes.square())
    alphas = [1.0, 1.702, *([] if alpha is None else [alpha])]
    for act in range(5):
        for scale in alphas if act == SILU else [1.0]:
            for offset in (0.0, 1.0) if layout != UNGATED else (0.0,):
                for bound in (math.inf, *([] if limit is None or layout == UNGATED else [limit])):
                    gate = (layout, act, scale, offset, bound)
                    own = _apply(rows.double(), *gate)
                    if own.shape == right.shape and bool(((own - right).abs() <= 1e-6 * sizes).all()):
                        return gate
    return None


def _apply(rows: torch.Tensor, layout: int, act: int, alpha: float, offset: float, limit: float) -> torch.Tensor:
    from torch.nn import functional as F

    functions = {
        SILU: lambda x: x * torch.sigmoid(alpha * x), GELU: F.gelu, RELU: F.relu,
        GELU_TANH: lambda x: F.gelu(x, approximate="tanh"), RELU_SQUARED: lambda x: F.relu(x).square(),
    }  # fmt: skip
    if layout == UNGATED:
        return functions[act](rows)
    first, up = (rows[:, ::2], rows[:, 1::2]) if layout == INTERLEAVED else rows.chunk(2, dim=-1)
    return functions[act](first.clamp(max=limit)) * (up.clamp(-limit, limit) + offset)
