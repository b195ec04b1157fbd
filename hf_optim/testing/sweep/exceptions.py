"""What the rules of ``configurations`` and ``inputs`` do not serve, by configuration class or by model class."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

# Configuration or model class -> {path of a field: value}. ``...`` leaves the field out, so that its default is taken.
FIELDS: dict[str, dict[str, Any]] = {}

# Model class -> a function of (model, generator, rows) that returns a batch.
INPUTS: dict[str, Callable[..., dict[str, Any]]] = {}
