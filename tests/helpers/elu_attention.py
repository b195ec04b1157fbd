"""A small attention with a learned part and a state: the features elu(s x) + 1, summed. It shows the frame at work."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from hf_optim.toolkit.attention import LearnedAttachment, LearnedConfig, TensorState, whole


@dataclass(frozen=True)
class EluSettings:
    width: int


class EluPart(nn.Module):
    """The scale of each channel."""

    def __init__(self, width):
        super().__init__()
        self.scale = nn.Parameter(torch.empty(width))
        self.register_buffer("shift", torch.empty(1))
        self.reset_parameters()

    def reset_parameters(self):
        nn.init.ones_(self.scale)
        nn.init.ones_(self.shift)


class EluAttachment(LearnedAttachment):
    """Sums of features, in prefix order in causal models."""

    title = "elu attention"

    def read(self, settings):
        return EluSettings(whole(settings, "head_width", 1, 4096))

    def build_part(self, settings, layer):
        return EluPart(self.read(settings).width)

    def compute_call(self, part, call):
        q, k = (nn.functional.elu(x * part.scale) + part.shift for x in (call.query, call.of_heads(call.key)))
        v = call.of_heads(call.value)
        if call.valid is not None:
            k = k * call.valid[:, None, :, None]
        pairs = k[..., :, None] * v[..., None, :]
        sums, norms = (x.cumsum(2) if call.causal else x.sum(2, keepdim=True) for x in (pairs, k))
        if call.state is not None:
            sums, norms = sums + call.state["sums"][:, :, None], norms + call.state["norms"][:, :, None]
        out = (q[..., None, :] @ sums)[..., 0, :] / (q * norms).sum(-1, keepdim=True).clamp_min(1e-6)
        state = TensorState(sums=sums[:, :, -1], norms=norms[:, :, -1]) if call.keeps else None
        return out, state


ELU = EluAttachment("hf_optim_elu")


class EluConfig(LearnedConfig):
    """Base of the configuration classes."""

    attachment = ELU
