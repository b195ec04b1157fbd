"""What the rules of ``configurations`` do not serve: fields by configuration class or by model class."""

from __future__ import annotations

from typing import Any

# Configuration or model class -> {path of a field: value}. ``...`` leaves the field out, so that its default is taken.
FIELDS: dict[str, dict[str, Any]] = {}
