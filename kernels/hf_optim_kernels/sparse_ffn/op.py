"""The operator ``torch.ops.hf_optim.sparse_ffn`` (see ``naive``), for inference with few tokens.

Importing this module registers it. On a CUDA device it runs the Triton kernels, on a CPU ``cpu`` (or, under
``TRITON_INTERPRET=1``, the interpreted kernels). It has a fake implementation, and nothing waits for the host, so that
a call can be captured and compiled. It has no gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..common.support import can_run_triton
from . import cpu
from .naive import Layer, Rows


def unsupported(x: Tensor, layer: Layer) -> str | None:
    """Return why the kernels do not compute a layer for ``x``; None if they do."""
    from . import launch

    return launch.unsupported(x, layer)


def sparse_ffn(x: Tensor, layer: Layer) -> Tensor:
    """Return ``[T, out]`` for ``x`` ``[T, in]``: by the operator where a graph is made, else past the dispatcher."""
    if not torch.compiler.is_compiling():
        return _compute(x, layer)
    gate = layer.gate or (None, None, None)
    return torch.ops.hf_optim.sparse_ffn(
        x, layer.first, layer.second, layer.logit_bias, *layer.up, *gate, *layer.down[:2], layer.bias, layer.block,
        layer.act, layer.weighted,
    )  # fmt: skip


def _compute(x: Tensor, layer: Layer) -> Tensor:
    if can_run_triton(x) and unsupported(x, layer) is None:
        from . import launch

        return launch.sparse_ffn(x.contiguous(), layer)
    return cpu.sparse_ffn(x, layer)


@torch.library.custom_op("hf_optim::sparse_ffn", mutates_args=())
def _operator(
    x: Tensor, first: Tensor, second: Tensor, logit_bias: Tensor | None, up: Tensor, up_scale: Tensor | None,
    up_bias: Tensor | None, gate: Tensor | None, gate_scale: Tensor | None, gate_bias: Tensor | None, down: Tensor,
    down_scale: Tensor | None, bias: Tensor | None, block: int, act: str, weighted: bool,
) -> Tensor:  # fmt: skip
    """Return ``naive.sparse_ffn`` of a ``naive.Layer`` with these tensors."""
    gated = None if gate is None else Rows(gate, gate_scale, gate_bias)
    made = Layer(
        first,
        second,
        logit_bias,
        Rows(up, up_scale, up_bias),
        gated,
        Rows(down, down_scale),
        bias,
        block,
        act,
        weighted,
    )
    return _compute(x, made)


@_operator.register_fake
def _(x, first, second, logit_bias, up, up_scale, up_bias, gate, gate_scale, gate_bias, down, down_scale, *_) -> Tensor:
    width = down.shape[1] * (2 if down.dtype == torch.uint8 else 1)
    return x.new_empty((x.shape[0], width))
