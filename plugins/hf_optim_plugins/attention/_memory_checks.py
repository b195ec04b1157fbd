"""Which models can carry a memory from segment to segment."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

from hf_optim import ModelError
from hf_optim.toolkit.attention import Band, hidden_states, is_causal
from hf_optim.toolkit.modules import eval_mode, relative_difference
from hf_optim.toolkit.topology import dummy_inputs

from ._attach import probe
from ._position_tables import find_table

BY_LENGTH = ("dynamic", "longrope")  # rotations whose frequencies change with the length of the text


def require_decoder(model: PreTrainedModel, what: str, label: str) -> None:
    """Raise ``ModelError`` unless all attention of the model says that it is causal. ``what`` needs that."""
    found = [module.is_causal for module in model.base_model.modules() if hasattr(module, "is_causal")]
    if found and not all(each is True for each in found):
        raise ModelError(
            f"{label}: {type(model).__name__} is not causal, and {what} is for decoders: a token may not change what "
            "earlier ones are"
        )


def require_causal(model: PreTrainedModel, what: str, label: str) -> None:
    """Raise ``ModelError`` if the first token of the model sees the last one."""
    inputs = dummy_inputs(model.base_model)  # type: ignore[arg-type]
    if not is_causal(model, inputs, hidden_states(model, inputs)):
        raise ModelError(f"{label}: {type(model).__name__} is not causal, and {what} is for decoders")


def require_rotation(config: PretrainedConfig, label: str) -> None:
    """Raise ``ModelError`` for rotary positions that turn old keys otherwise as the text gets longer."""
    given: Any = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    kinds = {
        str(each.get("rope_type", each.get("type"))) for each in (given, *given.values()) if isinstance(each, dict)
    }
    for kind in BY_LENGTH:
        if kind in kinds:
            raise ModelError(
                f"{label}: rotary positions of type {kind} change with the length of the text, and the keys of a "
                "memory were rotated at the length of their time: choose another scaling"
            )


def table_of(model: PreTrainedModel, label: str) -> int:
    """Return how many learned positions a model has; 0 if it has no table of them."""
    table = find_table(model, label)
    return 0 if table is None else table.positions


def require_blind(model: PreTrainedModel, label: str) -> None:
    """Raise ``ModelError`` unless a model whose tokens all have position 0 does not tell their order.

    It is shown on the model: where every token sees every other, the outputs of a reversed text are those of the text,
    reversed.
    """
    body: Any = model.base_model
    if "position_ids" not in inspect.signature(body.forward).parameters:
        raise ModelError(f"{label}: {type(model).__name__} takes no position_ids, so its positions cannot be replaced")
    ids = dummy_inputs(body)["input_ids"][:1, :8]
    zero = torch.zeros(1, 1, dtype=torch.int64, device=ids.device)
    with probe(model, Band(None, None), causal=False), eval_mode(body), torch.no_grad():
        one, other = (body(input_ids=text, position_ids=zero, use_cache=False)[0] for text in (ids, ids.flip(1)))
    if relative_difference(other.flip(1).double(), one.double()) > max(1e-5, 8 * torch.finfo(model.dtype).eps):
        raise ModelError(
            f"{label}: {type(model).__name__} has positions that position_ids do not switch off, so relative ones "
            "cannot replace them; this architecture is not supported"
        )
