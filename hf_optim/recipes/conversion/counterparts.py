"""The steps that stand for modifiers of llm-compressor, from ``counterparts.yaml``."""

from __future__ import annotations

from functools import cache
from importlib import resources
from typing import Any

import yaml

from ..catalogue import catalogue
from ..traits import Trait

Steps = list[dict[str, Any]]


@cache
def _table() -> dict[str, dict[str, Any]]:
    text = (resources.files("hf_optim.recipes.conversion") / "counterparts.yaml").read_text(encoding="utf-8")
    return yaml.safe_load(text)


def counterpart(kind: str) -> dict[str, Any]:
    """Return the technique and the fixed fields of the step for a kind of modifier."""
    return dict(_table()[kind])


def adds(step: dict[str, Any], trait: Trait) -> bool:
    """Return True if the technique of a step adds a trait to the model."""
    return trait in catalogue().get(step["technique"]).spec.contract.adds
