"""Feed-forward layers whose neurons are divided into experts, of which each token computes the few that a router names.

    y = sum over the chosen experts e of  W_down,e act(W_up,e x + b_e)   + b_down,     each with weight 1

This file is stored beside checkpoints, so it imports only torch and transformers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ._inlet_layers import FeedForwardModules, StackedExperts, WholeLayer


class NeuronExperts(StackedExperts):
    """The neurons of one feed-forward layer, divided."""

    @property
    def down_proj_bias(self) -> Tensor:  # type: ignore[override]
        """Zeros ``[E, out]``: the bias of the whole layer is added once, by ``MoefiedFFN``."""
        return self.down_proj.new_zeros(1).expand(self.down_proj.shape[:2])


class NeuronRouter(nn.Module):
    """Scores the experts of a feed-forward layer for each token.

    ``similarity``: the product of the normalized input with the center of each expert. ``mlp``: of its tanh a second
    matrix makes the scores. No gradient reaches it, since the chosen experts have weight 1.

    Attributes:
        centers: ``[E, in]``.
        mixing: ``[E, E]``, of an ``mlp``.
    """

    def __init__(self, experts: int, width: int, kind: str, about: dict[str, Any]) -> None:
        super().__init__()
        self.centers = nn.Parameter(torch.empty(experts, width, **about), requires_grad=False)
        if kind == "mlp":
            self.mixing = nn.Parameter(torch.empty(experts, experts, **about), requires_grad=False)
        else:
            self.register_parameter("mixing", None)

    def forward(self, x: Tensor) -> Tensor:
        """Return scores ``[T, E]`` for ``x`` ``[T, in]``."""
        scores = F.linear(F.normalize(x, dim=-1), self.centers)
        return scores if self.mixing is None else F.linear(torch.tanh(scores), self.mixing)


class MoefiedFFN(WholeLayer):
    """A feed-forward layer with divided neurons.

    Attributes:
        active: how many experts each token computes.
        bias: ``[out]``, of the last projection, or None.
    """

    bias: nn.Parameter | None

    def __init__(self, config: Any, width: int, out: int, entry: dict[str, Any], about: dict[str, Any]) -> None:
        super().__init__()
        experts, self.active = entry["experts"], entry["active"]
        if not 1 <= self.active <= experts or entry["neurons"] % experts:
            raise ValueError(f"config.moefication does not describe a layer: {str(entry)[:200]}")
        sizes = (experts, entry["neurons"] // experts, width, out)
        self.router = NeuronRouter(experts, width, entry["router"], about)
        self.experts = NeuronExperts.build(config, sizes, entry, about)
        self.register_parameter("bias", nn.Parameter(torch.empty(out, **about)) if entry["out_bias"] else None)

    def choose(self, x: Tensor) -> Tensor:
        """Return the experts that each token computes, int64 ``[T, active]``, for ``x`` ``[T, in]``."""
        experts = self.experts.num_experts
        if self.active == experts:
            return torch.arange(experts, device=x.device).expand(len(x), experts)
        return self.router(x).topk(self.active, dim=-1).indices

    def compute(self, tokens: Tensor) -> Tensor:
        chosen = self.choose(tokens)
        out = self.experts(tokens, chosen, tokens.new_ones(chosen.shape))
        return out if self.bias is None else out + self.bias


class MoefiedModules(FeedForwardModules):
    """Base of a model class in which the feed-forward layers of ``config.moefication`` are divided into experts."""

    replaced_field = "moefication"

    def whole_layer(self, out: int, entry: dict[str, Any], about: dict[str, Any]) -> WholeLayer:
        return MoefiedFFN(self.config, entry["width"], out, entry, about)  # type: ignore[attr-defined]
