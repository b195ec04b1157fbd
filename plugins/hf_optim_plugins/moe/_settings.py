"""The settings of mixture layers, made of the fields of a technique."""

from __future__ import annotations

import dataclasses
from typing import Any

from hf_optim import Technique


def settings_of(technique: Technique, settings: type[Any], /, **given: Any) -> Any:
    """Return settings of a dataclass: those given, the fields that a technique has by the same names, and defaults."""
    names = (field.name for field in dataclasses.fields(settings) if field.name not in given)
    return settings(**given, **{name: getattr(technique, name) for name in names if hasattr(technique, name)})
