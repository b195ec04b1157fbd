"""Losses that a model adds to that of its head, and who does not see them: a Trainer that computes the loss itself.

Label smoothing and ``compute_loss_func`` of transformers' Trainer call the model without labels, and never add what the
model would. So a forward without labels leaves a note, which reading the term takes away; the next forward in training
that finds it warns.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch

UNREAD, WARNED = "_own_loss_unread", "_own_loss_warned"


def watch_own_loss(model: Any, kwargs: Mapping[str, Any], term: str, read: str) -> None:
    """Warn, once for each model, if nobody has read the term of the forward before; note a forward without labels.

    Args:
        model: the model that is called.
        kwargs: the named arguments of the call.
        term: what is missing from the loss, with its article.
        read: the expression that has it after the forward.
    """
    if not (model.training and torch.is_grad_enabled()) or torch.compiler.is_compiling():
        return
    if kwargs.get("labels") is not None:
        read_own_loss(model)
        return
    if model.__dict__.get(UNREAD) and not model.__dict__.get(WARNED):
        model.__dict__[WARNED] = True
        warnings.warn(
            f"{type(model).__name__} is trained without {term}: the model adds it to the loss that it computes from "
            "labels, and its forwards have none. Where the loss is computed outside of the model (label smoothing, "
            f"compute_loss_func), add {read} to it",
            stacklevel=3,
        )
    model.__dict__[UNREAD] = True


def read_own_loss(model: Any) -> None:
    """Note that the term of the last forward has been read."""
    model.__dict__.pop(UNREAD, None)
