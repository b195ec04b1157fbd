"""Replace, hide, mark and transplant modules of a model."""

from . import replace, transplant
from .modes import evaluating
from .replace import ReplacedModules
from .transplant import output, rounding

__all__ = [
    "ReplacedModules",
    "evaluating",
    "output",
    "replace",
    "rounding",
    "transplant",
]
