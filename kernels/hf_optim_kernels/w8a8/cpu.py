"""Linear layers with int8 inputs on a CPU: PyTorch's own integer product, ``aten::_int_mm``.

It multiplies int8 [rows, in] by int8 [in, out] with exact int32 sums, on the weight as stored, one byte per code. The
rest is written in few operations, because for a row or two an operation costs as much as its call. Inputs are quantized
as in ``naive.quantize``, as in compressed-tensors' own forward, to the same codes.

Sums are exact here and rounded there, so outputs of one layer agree up to float32 rounding. Over a whole model they do
not: rounding decides the codes of values near a tie in the next layer, each such code changes the layer after it, and
after a few layers any two correct orders of summation (stock's own with another number of threads, or with and without
a cache) have logits that differ by about the error of quantization itself.

Measured with torch 2.13, one thread of a 2.8 GHz Ice Lake (AVX512-VNNI), the best of several, in microseconds: the
product alone / dense float32 for 1, 8, 32, 256 and 1024 rows of 256 x 256 weights 3 / 11, 14 / 23, 21 / 56, 99 / 337,
238 / 939. Quantizing one row of 256 takes about 18, scales and bias 5: in total, small layers are slower with one row
and faster from some tens. ``onednn::qlinear_pointwise`` takes 43 to 382 for the same products with uint8 inputs, and
up to seconds with int8.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..common.codes import Codes
from ..common.cpu_linear import CpuLinear, cat_optional, unsupported_by_int_mm

LEVELS = 127.5


def unsupported_reason(weight: Any) -> str | None:
    """Return why a ``QuantizedWeight`` (of ``hf_optim.compressed.weights``) cannot run here; None if it can.

    No size is too small: the alternative of the layer is to quantize its input and weight in float at every call.
    """
    columns = weight.shape[1]
    if weight.kind != "int" or weight.bits > 8:
        return f"{weight.bits}-bit {weight.kind} codes: PyTorch's integer product has int8 codes"
    if weight.inputs is None or weight.inputs.type != "int8":
        return "PyTorch's integer product has int8 inputs"
    if weight.group_size < columns:
        return f"group size {weight.group_size}: PyTorch's integer product has one scale per row"
    if weight.ordered:
        return "its columns are reordered, which PyTorch's integer product does not support"
    return unsupported_by_int_mm(weight.dtype, columns)


def prepack(weight: Any) -> QuantizedLinear:
    """Return the packed form of a weight for which ``unsupported_reason`` is None."""
    return QuantizedLinear.from_codes(weight.codes(), weight.bits, weight.inputs, weight.dtype, weight.bias)


class QuantizedLinear(CpuLinear):
    """``quantized(x) W^T + bias`` on ``aten::_int_mm``.

    With input codes ``a``, their scale ``s`` and zero point ``z`` per row ``m``, and weight codes ``w``, scale ``t``
    and zero point ``u`` per row ``n``::

        y[m, n] = (sum_k a w - z[m] sum_k w - u[n] (sum_k a - z[m] in)) s[m] t[n] + bias[n]

    The bracket is exact, in int32. The gradient with respect to ``x`` is that of ``x W^T`` (straight through the
    rounding of the input).

    Attributes:
        packed: int8 [out, in], codes minus 2^(bits - 1).
        scale: [out, 1], as in the checkpoint; factor: the same as float32 [out].
        zero: uint8 [out, 1], and shift: int32 [out], zero minus 2^(bits - 1); None for symmetric weights.
        sums: int32 [out], of each row of ``packed``; None for symmetric inputs.
        input_scale, input_zero: [1], of static inputs; None for dynamic ones.
    """

    scale: Tensor
    factor: Tensor
    zero: Tensor | None
    shift: Tensor | None
    sums: Tensor | None
    input_scale: Tensor | None
    input_zero: Tensor | None
    bias: Tensor | None

    def __init__(
        self,
        packed: Tensor,
        scale: Tensor,
        zero: Tensor | None,
        input_scale: Tensor | None,
        input_zero: Tensor | None,
        bias: Tensor | None,
        *,
        bits: int,
        symmetric: bool,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.bits, self.symmetric, self.dtype = bits, symmetric, dtype
        self.label = f"w8a8 int8 product of PyTorch, {'dynamic' if input_scale is None else 'static'} inputs"
        self.register_buffer("packed", packed)
        self.register_buffer("scale", scale)
        self.register_buffer("factor", scale.flatten().float())
        self.register_buffer("zero", zero)
        self.register_buffer("shift", None if zero is None else zero.flatten().int() - 2 ** (bits - 1))
        self.register_buffer("sums", None if symmetric else packed.sum(1, dtype=torch.int32))
        self.register_buffer("input_scale", input_scale)
        self.register_buffer("input_zero", input_zero)
        self.register_buffer("bias", bias)

    @classmethod
    def from_codes(cls, found: Any, bits: int, inputs: Any, dtype: torch.dtype, bias: Tensor | None) -> QuantizedLinear:
        """Pack ``Codes`` with one scale per row. ``inputs`` is an ``Inputs`` (see ``hf_optim.compressed.weights``)."""
        return cls(
            (found.codes.to(torch.int16) - 2 ** (bits - 1)).to(torch.int8).contiguous(),
            found.scale,
            found.zero,
            None if inputs.dynamic else found.input_scale.reshape(1),
            None if inputs.dynamic or found.input_zero is None else found.input_zero.reshape(1),
            None if bias is None else bias.detach(),
            bits=bits,
            symmetric=bool(inputs.symmetric) or (not inputs.dynamic and found.input_zero is None),
            dtype=dtype,
        )

    def codes(self) -> Codes:
        """Return codes, scales and zero points, bitwise identical to those it was packed from."""
        codes = (self.packed.to(torch.int16) + 2 ** (self.bits - 1)).to(torch.uint8)
        return Codes(codes, self.scale, self.zero, None, self.input_scale, self.input_zero)

    def decoded(self, dtype: torch.dtype) -> Tensor:
        """See ``CpuLinear``."""
        steps = self.packed.float() if self.shift is None else self.packed.float() - self.shift[:, None]
        return (steps * self.factor[:, None]).to(dtype)

    def product(self, x: Tensor) -> Tensor:
        """See ``CpuLinear``."""
        # The look-up of eight buffers by nn.Module takes as long as the product of a small layer.
        held = self._buffers
        packed, factor, bias, sums, shift = (held[n] for n in ("packed", "factor", "bias", "sums", "shift"))
        flat = x.reshape(-1, x.shape[-1])
        codes, row, zero = self._quantize(flat, held["input_scale"])
        total = torch._int_mm(codes, packed.t())  # type: ignore[union-attr]
        if zero is not None and sums is not None:
            total.sub_(zero * sums)
        if shift is not None:
            ones = codes.sum(-1, keepdim=True, dtype=torch.int32)
            total.sub_((ones if zero is None else ones - zero * flat.shape[1]) * shift)
        y = total * row
        y = y.mul_(factor) if bias is None else torch.addcmul(bias.float(), y, factor)  # type: ignore[arg-type]
        return y.to(x.dtype).view(*x.shape[:-1], y.shape[-1])

    def _quantize(self, x: Tensor, given: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return int8 codes, float32 scales [rows, 1] and zero points int32 ([rows, 1] or [1], or None) of [rows, in].

        ``given`` is the scale of static inputs. Rows of zeros have scale 0, and meaningless codes and zero points: the
        product is 0.
        """
        if given is not None:
            return self._static(x, given)
        if self.symmetric:
            scale = _largest(x).div_(LEVELS)
            return (x / scale).round_().clamp_max_(127).to(torch.int8), scale.float(), None
        low, high = x.amin(-1, keepdim=True).clamp_max_(0), x.amax(-1, keepdim=True).clamp_min_(0)
        scale = (high - low).div_(255)
        zero = low.div_(scale).neg_().sub_(128).nan_to_num_(0.0).clamp_(-128, 127).round_()
        codes = (x / scale).add_(zero).clamp_(-128, 127).round_().to(torch.int8)
        return codes, scale.float(), zero.int()

    def _static(self, x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        steps = x / scale
        steps = steps if self.input_zero is None else steps.add_(self.input_zero)
        codes = steps.clamp_(-128, 127).round_().to(torch.int8)
        # Integers have no NaN: a row that is not finite gets a scale that is not.
        row = x.sum(-1, keepdim=True, dtype=torch.float32).mul_(0).add_(scale)
        return codes, row, None if self.input_zero is None else self.input_zero.int()


def _largest(x: Tensor) -> Tensor:
    """Return the largest magnitude of each row, [rows, 1]. For one row the norm is one call and not slower."""
    if x.shape[0] == 1:
        return torch.linalg.vector_norm(x, float("inf"), -1, keepdim=True)
    return x.abs().amax(-1, keepdim=True)


def join(packed_weights: list[QuantizedLinear]) -> QuantizedLinear | None:
    """Concatenate packed weights along the output; return None if they differ in more than their rows."""
    first = packed_weights[0]
    if any(_kind(o) != _kind(first) for o in packed_weights):
        return None
    for name in ("input_scale", "input_zero"):
        own = getattr(first, name)
        if own is not None and any(not torch.equal(getattr(o, name), own) for o in packed_weights):
            return None
    return QuantizedLinear(
        torch.cat([o.packed for o in packed_weights]),
        torch.cat([o.scale for o in packed_weights]),
        cat_optional(packed_weights, "zero"),
        first.input_scale,
        first.input_zero,
        cat_optional(packed_weights, "bias"),
        bits=first.bits,
        symmetric=first.symmetric,
        dtype=first.dtype,
    )


def _kind(packed_weight: QuantizedLinear) -> tuple[Any, ...]:
    absent = tuple(getattr(packed_weight, name) is None for name in ("zero", "bias", "input_scale", "input_zero"))
    numbers = packed_weight.bits, packed_weight.symmetric, packed_weight.packed.shape[1]
    return *numbers, packed_weight.dtype, packed_weight.scale.dtype, absent
