"""Base of the techniques that train linear layers and experts with masks over their dense weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from hf_optim import ModelError, Scope, Technique
from hf_optim.toolkit.pruning import masked_layers, masks
from hf_optim.toolkit.topology import require_layers, unprunable_experts, weight_out_in

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from hf_optim import Run


class MaskedTraining(Technique):
    """A technique with the fields ``targets`` and ``skip`` whose layers compute with masks during training."""

    targets: tuple[str, ...]
    skip: tuple[str, ...]

    def eligible(self, layers: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, list[str]]]:
        """Return the selected layers that the masks fit, and the names of the others, by reason."""
        return dict(layers), {}

    def training_bytes(self, width: int) -> float:
        return 1.0 + width  # a mask, and the masked weight that the backward pass reads

    def check_model(self, model: PreTrainedModel, label: str) -> None:
        self._supported(model, Scope("", model, model).select(self.targets, self.skip, experts=True), label)

    def _supported(
        self, model: PreTrainedModel, selected: Mapping[str, Any], label: str
    ) -> tuple[dict[str, Any], dict[str, list[str]]]:
        """Return the selected layers that can be trained with masks, and the names of the others, by reason."""
        found, skipped = self.eligible(selected)
        try:
            found, others = masked_layers.select_supported(model, found)
        except ModelError as error:
            raise ModelError(f"{label}: {error}") from error
        skipped |= others | unprunable_experts(model, self.targets, self.skip)
        require_layers(found, model, label, skipped)
        return found, skipped

    def prepare(self, run: Run) -> dict[str, masked_layers.MaskedLayer | masked_layers.MaskedStack]:
        """Return the layers in training by name, and stacks of experts; the first call attaches them.

        Raises:
            ModelError: if no layer is left, or for a model with adapters.
            NumericalError: for weights that are infinite or NaN.
        """
        if layers := masked_layers.masked_layers(run.model):
            return layers
        label = run.label(self)
        found, skipped = self._supported(run.model, run.select(self.targets, self.skip, experts=True), label)
        run.cover(self, found, skipped)
        weights = {masks.weight_name(name, layer): weight_out_in(layer) for name, layer in found.items()}
        masks.require_finite(weights, label)
        return masked_layers.attach_all(found)
