"""Inputs of models whose inputs nothing but their own processor makes, by model class."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

# Model class -> a function of (model, generator, rows) that returns a batch.
INPUTS: dict[str, Callable[..., dict[str, Any]]] = {}
