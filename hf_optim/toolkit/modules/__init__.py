"""Replace, hide, mark and transplant modules of a model."""

from . import replace, transplant
from .modes import eval_mode
from .replace import ReplacedModules
from .transplant import main_output, rounding_tolerance

__all__ = [
    "ReplacedModules",
    "eval_mode",
    "main_output",
    "replace",
    "rounding_tolerance",
    "transplant",
]
