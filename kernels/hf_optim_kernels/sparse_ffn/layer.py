"""What the modules of a checkpoint call where this package is installed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import op
from .naive import Layer, Rows

NAMES = {
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
}
"""Of transformers' activations -> of the kernels."""


def compute(ffn: Any, x: Tensor) -> Tensor | None:
    """Return the output ``[T, out]`` of a module for ``x`` ``[T, in]``, without a gradient; None for what is not read.

    Args:
        ffn: with the attributes of ``_sparse_ffn_modules.SparseFFN``.
        x: on the device of the module.
    """
    layer = layer_of(ffn)
    if layer is None or op.unsupported(x, layer) is not None:
        return None
    return op.sparse_ffn(x, layer)


def layer_of(ffn: Any) -> Layer | None:
    """Return the tensors of a module; None for an activation that the kernels do not compute."""
    own = ffn.entry
    act = NAMES.get(own["act"])
    if act is None or own["block"] < 2:
        return None
    gate = _rows(ffn, "gate", ffn.gate_bias) if own["gated"] else None
    return Layer(
        ffn.controller_in, ffn.controller_out, ffn.controller_bias, _rows(ffn, "up", ffn.up_bias), gate,
        _rows(ffn, "down", None), ffn.bias, own["block"], act, own["controller_output"],
    )  # fmt: skip


def _rows(ffn: Any, name: str, bias: torch.Tensor | None) -> Rows:
    if ffn.entry["bits"] == 16:
        return Rows(getattr(ffn, name), None, bias)
    return Rows(getattr(ffn, f"{name}_codes"), getattr(ffn, f"{name}_scale"), bias)
