"""Layers that compute a position bias, or attention that is not on transformers' interface, for packed rows.

T5 and MPNet add a bias by distance to the scores, which they make for all pairs of places of a row: of a packed row,
``[1, H, total, total]``. Here it is that of the longest document, of which each document takes its part.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..modules.mixed_classes import mixed
from ..modules.swap_class import FORMER, restore_class, swap_class
from .documents import Documents
from .interface import DOCUMENTS
from .per_document import attend_documents

BIAS = "bias"  # among what the layers of one forward share


class BiasOfDocuments:
    """Mixin of an attention of T5 with a position bias, which it hands on to the layers behind it."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Compute the attention; the bias of a packed row is ``[1, H, longest, longest]``."""
        documents = kwargs.get(DOCUMENTS)
        if documents is not None and kwargs.get("position_bias") is None:
            kwargs["position_bias"] = documents.kept[BIAS]
        return super().forward(hidden_states, *args, **kwargs)  # type: ignore[misc]


class MPNetLayers:
    """Mixin of MPNet's encoder. Its layers get no keywords: documents are an attribute of the mask."""

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
        """Compute all layers."""
        documents = getattr(attention_mask, DOCUMENTS, None)
        if documents is not None:
            setattr(hidden_states, DOCUMENTS, documents)
        return super().forward(hidden_states, attention_mask, **kwargs)  # type: ignore[misc]

    def compute_position_bias(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the bias of a batch ``x``, or of the longest document of a packed row."""
        documents = getattr(x, DOCUMENTS, None)
        if documents is not None:
            return documents.kept[BIAS]
        return super().compute_position_bias(x, *args, **kwargs)  # type: ignore[misc]


class MPNetAttention:
    """Mixin of MPNet's self-attention."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_bias: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Compute the attention, within documents for a packed row."""
        documents = getattr(attention_mask, DOCUMENTS, None)
        if documents is None:
            return super().forward(hidden_states, attention_mask, position_bias, **kwargs)  # type: ignore[misc]
        own: Any = self
        width = own.attention_head_size
        query, key, value = (part(hidden_states)[0].unflatten(-1, (-1, width)) for part in (own.q, own.k, own.v))
        dropout = own.dropout.p if own.training else 0.0
        got = attend_documents(query, key, value, documents, width**-0.5, dropout, position_bias)
        return (own.o(got.flatten(1)[None]),)


@torch.compiler.disable
def keep_bias(encoder: PreTrainedModel, documents: Documents) -> None:
    """Compute the bias of the longest document, ``[1, H, longest, longest]``, where the layers of an encoder find it.

    This runs before the stock forward, of which nothing then depends on a length as a number: what ``torch.compile``
    makes of it serves batches of all lengths.
    """
    longest = documents.longest
    for module in encoder.modules():
        if isinstance(module, BiasOfDocuments):
            own: Any = module
            device = own.relative_attention_bias.weight.device
            documents.kept[BIAS] = own.compute_bias(longest, longest, device=device)
        elif isinstance(module, MPNetLayers):
            own = module
            weight: Any = own.relative_attention_bias.weight
            documents.kept[BIAS] = module.compute_position_bias(weight.new_empty(1, longest, 0))


def swap_layers(encoder: PreTrainedModel) -> None:
    """Give the layers of an encoder that need it the classes above, in place."""
    for module in list(encoder.modules()):
        name = type(module).__name__
        if getattr(module, "has_relative_attention_bias", False):
            swap_class(module, mixed(BiasOfDocuments, type(module)))  # type: ignore[arg-type]
        elif name == "MPNetEncoder":
            swap_class(module, mixed(MPNetLayers, type(module)))  # type: ignore[arg-type]
        elif name == "MPNetSelfAttention":
            swap_class(module, mixed(MPNetAttention, type(module)))  # type: ignore[arg-type]


def restore_layers(encoder: nn.Module) -> None:
    """Undo ``swap_layers``."""
    for module in list(encoder.modules()):
        if isinstance(module, (BiasOfDocuments, MPNetLayers, MPNetAttention)) and FORMER in vars(module):
            restore_class(module)
