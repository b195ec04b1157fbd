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


class TrigSums(NamedTuple):
    """What is kept of the tokens of each row.

    Attributes:
        sums: ``[R, G, 2 M, D]`` of products of features and values, float32 or float64.
        features: ``[R, G, 2 M]``: sums of features.
        total: float64 ``[R, G]``: the weight of the tokens, w.
    """

    sums: Tensor
    features: Tensor
    total: Tensor


LEAST_WEIGHT = 1e-30  # of tokens: a row without any is divided by what is above zero


def trig_by_kernel(
    query: Tensor, key: Tensor, value: Tensor, weight: Tensor, scale: Tensor, causal: bool, floor: float,
    least_norm: float, log_gate: Tensor | None, valid: Tensor | None, totals: tuple[Tensor, Tensor],
    state: TrigSums | None, keeps: bool,
) -> tuple[Tensor, TrigSums | None] | None:  # fmt: skip
    """Return what ``rfa_attention`` returns, of the kernel; None if it does not compute these tensors.

    It has no gradient of W. A single token brings the given sums up to date in place. ``totals`` are those of
    ``weights_of_tokens``; ``least_norm`` is added to norms.
    """
    module = _linear_kernel_for(query, key, value, weight, keeps or state is not None)
    if module is None:
        return None
    settings = module.Settings("trig", 1.0, causal, floor, least_norm)
    shape = (*key.shape[:2], query.shape[2])
    amounts = totals[0].to(torch.promote_types(query.dtype, torch.float32)).clamp_min(LEAST_WEIGHT).expand(shape)
    before = None
    if state is not None:
        before = module.State(state.sums, state.features, state.sums.new_zeros(shape[:2]))
    if before is not None and query.shape[2] == 1 and valid is None and not torch.is_grad_enabled():
        rows = weight * scale[:, None]
        return module.step(query, key, value, rows, settings, before, log_gate, amounts), TrigSums(
            before.state, before.sums, totals[1]
        )
    out, after = module.linear_attention(
        query, key, value, weight, settings, valid, log_gate, before, keeps, amounts, scale
    )
    if valid is not None:
        out = out.masked_fill(~valid[:, None, :, None], 0)
    return out, None if after is None else TrigSums(after.state, after.sums, totals[1])
