"""Attention of techniques is detached from a finished model, and attached again."""

from __future__ import annotations

from torch import nn


def detach(model: nn.Module) -> None:
    """Let a model compute the attention of its stock class; see ``PreparedModel.detach_attention``."""
    for module in list(model.modules()):
        if hasattr(module, "detach_attention"):  # of the installed code, or of a checkpoint's own
            module.detach_attention()  # type: ignore[operator]


def attach_again(model: nn.Module) -> None:
    """Undo ``detach``. Other models are left unchanged."""
    for module in list(model.modules()):
        if hasattr(module, "detach_attention") and module.has_stock_attention:
            module.attach_attention()  # type: ignore[operator]
