"""The keys that the attention modules of a model compute."""

from __future__ import annotations

from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_optim import ModelError
from hf_optim.toolkit.attention import Band, hidden_states

from ._attach import probe


def key_sizes(
    model: PreTrainedModel, inputs: dict[str, Tensor], attentions: list[nn.Module], label: str
) -> tuple[int, int]:
    """Return the key heads and the width of a key, the same in all of ``attentions``.

    Raises ``ModelError`` if other modules call the attention function, if keys or values differ in size, or if a mask
    restricts more than padding, documents and order do.
    """
    with probe(model, Band(None, None)) as called:
        hidden_states(model, inputs)
    calls = set(called.values())
    first = next(iter(calls))
    if any(call.restricted for call in calls):
        raise ModelError(
            f"{label}: {type(model).__name__} restricts which tokens see each other, by a sliding window or in another "
            "way, and keys that are made of several tokens cannot be restricted so; this architecture is not supported"
        )
    if set(called) != {id(module) for module in attentions} or len(calls) > 1 or first.key_width != first.value_width:
        raise ModelError(
            f"{label}: the layers of {type(model).__name__} do not all have one attention with keys and values of one "
            "size; this architecture is not supported"
        )
    return first.heads, first.key_width
