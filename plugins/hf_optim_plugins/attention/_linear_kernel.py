"""The door to the kernel of linear attention: used where it is installed, and computes on the device of the tensors.

This file is stored beside checkpoints, so it imports only torch.
"""

from __future__ import annotations

import importlib
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

LINEAR_KERNEL = "hf_optim_kernels.linear_attention.op"  # where it is installed
LINEAR_KERNEL_DEVICES = ("cuda",)


class PositiveSums(NamedTuple):
    """What is kept of the tokens of each row, relative to ``exp(reference)``.

    Attributes:
        state: ``[R, G, M, D]``: sums of products of features and values, float32 or float64.
        sums: ``[R, G, M]`` of features.
        reference: ``[R, G]``; -inf before the first token.
    """

    state: Tensor
    sums: Tensor
    reference: Tensor


@lru_cache(maxsize=1)
def _linear_kernel() -> Any:
    try:
        return importlib.import_module(LINEAR_KERNEL)
    except ImportError:
        return None


def _linear_kernel_for(query: Tensor, key: Tensor, value: Tensor, weight: Tensor, carried: bool) -> Any:
    """Return the module of the kernel; None if it is not installed or does not compute these tensors.

    ``carried``: there is a state before or after these tokens, which has no gradient in the kernel.
    """
    if query.device.type not in LINEAR_KERNEL_DEVICES or (weight.requires_grad and torch.is_grad_enabled()):
        return None
    if carried and torch.is_grad_enabled() and any(part.requires_grad for part in (query, key, value)):
        return None
    module = _linear_kernel()
    return None if module is None or module.unsupported(query, key, value, weight) is not None else module


def positive_by_kernel(
    query: Tensor, key: Tensor, value: Tensor, weight: Tensor, scale: float, causal: bool, valid: Tensor | None,
    state: PositiveSums | None, keeps: bool,
) -> tuple[Tensor, PositiveSums | None] | None:  # fmt: skip
    """Return what ``performer_attention`` returns, of the kernel; None if it does not compute these tensors.

    It has no gradient of W. A single token brings the given state up to date in place.
    """
    module = _linear_kernel_for(query, key, value, weight, keeps or state is not None)
    if module is None:
        return None
    settings = module.Settings("positive", scale, causal)
    before = None if state is None else module.State(*state)
    if state is not None and query.shape[2] == 1 and valid is None and not torch.is_grad_enabled():
        return module.step(query, key, value, weight, settings, before), state
    out, after = module.linear_attention(query, key, value, weight, settings, valid, None, before, keeps)
    if valid is not None:
        out = out.masked_fill(~valid[:, None, :, None], 0)
    return out, PositiveSums(*after) if after is not None else None


# Above any denominator: the kernel then divides by this constant, and what comes back are sums, which ``rfa_attention``
# divides by its own rule. A power of two divides exactly.
NEVER_REACHED = 2.0**32


def trig_sums_by_kernel(
    query: Tensor, key: Tensor, value: Tensor, weight: Tensor, causal: bool, log_gate: Tensor | None,
    valid: Tensor | None, sums: Tensor | None, keeps: bool,
) -> tuple[Tensor, Tensor | None] | None:  # fmt: skip
    """Return ``phi(q_t) S_t`` and the sums after the last token, as ``causal_sums`` does; None if no kernel does.

    Args:
        query, key: what is multiplied with W, in the dtype of the model.
        value: with a last column of ones.
        weight: W, without a gradient.
        causal, log_gate, valid: as in ``rfa_attention``.
        sums: ``[R, G, 2 M, D + 1]`` of the tokens before, which a step brings up to date in place.
        keeps: the sums after these tokens are for later ones.
    """
    if query.dtype == torch.float16:  # a quotient by so large a constant would vanish
        return None
    module = _linear_kernel_for(query, key, value, weight, keeps or sums is not None)
    if module is None:
        return None
    settings = module.Settings("trig", 1.0, causal, NEVER_REACHED)
    before = None
    if sums is not None:
        before = module.State(sums, sums[..., -1].contiguous(), sums.new_zeros(sums.shape[:2]))
    if before is not None and query.shape[2] == 1 and valid is None and not torch.is_grad_enabled():
        return module.step(query, key, value, weight, settings, before, log_gate) * NEVER_REACHED, sums
    out, after = module.linear_attention(query, key, value, weight, settings, valid, log_gate, before, True)
    return out * NEVER_REACHED, after.state
