"""The description of a linear layer's weight that kernels receive, and the form of the weight itself.

Kernels read the attributes of these classes and do not import this module.
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
        type: dtype of the codes.
        dynamic: one scale per token, computed on the fly; otherwise one calibrated scale for all tokens.
        symmetric: no zero point.
    """

    type: Literal["int8", "float8"]
    dynamic: bool
    symmetric: bool


@dataclass(frozen=True, eq=False)
class Codes:
    """The quantized weight: ``W[n, order[j]] = (codes[n, j] - zero[n, g]) * scale[n, g]``, ``g = j // group_size``.

    Attributes:
        codes: ``[out, in]``; uint8 in [0, 2^bits) for integers (a signed code c is stored as c + 2^(bits - 1)),
            float8_e4m3fn for floats, uint8 e2m1 patterns for 4-bit floats; the weight itself if it is not quantized.
        scale: ``[out, groups]``, in the dtype of the layer; float8_e4m3fn (NVFP4) or float8_e8m0fnu (MXFP4) for 4-bit
            floats; None for a weight that is not quantized.
        zero: uint8 ``[out, groups]`` in [0, 2^bits); None if it is 2^(bits - 1) everywhere (symmetric).
        order: int64 ``[in]``: the stored column j is column ``order[j]`` of the layer's input; None for the identity.
        input_scale: ``[1]``, for statically quantized inputs.
        input_zero: ``[1]``, for statically quantized asymmetric inputs, as a signed number.
        global_scale: float32 ``[out, 1]``, by which scales are divided (NVFP4); None for other formats.
    """

    codes: Tensor
    scale: Tensor | None
    zero: Tensor | None
    order: Tensor | None = None
    input_scale: Tensor | None = None
    input_zero: Tensor | None = None
    global_scale: Tensor | None = None


@dataclass(frozen=True, eq=False)
class QuantizedWeight:
    """The description of a layer's weight; its codes are computed on request.

    Attributes:
        name: qualified name of the layer.
        shape: ``[out, in]``.
        dtype: dtype of the layer's inputs, outputs and bias.
        device: device of the weight.
        kind: integers, floats of 8 bits, of 4 bits (NVFP4 in groups of 16, MXFP4 in groups of 32), or a weight that is
            not quantized (2:4 sparse).
        bits: bits of a code; of the dtype for ``"dense"``.
        group_size: columns that share a scale; ``in`` for one scale per row.
        symmetric: no zero points.
        ordered: the columns of a group are not adjacent; ``Codes.order`` is set.
        inputs: how inputs are quantized; None if they are not.
        sparse24: at least two of every four columns (as stored) are zero. Checked only if a kernel has ``sparse24``.
        bias: ``[out]``, or None.
        codes: computes the ``Codes``, which are not cached. Raises ``ValueError`` with the reason if it cannot.
        outliers: threshold for outlier decomposition: inputs are int8, one scale per token, except for columns with a
            larger magnitude, which keep their dtype (infinity: no column does). None: no decomposition. Set only for
            8-bit symmetric weights with one scale per row and ``inputs`` None; a kernel without outlier decomposition
            then computes with unquantized inputs.
    """

    name: str
    shape: tuple[int, int]
    dtype: torch.dtype
    device: torch.device
    kind: Literal["int", "float", "float4", "dense"]
    bits: int
    group_size: int
    symmetric: bool
    ordered: bool
    inputs: InputQuantization | None
    sparse24: bool
    bias: Tensor | None
    codes: Callable[[], Codes]
    outliers: float | None = None


@dataclass(frozen=True, eq=False)
class QuantizedExperts:
    """The description of the matrices of a module of experts; their codes are computed on request.

    Attributes:
        name: qualified name of the module.
        count: E, the number of experts.
        up, down: the first and the second matrix of any expert (all are alike), without ``codes``. The rows of a gate
            are the first half of ``up``.
        activation: ``"silu"`` for ``silu(gate) * up``; ``""`` for another function of the first product.
        codes: ``(side, expert) -> Codes`` of ``"up"`` or ``"down"``, as parts from top to bottom: the order of columns
            and the grid of inputs may differ between the gate and the other half. They are not cached. Raises
            ``ValueError`` with the reason if it cannot.
    """

    name: str
    count: int
    up: QuantizedWeight
    down: QuantizedWeight
    activation: str
    codes: Callable[[str, int], list[Codes]]
