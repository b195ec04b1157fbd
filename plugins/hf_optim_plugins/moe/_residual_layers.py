"""Feed-forward layers with a dense part for every token and one expert that a router chooses.

    y = c0(x) FFN(x) + c1(x) g_e(x) FFN_e(x),     e = argmax p(x),  p = softmax(W_r x),  (c0, c1) = softmax(W_c x + b_c)

Without a residual part, ``y = g_e(x) FFN_e(x)``. The gate ``g_e`` is the probability ``p_e``, or 1 with the gradient of
``log p_e``.

This file is stored beside checkpoints, so it imports only torch and transformers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.activations import ACT2FN

from ._inlet_layers import FeedForwardModules, StackedExperts, WholeLayer


class DensePart(nn.Module):
    """The feed-forward layer that every token computes.

    Attributes:
        up: to the neurons, or to gate and neurons, the gate first.
        down: from the neurons.
    """

    def __init__(self, sizes: tuple[int, int, int], entry: dict[str, Any], about: dict[str, Any]) -> None:
        super().__init__()
        neurons, width, out = sizes
        self.gated = entry["gated"]
        self.up = nn.Linear(width, neurons * (2 if self.gated else 1), bias=entry["bias"], **about)
        self.down = nn.Linear(neurons, out, bias=entry["bias"], **about)
        self.act_fn = ACT2FN[entry["act"]]

    def forward(self, x: Tensor) -> Tensor:
        inner = self.up(x)
        if not self.gated:
            return self.down(self.act_fn(inner))
        gate, up = inner.chunk(2, dim=-1)
        return self.down(self.act_fn(gate) * up)


class ResidualMoE(WholeLayer):
    """A feed-forward layer with one expert per token, and a dense part beside it.

    Attributes:
        router: ``[E, in]``.
        coefficient, coefficient_bias: ``[2, in]`` and ``[2]``: of the dense part and of the expert. None without one.
        mlp: the dense part, or None.
        routed: in training the probabilities ``[T, E]`` and choices int64 ``[T, 1]`` of the last forward; else None.
    """

    coefficient: Tensor
    coefficient_bias: Tensor

    def __init__(self, config: Any, width: int, out: int, entry: dict[str, Any], about: dict[str, Any]) -> None:
        super().__init__()
        experts, neurons = entry["experts"], entry["neurons"]
        self.gate = entry["gate"]
        self.router = nn.Parameter(torch.empty(experts, width, **about))
        self.experts = StackedExperts.build(config, (experts, neurons, width, out), entry, about)
        self.mlp = DensePart((neurons, width, out), entry, about) if entry["residual"] else None
        for name, shape in (("coefficient", (2, width)), ("coefficient_bias", (2,))):
            made = nn.Parameter(torch.empty(shape, **about)) if entry["residual"] else None
            self.register_parameter(name, made)
        self.routed: tuple[Tensor, Tensor] | None = None

    def compute(self, tokens: Tensor) -> Tensor:
        probabilities = F.linear(tokens, self.router).float().softmax(-1)
        value, chosen = probabilities.max(-1, keepdim=True)
        self.routed = (probabilities, chosen) if self.training and torch.is_grad_enabled() else None
        weight = value if self.gate == "probability" else value / value.detach()
        out = self.experts(tokens, chosen, weight.to(tokens.dtype))
        if self.mlp is None:
            return out
        shares = F.linear(tokens, self.coefficient, self.coefficient_bias).float().softmax(-1).to(tokens.dtype)
        return shares[:, :1] * self.mlp(tokens) + shares[:, 1:] * out


class ResidualModules(FeedForwardModules):
    """Base of a model class whose feed-forward layers in ``config.pr_moe`` have experts."""

    replaced_field = "pr_moe"

    def has_equal_gates(self) -> bool:
        gates = [module.gate for module in self.modules() if isinstance(module, ResidualMoE)]  # type: ignore[attr-defined]
        return "one" in gates

    def whole_layer(self, out: int, entry: dict[str, Any], about: dict[str, Any]) -> WholeLayer:
        return ResidualMoE(self.config, entry["width"], out, entry, about)  # type: ignore[attr-defined]
