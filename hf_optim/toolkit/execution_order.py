"""Layers by block, for steps that see the whole model and work through it block by block."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from torch import nn

from .stacks import blocks

M = TypeVar("M", bound=nn.Module)


def by_block(model: nn.Module, layers: Mapping[str, M]) -> list[dict[str, M]]:
    """``layers`` (full names in ``model``) by block, in execution order, and last those outside the blocks."""
    holders = [block.holds for block in blocks(model)]
    inside = [{name: layer for name, layer in layers.items() if holds(name)} for holds in holders]
    outside = {name: layer for name, layer in layers.items() if not any(holds(name) for holds in holders)}
    return [part for part in (*inside, outside) if part]
