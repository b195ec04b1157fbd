"""Fields of techniques with global tokens: checked, and turned into settings of a pattern."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_optim import ModelError, RecipeError
from hf_optim.toolkit.attention import LARGEST, MOST, projections_of

from ._attach import PatternTechnique

LISTS = ("global_positions", "global_token_ids")
BY_ROW = (
    "global tokens by id, and projections of their own, need the whole row before its first token is computed; give "
    "global_first or global_positions"
)


class TokenTechnique(PatternTechnique):
    """Base of the techniques with global tokens: subclasses have the fields that ``token_settings`` reads."""

    def validate(self) -> None:
        validate_tokens(self)

    def check_fields(self, model: PreTrainedModel, label: str) -> None:
        require_tokens(self, model, label)

    def encoders_only(self, settings: Mapping[str, Any]) -> str:
        return BY_ROW if settings["global_token_ids"] or settings["global_projections"] else ""


def token_settings(step: Any, projections: bool = False) -> dict[str, Any]:
    """Return the settings of the pattern that say which tokens are global, all of them."""
    fields: dict[str, Any] = {"global_first": step.global_first, "global_last": step.global_last}
    fields |= {name: sorted(set(getattr(step, name))) for name in LISTS}
    return {**fields, "global_projections": projections}


def names_tokens(settings: Mapping[str, Any]) -> bool:
    """Return True if the settings name any token as global."""
    return any(settings[name] for name in ("global_first", "global_last", *LISTS))


def validate_tokens(step: Any) -> None:
    """Raise ``RecipeError`` for fields that name no global tokens."""
    for name in LISTS:
        values = getattr(step, name)
        if len(values) > MOST:
            raise RecipeError(f"{step.name}: {name} has {len(values)} entries; at most {MOST} tokens are named")
        if any(not 0 <= value <= LARGEST for value in values):
            raise RecipeError(f"{step.name}: {name} counts from 0, and has {min(values)} to {max(values)}")


def require_tokens(step: Any, model: PreTrainedModel, label: str, projections: bool = False) -> None:
    """Raise ``ModelError`` for global tokens that no row of the model has."""
    config = model.config
    context = getattr(config, "max_position_embeddings", None)
    farthest = max(step.global_positions, default=-1) + 1
    for what, value in (
        ("global_positions", farthest), ("global_first", step.global_first), ("global_last", step.global_last),
    ):  # fmt: skip
        if context is not None and value > context:
            raise ModelError(
                f"{label}: {what} reaches {value} tokens into rows of at most {context}, the length that "
                f"{type(model).__name__} is made for"
            )
    vocabulary = getattr(config, "vocab_size", None)
    if step.global_token_ids and model.main_input_name != "input_ids":
        raise ModelError(f"{label}: {type(model).__name__} reads {model.main_input_name}, in which no token has an id")
    if vocabulary is not None and (top := max(step.global_token_ids, default=-1)) >= vocabulary:
        raise ModelError(f"{label}: global_token_ids has {top}, but the vocabulary has {vocabulary} tokens")
    if projections:
        _require_projections(model, label)


def global_places(settings: Mapping[str, Any], length: int) -> Tensor:
    """Return which places of a row of ``length`` tokens are global by their position, bool ``[length]``."""
    found = torch.zeros(length, dtype=torch.bool)
    found[: settings["global_first"]] = True
    found[length - min(length, settings["global_last"]) :] = True
    found[[place for place in settings["global_positions"] if place < length]] = True
    return found


def _require_projections(model: PreTrainedModel, label: str) -> None:
    """Raise ``ModelError`` unless projections of global tokens can stand beside those of each module of attention."""
    modules = [module for module in model.base_model.modules() if hasattr(module, "is_causal")]
    turned = [m for m in modules if "position_embeddings" in inspect.signature(type(m).forward).parameters]
    if model.main_input_name != "input_ids" or turned or any(projections_of(module) is None for module in modules):
        why = "turns queries and keys by their position" if turned else "has no query, key and value of hidden states"
        raise ModelError(
            f"{label}: global_projections needs separate projections of hidden states, as in BERT; the attention of "
            f"{type(model).__name__} {why}"
        )
