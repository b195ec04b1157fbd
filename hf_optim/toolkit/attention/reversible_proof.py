"""Find the branches of a model's layers, and prove that a layer is the sum of its input and two branches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ...errors import ModelError
from ..modules import relative_difference, rounding_tolerance
from .reach import hidden_states
from .reversible_layers import arguments_of, branch_of, layers_with

# Names, in a layer, of its norm, attention, second norm and feed-forward layer.
LAYOUTS = (
    ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp"),
    ("ln_1", "attn", "ln_2", "mlp"),
    ("attn_norm", "attn", "mlp_norm", "mlp"),
)


def layout_of(model: PreTrainedModel, label: str) -> list[str]:
    """Return the names of the branches in the layers of a model. Raises ``ModelError`` if there are none.

    Dropout between the branches is refused: a reversible layer does not have it.
    """
    for names in LAYOUTS:
        layers = layers_with(model, names)
        if len(layers) == model.config.get_text_config().num_hidden_layers:
            for layer in layers:
                if dropped := _own_dropout(layer):
                    raise ModelError(
                        f"{label}: a layer of {type(model).__name__} has dropout ({dropped}) outside of its attention "
                        "and feed-forward layer, which reversible layers do not have: set it to 0 in the configuration"
                    )
            return list(names)
    raise ModelError(
        f"{label}: reversible layers need a norm, attention, a norm and a feed-forward layer in this order, each part "
        f"added to its input; those of {type(model).__name__} are others. Leave out reversible"
    )


def _own_dropout(layer: nn.Module) -> str:
    for name, child in layer.named_children():
        if isinstance(child, nn.Dropout) and child.p:
            return name
    numbers = {name: value for name, value in vars(layer).items() if "drop" in name and isinstance(value, float)}
    return next((name for name, value in numbers.items() if value), "")


def prove_layout(model: PreTrainedModel, names: Sequence[str], inputs: Mapping[str, Tensor], label: str) -> None:
    """Raise ``ModelError`` unless each layer is its input, plus its attention, plus its feed-forward layer."""
    gaps = []

    def compare(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        norm, attention, second_norm, mlp = (getattr(layer, name) for name in names)
        hidden, given = arguments_of(layer.forward, args, kwargs)
        hidden = hidden + branch_of(attention, norm(hidden), given)
        hidden = hidden + mlp(second_norm(hidden))
        found = output[0] if isinstance(output, tuple) else output
        gaps.append(relative_difference(hidden.double(), found.double()))

    handles = [layer.register_forward_hook(compare, with_kwargs=True) for layer in layers_with(model, names)]
    try:
        with torch.no_grad():
            hidden_states(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    if not gaps or max(gaps) > rounding_tolerance(model):
        raise ModelError(
            f"{label}: a layer of {type(model).__name__} is more than its input, its attention and its feed-forward "
            "layer, so it cannot be made reversible. Leave out reversible"
        )
