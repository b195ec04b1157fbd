"""The product of a mixture layer on the kernels of the package ``hf_optim_kernels``, where these can run."""

from __future__ import annotations

import importlib
import os
from importlib import util
from typing import Any

import torch
from torch import Tensor, nn

from . import gates

PACKAGE = "hf_optim_kernels.experts.op"
_OP: list[Any] = []  # the module, imported once; torch.compile cannot trace an import
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def load() -> Any:
    """Return the module of the operators, imported at the first call; None without Triton or the kernels' package."""
    if not _OP:
        present = util.find_spec(PACKAGE.partition(".")[0]) is not None and util.find_spec("triton") is not None
        _OP.append(importlib.import_module(PACKAGE) if present else None)
    return _OP[0]


def operators(module: Any, hidden: Tensor, weights: Tensor) -> Any:
    """Return the module of the operators if they compute this layer; None otherwise.

    They run on CUDA devices, and have no gradient. hidden ``[T, d]``, weights ``[T, k]``.
    """
    if not (hidden.is_cuda or _INTERPRETED):
        return None
    if not _OP and torch.compiler.is_compiling():
        return None
    op = _OP[0] if _OP else load()
    if op is None:
        return None
    up, down = matrices(module)
    if torch.is_grad_enabled() and any(t.requires_grad for t in (hidden, weights, up, down)):
        return None
    if not (_is_plain(up) and _is_plain(down)) or op.unsupported(hidden, up, down) is not None:
        return None
    return op


def unsupported_reason(module: Any) -> str:
    """Return why the kernels do not compute a layer wherever it is; ``""`` if they do on a CUDA device."""
    op = load()
    if op is None:
        return "Triton is not installed"
    up, down = matrices(module)
    if not (_is_plain(up) and _is_plain(down)):
        return f"its matrices are a {type(up).__name__}"
    if up.device.type not in ("cuda", "cpu"):
        return f"its matrices are on {up.device.type}"
    return op.unsupported(up.new_empty(0), up, down) or ""


def matrices(module: Any) -> tuple[Tensor, Tensor]:
    """Return both stacked matrices of a module of experts."""
    return (module.gate_up_proj if module.has_gate else module.up_proj), module.down_proj


def _is_plain(weight: Tensor) -> bool:
    return type(weight) in (Tensor, nn.Parameter) and weight.dim() == 3


def product(op: Any, module: Any, hidden: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
    """Return the output of a layer by the operators ``op``; arguments as of ``product.expert_product``."""
    up, down = matrices(module)
    up_bias = down_bias = None
    if module.has_bias:
        up_bias = module.gate_up_proj_bias if module.has_gate else module.up_proj_bias
        down_bias = module.down_proj_bias
    given = op.Weights(up, down, up_bias, down_bias, bool(module.is_transposed))
    gate, normed = gates.gate_of(module), getattr(module, "has_post_expert_norm", False)
    if gate is not None and not normed:
        return op.mixture(hidden, experts, weights, given, op.Gate(*gate))
    top_k, count = experts.shape[1], down.shape[0]
    block = op.block_rows(experts.shape[0] * top_k, count)
    found = op.find_route(experts, count, block)
    first, second = given.matrices
    rows = op.rows_product(hidden.to(up.dtype), first, up_bias, found, top_k, False, block)
    rows = module._apply_gate(rows) if module.has_gate else module.act_fn(rows)
    rows = op.rows_product(rows.to(down.dtype), second, down_bias, found, 0, True, block)
    if normed:
        rows = module.post_expert_norm(rows)
    return op.combine(rows, experts, weights, count, hidden.dtype)
