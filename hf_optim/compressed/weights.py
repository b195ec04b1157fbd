"""What the host tells a kernel about the weight of a linear layer, and in which words the weight itself is told.

Kernels read these by their attributes and import nothing from here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class InputQuantization:
    """How the inputs of a layer are quantized.

    Attributes:
        type: of the codes.
        dynamic: one scale per token, made on the fly; else one calibrated scale for all.
        symmetric: no zero point.
    """

    type: Literal["int8", "float8"]
    dynamic: bool
    symmetric: bool


@dataclass(frozen=True, eq=False)
class Codes:
    """The values of a weight: ``W[n, order[j]] = (codes[n, j] - zero[n, g]) * scale[n, g]``, ``g = j // group_size``.

    Attributes:
        codes: ``[out, in]``; uint8 in [0, 2^bits) for integers (a signed code c is stored as c + 2^(bits - 1)),
            float8_e4m3fn for floats, and the weight itself where nothing is quantized.
        scale: ``[out, groups]``, in the dtype of the layer; None for a weight that is not quantized.
        zero: uint8 ``[out, groups]`` in [0, 2^bits); None where it is 2^(bits - 1) everywhere (symmetric).
        order: int64 ``[in]``: the stored column j is column ``order[j]`` of the layer's input; None for the identity.
        input_scale: ``[1]``, of statically quantized inputs.
        input_zero: ``[1]``, of statically quantized asymmetric inputs, as a signed number.
    """

    codes: Tensor
    scale: Tensor | None
    zero: Tensor | None
    order: Tensor | None = None
    input_scale: Tensor | None = None
    input_zero: Tensor | None = None


@dataclass(frozen=True, eq=False)
class QuantizedWeight:
    """The weight of one layer, described; its codes are made when asked for.

    Attributes:
        name: qualified name of the layer.
        shape: ``[out, in]``.
        dtype: of the layer's inputs, outputs and bias.
        device: where the weight is.
        kind: integers, floats, or a weight that is not quantized (2:4 sparse).
        bits: of a code; of the dtype for ``"dense"``.
        group_size: columns that share a scale; ``in`` for one scale a row.
        symmetric: no zero points.
        ordered: the groups are of scattered columns, ``Codes.order`` is set.
        inputs: how inputs are quantized; None: they are not.
        sparse24: of every four columns (as stored), two at least are zero. Looked for only where a kernel asks for it.
        bias: ``[out]``, or None.
        codes: makes the ``Codes``, which nobody keeps. Raises ``ValueError`` with the reason where it cannot.
        outliers: the layer is meant to be computed with int8 inputs, one scale per token, but for the columns that have
            a larger magnitude than this, which keep their own type (infinity: none does). None: it is not. Only for
            8-bit symmetric weights with one scale a row, and ``inputs`` None, which is what a kernel does that knows
            nothing of this.
    """

    name: str
    shape: tuple[int, int]
    dtype: torch.dtype
    device: torch.device
    kind: Literal["int", "float", "dense"]
    bits: int
    group_size: int
    symmetric: bool
    ordered: bool
    inputs: InputQuantization | None
    sparse24: bool
    bias: Tensor | None
    codes: Callable[[], Codes]
    outliers: float | None = None
