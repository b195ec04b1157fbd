"""Model classes whose feed-forward parts are mixtures, although the stock class is dense and knows no experts.

This file is stored with checkpoints, so it imports nothing.
"""

from __future__ import annotations

from typing import Any

from .coded_experts import CodedExperts
from .replace import ReplacedModules


class MixturesInDense(CodedExperts, ReplacedModules):
    """Base of a model class with modules of experts on transformers' interface, in the places that ``replaced_field``
    names; by default they are computed by their own forward.
    """

    def __init__(self, config: Any, *inputs: Any, **kwargs: Any) -> None:
        requested = config._experts_implementation
        config._experts_implementation = "eager"  # the dense classes inside refuse others
        super().__init__(config, *inputs, **kwargs)
        if requested is not None:
            self.set_experts_implementation(requested)  # type: ignore[attr-defined]

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        # transformers looks for its decorator in the source of a class, and inherits the answer for the dense class.
        return True

    def get_correct_experts_implementation(self, requested_experts: str | None) -> str:
        """Return the implementation of the experts; by default that of their own file."""
        return super().get_correct_experts_implementation(requested_experts or "eager")  # type: ignore[misc]
