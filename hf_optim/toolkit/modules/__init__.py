"""Replace, hide, mark and transplant modules of a model."""

from . import replace, transplant
from .modes import eval_mode
from .replace import ReplacedModules
from .transplant import output, rounding

__all__ = [
    "ReplacedModules",
    "eval_mode",
    "output",
    "replace",
    "rounding",
    "transplant",
]
