"""Attention over inducing points in the place of self-attention.

    H = MAB(I, X):  O = I + softmax(I K^T * scale) V,   H = O + relu(O W_o + b_o)
    A = softmax(Q (H W_k + b_k)^T * scale) (H W_v + b_v)

Q, K and V are what the model's own attention projects of a row of n tokens. I are m learned points, in the space of the
queries. The two softmaxes have n m scores each.

This file is stored beside checkpoints, so it imports only torch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from hf_optim.toolkit.attention import attend_to_set

STARTS = ("identity", "xavier")


class InducedAttention(nn.Module):
    """The learned part of one attention.

    Args:
        heads: of the queries.
        width: of a head.
        points: m.
        layer_norm: normalize after each of the two sums of H.
        start: of W_k and W_v. ``identity``: what points gather is what tokens read. ``xavier``: drawn, as the authors'
            models are.
    """

    def __init__(self, heads: int, width: int, points: int, layer_norm: bool, start: str, **about: Any) -> None:
        super().__init__()
        self.heads, self.start = heads, start
        size = heads * width
        self.points = nn.Parameter(torch.empty(points, size, **about))
        self.feed_forward = nn.Linear(size, size, **about)
        self.key = nn.Linear(size, size, **about)
        self.value = nn.Linear(size, size, **about)
        norms = [nn.LayerNorm(size, **about) if layer_norm else nn.Identity() for _ in range(2)]
        self.attention_norm, self.output_norm = norms
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the parameters; see ``start``."""
        if self.points.is_meta:
            return
        nn.init.xavier_uniform_(self.points)
        for layer in (self.feed_forward, self.key, self.value):
            if layer._parameters.get("weight") is None:
                continue  # quantized
            if self.start == "xavier":
                nn.init.xavier_uniform_(layer.weight)
            elif layer is self.feed_forward:
                nn.init.normal_(layer.weight, std=0.02)  # small, not zero: the gradient of a ReLU at 0 is 0
            else:
                nn.init.eye_(layer.weight)
            nn.init.zeros_(layer.bias)
        for norm in (self.attention_norm, self.output_norm):
            if isinstance(norm, nn.LayerNorm):
                norm.reset_parameters()

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, valid: Tensor | None, scale: float, dropout: float = 0.0
    ) -> Tensor:
        """Compute the attention.

        Args:
            query: ``[B, H, P, D]``.
            key, value: ``[B, G, P, D]``; G divides H.
            valid: bool ``[B, P]``, False for padding; None if there is none.
            scale: of the scores of both softmaxes.
            dropout: share of the second softmax's weights that is dropped.

        Returns:
            ``[B, H, P, D]``. Padding changes nothing; rows that are padding alone have gathered nothing.
        """
        # A copy: weights of a file lie at any address, and attention on a CPU rounds by that.
        points = self._split(self.points.clone()[None]).expand(len(query), -1, -1, -1).to(query.dtype)
        out = self._joined(points + attend_to_set(points, key, value, valid, scale))
        out = self.attention_norm(out)
        gathered = self.output_norm(out + functional.relu(self.feed_forward(out)))
        keys, values = (self._split(layer(gathered)) for layer in (self.key, self.value))
        return functional.scaled_dot_product_attention(query, keys, values, dropout_p=dropout, scale=scale)

    def _split(self, part: Tensor) -> Tensor:
        return part.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def _joined(self, part: Tensor) -> Tensor:
        return part.transpose(1, 2).flatten(2)
