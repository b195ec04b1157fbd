"""Replace and transplant the modules of a model, and compare the outputs of two models."""

from . import coded_experts, grouped_experts, remote_code_guard, replace, transplant
from .coded_experts import CodedExperts
from .compare import main_output, output_difference, rounding_tolerance
from .grouped_experts import grouped_where_it_fits
from .modes import eval_mode
from .remote_code_guard import RefusedByStock
from .replace import ReplacedModules

__all__ = [
    "CodedExperts",
    "RefusedByStock",
    "ReplacedModules",
    "coded_experts",
    "eval_mode",
    "grouped_experts",
    "grouped_where_it_fits",
    "main_output",
    "output_difference",
    "remote_code_guard",
    "replace",
    "rounding_tolerance",
    "transplant",
]
