"""Layers whose compressed tensors are being loaded, and the names under which a checkpoint has these."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...toolkit.checkpoint.key_names import model_names
from ...toolkit.checkpoint.safetensors import FLOAT_DTYPES, TensorInfo, UnsupportedCheckpoint
from ...toolkit.checkpoint.stored_codes import CODE_NAMES
from ..float4 import GLOBAL
from .expert_loader import exposed_experts, without_experts

# The local names of the tensors of a compressed linear.
LOCAL_NAMES = (
    "weight",
    "weight_packed",
    "weight_shape",
    "weight_scale",
    "weight_zero_point",
    "weight_g_idx",
    GLOBAL,
    "input_scale",
    "input_zero_point",
    "qweight",
    "qzeros",
    "scales",
    "g_idx",
)


class PlaceholderLinear(nn.Linear):
    """A linear layer while its compressed tensors are loaded."""

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """A tensor without data, marked as initialized, for classes that initialize weights before loading them."""
        found = self._parameters.get("weight")
        if found is None:
            found = nn.Parameter(torch.empty(self.out_features, self.in_features, device="meta"), requires_grad=False)
            found._is_hf_initialized = True  # type: ignore[attr-defined]
        return found


class PlaceholderEmbedding(nn.Embedding):
    """An embedding while its compressed tensors are loaded; ``weight`` as of ``PlaceholderLinear``."""

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """A tensor without data, marked as initialized."""
        found = self._parameters.get("weight")
        if found is None:
            found = nn.Parameter(torch.empty(shape_of(self), device="meta"), requires_grad=False)
            found._is_hf_initialized = True  # type: ignore[attr-defined]
        return found


def shape_of(module: Any) -> tuple[int, int]:
    """Return the shape of the weight of a linear layer or an embedding."""
    if isinstance(module, nn.Embedding):
        return module.num_embeddings, module.embedding_dim
    return module.out_features, module.in_features


def linear_names(
    model: Any, key_mapping: Mapping[str, str], entries: Mapping[str, TensorInfo], renamings: Iterable[Any] = ()
) -> dict[str, str]:
    """Return the parameter names of the keys of a compressed checkpoint, as transformers renames them while loading.

    ``renamings`` of transformers come before its own.

    Raises ``UnsupportedCheckpoint`` if transformers converts a compressed tensor, such as a fused projection that it
    splits.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping

    linears = [name for name, module in model.named_modules() if isinstance(module, (nn.Linear, nn.Embedding))]
    names = {*model.state_dict(), *(f"{name}.{own}" for name in linears for own in LOCAL_NAMES)}
    conversions = get_model_conversion_mapping(model, dict(key_mapping) or None)
    conversions = without_experts(conversions) if exposed_experts(model) else conversions
    conversions = [*renamings, *conversions]
    found = model_names(entries, conversions, model.base_model_prefix, names)
    for key, (_, pattern) in found.items():
        if pattern is not None and (key.rpartition(".")[2] in CODE_NAMES or entries[key].type not in FLOAT_DTYPES):
            raise UnsupportedCheckpoint(f"transformers converts {key} while it loads it")
    # A conversion makes its parameters of several tensors, so that none of them is the parameter.
    return {key: name for key, (name, pattern) in found.items() if pattern is None}
