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
# Whether the kernels compute layers whose gradients are needed, as they do faster than PyTorch's grouped product.
TRAINS = True
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def load() -> Any:
    """Return the module of the operators, imported at the first call; None without Triton or the kernels' package."""
    if not _OP:
        present = util.find_spec(PACKAGE.partition(".")[0]) is not None and util.find_spec("triton") is not None
        _OP.append(importlib.import_module(PACKAGE) if present else None)
    return _OP[0]


def operators(module: Any, hidden: Tensor, weights: Tensor, with_gradients: bool = False) -> Any:
    """Return the module of the operators if they compute this layer; None otherwise.

    They run on CUDA devices. Where a gradient is needed, ``product`` alone has one (``with_gradients``), if ``TRAINS``,
    for layers in 16 bits whose activation it knows, without a norm behind the experts. hidden ``[T, d]``,
    weights ``[T, k]``.
    """
    if not (hidden.is_cuda or _INTERPRETED):
        return None
    if not _OP and torch.compiler.is_compiling():
        return None
    op = _OP[0] if _OP else load()
    if op is None:
        return None
    up, down = matrices(module)
    recorded = is_recorded(hidden, weights, up, down, *_biases(module))
    if recorded and not (with_gradients and _trains(module, up)):
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


def is_recorded(*tensors: Tensor | None) -> bool:
    """Return True if the gradient of one of the tensors is recorded."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _trains(module: Any, up: Tensor) -> bool:
    """Return True if the operator with gradients is to compute a layer, and can; it has no TF32, which PyTorch has."""
    slow = up.is_cuda and up.dtype == torch.float32
    return TRAINS and not slow and gates.gate_of(module) is not None and not _is_normed(module)


def _biases(module: Any) -> tuple[Tensor, ...]:
    if not module.has_bias:
        return ()
    return (module.gate_up_proj_bias if module.has_gate else module.up_proj_bias), module.down_proj_bias


def _is_normed(module: Any) -> bool:
    return bool(getattr(module, "has_post_expert_norm", False))


def matrices(module: Any) -> tuple[Tensor, Tensor]:
    """Return both stacked matrices of a module of experts."""
    return (module.gate_up_proj if module.has_gate else module.up_proj), module.down_proj


def _is_plain(weight: Tensor) -> bool:
    return type(weight) in (Tensor, nn.Parameter) and weight.dim() == 3


def product(op: Any, module: Any, hidden: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
    """Return the output of a layer by the operators ``op``; arguments as of ``product.expert_product``."""
    given, gate = _weights(op, module), gates.gate_of(module)
    if gate is not None and not _is_normed(module):
        mixture = op.training_mixture if is_recorded(hidden, weights, *given[:4]) else op.mixture
        return mixture(hidden, experts, weights, given, op.Gate(*gate))
    top_k, count = experts.shape[1], module.down_proj.shape[0]
    block = op.block_rows(experts.shape[0] * top_k, count)
    rows = rows_of_experts(op, module, hidden, op.find_route(experts, count, block), block, top_k, by_pair=True)
    return op.combine(rows, experts, weights, count, hidden.dtype)


def rows_of_experts(
    op: Any, module: Any, x: Tensor, found: Any, block: int, top_k: int = 0, by_pair: bool = False
) -> Tensor:
    """Return the output of an expert for each row of a route, not yet weighted.

    Args:
        op: the operators.
        module: experts in the layout of transformers' interface.
        x: ``[T, d]``; with ``top_k`` 0, ``[T k, d]`` in the order of the route.
        found: the route, with blocks of ``block`` rows.
        block: rows of a block.
        top_k: k.
        by_pair: return the rows in the order of pairs, not in that of the route.

    Returns:
        ``[T k, d]``; rows that no expert computes are undefined.
    """
    given = _weights(op, module)
    first, second = given.matrices
    rows = op.rows_product(x.to(first.dtype), first, given.up_bias, found, top_k, False, block)
    rows = module._apply_gate(rows) if module.has_gate else module.act_fn(rows)
    rows = op.rows_product(rows.to(second.dtype), second, given.down_bias, found, 0, by_pair, block)
    return module.post_expert_norm(rows) if _is_normed(module) else rows


def _weights(op: Any, module: Any) -> Any:
    up, down = matrices(module)
    up_bias, down_bias = _biases(module) or (None, None)
    return op.Weights(up, down, up_bias, down_bias, bool(module.is_transposed))
