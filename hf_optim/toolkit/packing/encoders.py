"""Which encoders can be packed: their positions, and what else of them depends on where a token lies.

Packing keeps the position of each token, which is what an architecture derives from the padded batch: its column (BERT,
DistilBERT, ELECTRA, ALBERT, ModernBERT), its number among the tokens that are not the padding token (RoBERTa and its
relatives, MPNet), or nothing but distances (T5).
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ...errors import ModelError


@dataclass(frozen=True)
class Kind:
    """An architecture of encoders.

    Attributes:
        positions: ``columns``, ``numbered`` from the padding token's id + 1, or ``none``: no ``position_ids``.
        by_distance: attention depends on distances, which padding between the tokens of a row would change.
        bias: scores have a bias by distance: equal lengths are neighbours on every device.
        registered: attention is on transformers' interface; if not, ``own_attention`` has a class for it.
    """

    positions: Literal["columns", "numbered", "none"] = "columns"
    by_distance: bool = False
    bias: bool = False
    registered: bool = True


KINDS = {
    "albert": Kind(),
    "bert": Kind(),
    "camembert": Kind("numbered"),
    "distilbert": Kind(),
    "electra": Kind(),
    "modernbert": Kind(by_distance=True),
    "mpnet": Kind("numbered", by_distance=True, bias=True, registered=False),
    "mt5": Kind("none", by_distance=True, bias=True),
    "roberta": Kind("numbered"),
    "t5": Kind("none", by_distance=True, bias=True),
    "xlm-roberta": Kind("numbered"),
}
READS_ALL_PLACES = "QuestionAnswering"
READS_FIRST_COLUMN = ("SequenceClassification", "MultipleChoice")


def find_encoder(model: PreTrainedModel, label: str) -> tuple[PreTrainedModel, Kind]:
    """Return the encoder of a model, the module that is packed, and its kind.

    Raises ``ModelError`` for a model without one that can be packed. The model may be on the meta device.
    """
    name, kind = type(model).__name__, KINDS.get(model.config.model_type)
    if kind is None:
        raise ModelError(
            f"{label}: padding is removed from encoders of text ({', '.join(sorted(KINDS))}), and {name} is a "
            f"{model.config.model_type} model: leave the step out"
        )
    if READS_ALL_PLACES in name:
        raise ModelError(
            f"{label}: the head of {name} compares all places of a row, padding among them, and its loss would be "
            "another one without: leave the step out"
        )
    encoder: Any = model.get_encoder() if kind.positions == "none" else model.base_model
    if any(getattr(encoder.config, field, False) for field in ("is_decoder", "add_cross_attention")):
        raise ModelError(f"{label}: {name} is configured as a decoder (is_decoder); padding is removed from encoders")
    if kind.registered and not type(encoder)._can_set_attn_implementation():
        raise ModelError(
            f"{label}: {type(encoder).__name__} of this version of transformers does not take its attention from the "
            "AttentionInterface, by which documents are kept apart"
        )
    for entry in ("attention_pattern", "length_projection"):
        if getattr(model.config, entry, None) is not None:
            raise ModelError(
                f"{label}: the attention of {name} has a pattern (config.{entry}), which is computed from places in a "
                "padded row: choose one of both"
            )
    return encoder, kind


def reads_first_column(model: PreTrainedModel, encoder: PreTrainedModel) -> bool:
    """Return True if a head of the model reads column 0 of the hidden states, whether or not a token is there."""
    named = any(word in type(model).__name__ for word in READS_FIRST_COLUMN)
    return named and getattr(encoder, "pooler", None) is None


def packed_positions(encoder: Any, kind: Kind, given: dict[str, Any], index: Tensor, columns: int) -> Tensor:
    """Return the positions ``[1, total]`` that stock transformers gives to the tokens at ``index``."""
    if kind.positions == "columns":
        return (index % columns)[None]
    embeddings = encoder.embeddings
    ids = given.get("input_ids")
    if ids is not None:
        owner = getattr(embeddings, "create_position_ids_from_input_ids", None)
        if owner is None:  # MPNet's is a function beside its classes
            owner = sys.modules[type(embeddings).__module__].create_position_ids_from_input_ids
        numbers = owner(ids, embeddings.padding_idx)
        return numbers.reshape(-1)[index][None]
    return (index % columns + embeddings.padding_idx + 1)[None]


def pool(encoder: Any, first: Tensor) -> Tensor:
    """Return what the pooler of an encoder makes of the first tokens ``[B, 1, d]``, or of ``[B, T, d]``."""
    if isinstance(encoder.pooler, nn.Linear):  # ALBERT
        return encoder.pooler_activation(encoder.pooler(first[:, 0]))
    return encoder.pooler(first)


def is_traced(*tensors: Any) -> bool:
    """Return True if tensors have shapes alone: the model is analysed, not run."""
    found = [t for t in tensors if isinstance(t, torch.Tensor)]
    return any(t.is_meta or type(t).__name__ == "FakeTensor" for t in found)
