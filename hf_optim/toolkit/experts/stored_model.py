"""Give a model what its configuration says of its experts, and take it away."""

from __future__ import annotations

from torch import nn

from .bucketed_model import attach_stored_buckets, detach_buckets
from .rank_models import attach_stored_exchange, detach_exchange
from .routed_model import attach_stored_routing, detach_routing


def attach_stored_settings(model: nn.Module) -> None:
    """Let the experts of a model run as its configuration says: capacity, buckets, exchange between ranks.

    What the model has already is kept. Raises ``CheckpointError`` for a malformed setting, and ``ModelError`` for one
    that does not fit the model.
    """
    attach_stored_routing(model)
    attach_stored_buckets(model)
    attach_stored_exchange(model)


def detach_settings(model: nn.Module) -> None:
    """Let the experts of a model run as in stock transformers. The configuration is not changed."""
    detach_exchange(model)
    detach_buckets(model)
    detach_routing(model)
