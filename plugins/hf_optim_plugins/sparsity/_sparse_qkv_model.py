"""Sparse projections in the models of transformers: the classes of such models.

This file is stored beside checkpoints, so it imports only torch and transformers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from hf_optim.toolkit.modules import RefusedByStock

from ._held_parts import ReadsRows, read_rows
from ._sparse_qkv_modules import QkvSettings, sparsify_projections

SPARSE_QKV = "sparse_qkv"  # the field of the configuration


def add_sparse_projections(model: Any, given: Any) -> list[nn.Module]:
    """Make the projections of each attention of a model sparse, in place; return the attention modules.

    Raises ``ValueError`` for settings that are not those of one, or for attention of another layout.
    """
    settings = QkvSettings.read(given)
    found = [module for module in model.modules() if hasattr(module, "is_causal")]
    for module in found:
        sparsify_projections(module, settings)
    read_rows(model)
    return found


def draw_missing(model: Any) -> None:
    """Draw the tensors of our modules that a checkpoint did not have, as ``initialize_weights`` does for the others."""
    for module in model.modules():
        own = list(module.parameters(recurse=False)) if hasattr(module, "reset_parameters") else []
        if not type(module).__module__.startswith(("torch.", "transformers.")) and own:
            loaded = [(p, p.detach().clone()) for p in own if getattr(p, "_is_hf_initialized", False)]
            if len(loaded) < len(own) and not any(p.is_meta for p in own):
                with torch.no_grad():
                    module.reset_parameters()
                    for parameter, value in loaded:
                        parameter.copy_(value)
            module._is_hf_initialized = True


class SparseQkvConfig(RefusedByStock):
    """Base of the configuration classes."""


class SparseQkvModel(ReadsRows):
    """Base of the model classes: projections are replaced when a model is built."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        settings = getattr(config, SPARSE_QKV, None)
        if settings is not None:
            add_sparse_projections(self, settings)

    def initialize_weights(self) -> None:
        """Initialize what a checkpoint does not have."""
        draw_missing(self)
        super().initialize_weights()  # type: ignore[misc]
