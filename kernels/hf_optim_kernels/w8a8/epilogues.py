"""The operators that quantize rows: ``hf_optim::quantize_rows``, and quantizing epilogues of norms and activations.

Each returns ``(codes [..., in], scale [...] float32, zero [...] int32, row [..., in])``. ``zero`` is empty if the grid
is symmetric, ``row`` (the unquantized value, for other readers) if ``keep`` is False. ``scale_in``, ``zero_in`` [1] are
a static grid; None for one per row. Equations and source: ``naive``. They have no gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import naive
from .op import on_triton

Quantized = tuple[Tensor, Tensor, Tensor, Tensor]


def _plain(row: Tensor, float8: bool, symmetric: bool, scale: Tensor | None, zero: Tensor | None, keep: bool):
    if not row.shape[-1]:
        raise ValueError("rows without columns cannot be quantized")
    codes, made, zeros = naive.quantize(row, float8, symmetric, scale, zero)
    return codes, made.contiguous(), zeros, row.clone() if keep else row.new_empty(0)


def _fake(x: Tensor, float8: bool, symmetric: bool, keep: bool) -> Quantized:
    rows = x.shape[:-1]
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    return (
        x.new_empty(x.shape, dtype=naive.FLOAT8 if float8 else torch.int8),
        x.new_empty(rows, dtype=wide),
        x.new_empty((0,) if symmetric else rows, dtype=torch.int32),
        x.new_empty(x.shape if keep else (0,)),
    )


@torch.library.custom_op("hf_optim::quantize_rows", mutates_args=())
def quantize_rows(
    x: Tensor, float8: bool, symmetric: bool, scale_in: Tensor | None, zero_in: Tensor | None
) -> Quantized:
    """Quantize ``x`` [..., in] to int8 or float8_e4m3fn."""
    if on_triton(x, x.dtype):
        from . import quantize

        return quantize.quantize_rows(x, float8, symmetric, scale_in, zero_in)
    return _plain(x, float8, symmetric, scale_in, zero_in, False)


@quantize_rows.register_fake
def _(x, float8, symmetric, scale_in, zero_in) -> Quantized:
    return _fake(x, float8, symmetric, False)


@torch.library.custom_op("hf_optim::rms_norm_quantize", mutates_args=())
def rms_norm_quantize(
    x: Tensor, weight: Tensor, eps: float, float8: bool, symmetric: bool,
    scale_in: Tensor | None, zero_in: Tensor | None, keep: bool,
) -> Quantized:  # fmt: skip
    """Return the RMSNorm with ``weight`` [in] of ``x`` [..., in], quantized."""
    if on_triton(x, x.dtype):
        from . import quantize

        return quantize.quantize_rows(
            x, float8, symmetric, scale_in, zero_in, fused_op=quantize.RMS_NORM, second=weight, eps=eps, keep=keep
        )
    return _plain(naive.rms_norm(x, weight, eps), float8, symmetric, scale_in, zero_in, keep)


@rms_norm_quantize.register_fake
def _(x, weight, eps, float8, symmetric, scale_in, zero_in, keep) -> Quantized:
    return _fake(x, float8, symmetric, keep)


@torch.library.custom_op("hf_optim::layer_norm_quantize", mutates_args=())
def layer_norm_quantize(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, float8: bool, symmetric: bool,
    scale_in: Tensor | None, zero_in: Tensor | None, keep: bool,
) -> Quantized:  # fmt: skip
    """Return the LayerNorm with ``weight``, ``bias`` [in] of ``x`` [..., in], quantized."""
    if on_triton(x, x.dtype):
        from . import quantize

        return quantize.quantize_rows(
            x, float8, symmetric, scale_in, zero_in,
            fused_op=quantize.LAYER_NORM, second=weight, third=bias, eps=eps, keep=keep,
        )  # fmt: skip
    return _plain(naive.layer_norm(x, weight, bias, eps), float8, symmetric, scale_in, zero_in, keep)


@layer_norm_quantize.register_fake
def _(x, weight, bias, eps, float8, symmetric, scale_in, zero_in, keep) -> Quantized:
    return _fake(x, float8, symmetric, keep)


@torch.library.custom_op("hf_optim::gated_quantize", mutates_args=())
def gated_quantize(
    gate: Tensor, up: Tensor | None, activation: str, float8: bool, symmetric: bool,
    scale_in: Tensor | None, zero_in: Tensor | None, keep: bool,
) -> Quantized:  # fmt: skip
    """Return ``activation(gate) * up`` [..., in], quantized; without ``up``, the activation alone.

    ``gate`` and ``up`` may be views of one tensor. Raises ``ValueError`` if ``activation`` is not one of
    ``naive.ACTIVATIONS``.
    """
    naive.check_activation(activation)
    if on_triton(gate, gate.dtype):
        from . import quantize

        return quantize.quantize_rows(
            gate,
            float8,
            symmetric,
            scale_in,
            zero_in,
            fused_op=quantize.GATED,
            second=up,
            activation=activation,
            keep=keep,
        )
    return _plain(naive.gated(gate, up, activation), float8, symmetric, scale_in, zero_in, keep)


@gated_quantize.register_fake
def _(gate, up, activation, float8, symmetric, scale_in, zero_in, keep) -> Quantized:
    return _fake(gate, float8, symmetric, keep)
