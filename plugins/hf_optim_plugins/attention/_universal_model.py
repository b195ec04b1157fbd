"""Classes of models with tied blocks. This file is stored beside checkpoints, so it imports only transformers."""

from __future__ import annotations

from hf_optim.toolkit.modules import RefusedByStock, TiedModel


class UniversalBase(RefusedByStock):
    """Base of the configuration classes."""


class UniversalModel(TiedModel):
    """Base of the model classes."""

    tied_field = "tied_blocks"
