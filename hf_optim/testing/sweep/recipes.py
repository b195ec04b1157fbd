"""The recipes of the sweep (``recipes.yaml``), in the order of the table's columns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

RECIPES: dict[str, list[dict[str, Any]]] = yaml.safe_load(
    Path(__file__).with_name("recipes.yaml").read_text(encoding="utf-8")
)
"""Column -> steps."""
