"""The product of a mixture layer: each expert applied to its tokens, weighted and summed.

    y[t] = sum over j of  weights[t, j] * norm(down(act(up(x[t]))))  with the matrices of expert experts[t, j]

It computes what the eager forwards of transformers' expert classes compute, for every layout on the interface: with and
without a gate, with biases, transposed, interleaved, with a norm behind each expert. Pairs are sorted by expert, so
that each matrix is read once; pairs that no expert computes stand last and cost no product.

On a CUDA device kernels compute it (``kernels``), those with gradients, too, if ``kernels.TRAINS``. On a CPU, and
for gradients otherwise, PyTorch's grouped product does.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..topology.experts import is_packed_experts
from . import kernels
from .opaque_product import opaque_product

FUSED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Types that PyTorch's grouped product takes."""
ALIGNMENT = 16
"""Bytes that the rows of its matrices are a multiple of."""


def expert_product(module: nn.Module, hidden: Tensor, experts: Tensor, weights: Tensor, complete: bool) -> Tensor:
    """Return the output of a mixture layer, ``[T, d]`` of the dtype of ``hidden``.

    Args:
        module: experts in the layout of transformers' experts interface, or packed ones.
        hidden: ``[T, d]``.
        experts: int64 ``[T, k]``; numbers from the module's number of experts on stand for "computed by none".
        weights: ``[T, k]``.
        complete: every pair is computed.
    """
    own: Any = module
    if is_packed_experts(module):
        return own.mixture_product(hidden, experts, weights)
    op = kernels.operators(module, hidden, weights, with_gradients=True)
    if op is not None:
        return kernels.product(op, module, hidden, experts, weights)
    tokens, top_k = experts.shape
    count = own.down_proj.shape[0]
    ordered, order = torch.sort(experts.reshape(-1))
    ends = torch.searchsorted(ordered, torch.arange(count, device=ordered.device), right=True).to(torch.int32)
    if not complete and ordered.device.type == "cpu" and not torch.compiler.is_compiling() and int(ends[-1]):
        # On a CPU the number of computed pairs is known at no cost, so the others need no rows.
        ordered, order, complete = ordered[: ends[-1]], order[: ends[-1]], True
    nobody = None if complete else (ordered >= count).unsqueeze(-1)
    numbers = ordered if complete else ordered.clamp(max=count - 1)
    rows = hidden[order // top_k]
    if nobody is not None:
        # The product leaves rows behind the last expert undefined, in its output and in the gradient of its input.
        rows = rows.masked_fill(nobody, 0)
    up = own.gate_up_proj if own.has_gate else own.up_proj
    up_bias = (own.gate_up_proj_bias if own.has_gate else own.up_proj_bias) if own.has_bias else None
    inner = _defined(_linear(rows, up, ends, numbers, up_bias, own.is_transposed), nobody)
    inner = own._apply_gate(inner) if own.has_gate else own.act_fn(inner)
    down_bias = own.down_proj_bias if own.has_bias else None
    out = _defined(_linear(inner, own.down_proj, ends, numbers, down_bias, own.is_transposed), nobody)
    if getattr(own, "has_post_expert_norm", False):
        out = own.post_expert_norm(out)
    out = out * weights.reshape(-1)[order].unsqueeze(-1)
    if len(order) < tokens * top_k:
        out = out.new_zeros(tokens * top_k, out.shape[1]).index_copy(0, order, out)
    else:
        out = out[torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))]
    return out.view(tokens, top_k, out.shape[1]).sum(dim=1).to(hidden.dtype)


def _defined(rows: Tensor, nobody: Tensor | None) -> Tensor:
    return rows if nobody is None else rows.masked_fill(nobody, 0)


def _linear(
    rows: Tensor, weight: Tensor, ends: Tensor, numbers: Tensor, bias: Tensor | None, transposed: bool
) -> Tensor:
    out = grouped_product(rows, weight if transposed else weight.transpose(1, 2), ends)
    return out if bias is None else out + bias[numbers]


def grouped_product(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Return each group of rows times its matrix; rows behind the last group are undefined.

    Args:
        rows: ``[S, in]``, sorted by group.
        weight: ``[E, in, out]``.
        ends: int32 ``[E]``: where each group ends.

    Returns:
        ``[S, out]``, of the dtype of ``weight``.
    """
    rows = rows.to(weight.dtype)
    if weight.device.type == "cuda" and _has_grouped_product(weight) and not _has_fitting_strides(weight):
        return padded_product(rows, weight, ends)
    if torch.compiler.is_compiling() and not _is_traced(weight, rows):
        return opaque_product(rows, weight, ends)
    if is_fused(weight, rows):
        return F.grouped_mm(rows, weight, offs=ends)
    stops = ends.tolist()
    parts = [rows[begin:end] @ weight[i] for i, (begin, end) in enumerate(zip([0, *stops], stops, strict=False))]
    return torch.cat([*parts, rows.new_zeros(len(rows) - stops[-1], weight.shape[2])])


def _is_traced(weight: Tensor, rows: Tensor) -> bool:
    """Return True if ``torch.compile`` traces PyTorch's grouped product of these tensors, which it does in bfloat16.

    ``opaque_product`` is opaque to it, but asks the host for the groups, so it is not for the steps that are captured
    on a device.
    """
    on_cpu = weight.device.type == "cpu"
    grad = torch.is_grad_enabled() and (weight.requires_grad or rows.requires_grad)
    return is_fused(weight, rows) and (weight.dtype == torch.bfloat16 or not (on_cpu or grad))


def is_fused(weight: Tensor, rows: Tensor) -> bool:
    """Return True if PyTorch's grouped product takes these tensors: dtype, device, and strides of 16 bytes."""
    return _has_grouped_product(weight) and _has_fitting_strides(weight)


def _has_grouped_product(weight: Tensor) -> bool:
    if not hasattr(F, "grouped_mm") or weight.dtype not in FUSED_DTYPES:
        return False
    if weight.device.type == "cuda":
        return torch.cuda.get_device_capability(weight.device) >= (8, 0)
    return weight.device.type == "cpu"


def _has_fitting_strides(weight: Tensor) -> bool:
    return all(size * weight.element_size() % ALIGNMENT == 0 for size in weight.shape[1:])


def padded_product(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Return PyTorch's grouped product of matrices of any size, padded with zeros; see ``grouped_product``.

    It needs no groups on the host, so that it can be captured on a device; but it copies the matrices.
    """
    unit = ALIGNMENT // weight.element_size()
    columns, out = weight.shape[1:]
    wide = F.pad(weight, (0, -out % unit, 0, -columns % unit))
    return F.grouped_mm(F.pad(rows, (0, -columns % unit)), wide, offs=ends)[:, :out]
