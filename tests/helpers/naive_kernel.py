"""A naive kernel for the tests, which supports every weight. It holds codes and no dense weight."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import nn

from hf_optim import Kernel

PARTS = ("codes", "scale", "zero", "order", "input_scale", "input_zero")


class PackedWeight(nn.Module):
    """Decodes its codes in float32 at every call, and rounds its inputs according to the scheme."""

    def __init__(self, weight):
        super().__init__()
        found = weight.codes()
        for name in PARTS:
            value = getattr(found, name)
            self.register_buffer(f"own_{name}", None if value is None else value.detach().clone())
        self.register_buffer("bias", weight.bias)
        self.dtype, self.bits, self.shape, self.inputs = weight.dtype, weight.bits, weight.shape, weight.inputs
        self.label = f"naive {weight.kind}{weight.bits}"
        self.calls = 0

    def codes(self):
        return SimpleNamespace(**{name: getattr(self, f"own_{name}") for name in PARTS})

    def accepts(self, x):
        return x.dtype == self.dtype and x.device == self.own_codes.device

    def forward(self, x):
        self.calls += 1
        if self.own_order is not None:
            x = x[..., self.own_order]
        y = self.rounded(x) @ self.decoded().T
        return y if self.bias is None else y + self.bias

    def decoded(self):
        codes, scale = self.own_codes, self.own_scale
        if scale is None:
            return codes.to(self.dtype)
        values = codes.float().view(*scale.shape, -1)
        if codes.dtype == torch.uint8:
            values = values - (2.0 ** (self.bits - 1) if self.own_zero is None else self.own_zero.float()[..., None])
        return (values * scale.float()[..., None]).view(self.shape).to(self.dtype)

    def rounded(self, x):
        if self.inputs is None:
            return x
        if self.inputs.type == "float8":
            low, high, grid = -448.0, 448.0, lambda v: v.to(torch.float8_e4m3fn).to(v.dtype)
        else:
            low, high, grid = -128.0, 127.0, torch.round
        if not self.inputs.dynamic:
            scale, zero = self.own_input_scale, 0.0 if self.own_input_zero is None else self.own_input_zero
        elif self.inputs.symmetric:
            scale, zero = x.abs().amax(-1, keepdim=True) / ((high - low) / 2), 0.0
        else:
            top, bottom = x.amax(-1, keepdim=True).clamp(min=0), x.amin(-1, keepdim=True).clamp(max=0)
            scale = (top - bottom) / (high - low)
            zero = torch.round(low - bottom / scale)
        codes = grid((x / scale + zero).clamp(low, high))
        return x + ((codes - zero) * scale - x).detach()


def supports_all(weight):
    return None


NAIVE = Kernel("naive", supports=supports_all, prepack=PackedWeight)
NAIVE24 = Kernel("naive24", supports=supports_all, prepack=PackedWeight, sparse24=True)
