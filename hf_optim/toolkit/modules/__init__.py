"""Replace and transplant the modules of a model, and compare the outputs of two models."""

from . import remote_code_guard, replace, transplant
from .compare import main_output, output_difference, rounding_tolerance
from .modes import eval_mode
from .remote_code_guard import RefusedByStock
from .replace import ReplacedModules

__all__ = [
    "RefusedByStock",
    "ReplacedModules",
    "eval_mode",
    "main_output",
    "output_difference",
    "remote_code_guard",
    "replace",
    "rounding_tolerance",
    "transplant",
]
