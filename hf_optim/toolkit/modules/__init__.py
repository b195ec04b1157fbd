"""Replace and transplant the modules of a model, and compare the outputs of two models."""

from . import replace, transplant
from .compare import main_output, output_difference, rounding_tolerance
from .modes import eval_mode
from .replace import ReplacedModules

__all__ = [
    "ReplacedModules",
    "eval_mode",
    "main_output",
    "output_difference",
    "replace",
    "rounding_tolerance",
    "transplant",
]
