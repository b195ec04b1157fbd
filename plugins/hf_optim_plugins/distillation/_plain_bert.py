"""A BERT without token types and pooler, which is the DistilBERT class of transformers (1910.01108, section 3).

The embedding of the first segment is added to those of the positions, so that the outputs for texts of one segment do
not change.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import (
    BertForMaskedLM,
    BertModel,
    DistilBertConfig,
    DistilBertForMaskedLM,
    DistilBertModel,
    PreTrainedModel,
)

from hf_optim import ModelError
from hf_optim.toolkit.modules import output_difference, rounding_tolerance, transplant
from hf_optim.toolkit.topology import dummy_inputs

CLASSES: dict[type, type[PreTrainedModel]] = {BertModel: DistilBertModel, BertForMaskedLM: DistilBertForMaskedLM}
# DistilBERT's names and BERT's, in the order of replacement.
NAMES = (
    (r"^distilbert\.", "bert."),
    (r"transformer\.layer\.", "encoder.layer."),
    (r"attention\.([qkv])_lin", r"attention.self.\1"),
    (r"attention\.out_lin", "attention.output.dense"),
    (r"sa_layer_norm", "attention.output.LayerNorm"),
    (r"ffn\.lin1", "intermediate.dense"),
    (r"ffn\.lin2", "output.dense"),
    (r"output_layer_norm", "output.LayerNorm"),
    (r"^vocab_transform", "cls.predictions.transform.dense"),
    (r"^vocab_layer_norm", "cls.predictions.transform.LayerNorm"),
    (r"^vocab_projector", "cls.predictions.decoder"),
)
LETTERS = {"self.q": "self.query", "self.k": "self.key", "self.v": "self.value"}
EPS = 1e-12  # of every norm of DistilBERT


def without_token_types(model: PreTrainedModel, label: str) -> tuple[PreTrainedModel, Callable[[str], list[str]]]:
    """Return the DistilBERT with a BERT's tensors, and the new names of the BERT's modules for ``Run.rename``.

    Raises ``ModelError`` for a class or a configuration that DistilBERT cannot represent, and if the outputs differ.
    """
    target, config = CLASSES.get(type(model)), model.config
    if target is None or config.is_decoder or config.layer_norm_eps != EPS:
        raise ModelError(
            f"{label}: {type(model).__name__} has no counterpart without token types: transformers has one for "
            f"BertModel and BertForMaskedLM as encoders with layer_norm_eps {EPS}; leave token_types at true"
        )
    with torch.device("meta"):
        plain = target(_config(model))
    given = dict(model.named_parameters(remove_duplicate=False))
    source = {name: bert_name(name) for name, _ in plain.named_parameters(remove_duplicate=False)}
    for name, old in source.items():
        transplant.set_tensor(plain, name, given[old])
    for name, _ in plain.named_buffers():
        transplant.set_tensor(plain, name, model.get_buffer(bert_name(name)))
    _add_segment(plain, model)
    plain.train(model.training)
    gap = output_difference(model, plain, dummy_inputs(model))
    if not gap <= rounding_tolerance(model):
        raise ModelError(f"{label}: without token types the model's outputs change (relative difference {gap:.1e})")
    members = (*plain.named_modules(remove_duplicate=False), *plain.named_parameters(remove_duplicate=False))
    names = {bert_name(name): [name] for name, _ in members}
    return plain, lambda name: names.get(name, [])


def bert_name(name: str) -> str:
    """Return BERT's name of a tensor of DistilBERT."""
    for pattern, replacement in NAMES:
        name = re.sub(pattern, replacement, name)
    return re.sub(r"self\.[qkv]\b", lambda found: LETTERS[found[0]], name)


def _config(model: PreTrainedModel) -> DistilBertConfig:
    config = model.config
    made = DistilBertConfig(
        vocab_size=config.vocab_size,
        max_position_embeddings=config.max_position_embeddings,
        n_layers=config.num_hidden_layers,
        n_heads=config.num_attention_heads,
        dim=config.hidden_size,
        hidden_dim=config.intermediate_size,
        dropout=config.hidden_dropout_prob,
        attention_dropout=config.attention_probs_dropout_prob,
        activation=config.hidden_act,
        initializer_range=config.initializer_range,
        pad_token_id=config.pad_token_id,
        tie_word_embeddings=config.tie_word_embeddings,
        dtype=config.dtype,
    )
    made._attn_implementation_internal = config._attn_implementation_internal
    made.name_or_path = config.name_or_path or ""
    return made


@torch.no_grad()
def _add_segment(plain: PreTrainedModel, model: PreTrainedModel) -> None:
    """Add the first segment's embedding to every position's, in a new tensor."""
    embeddings: Any = model.base_model.embeddings
    positions = embeddings.position_embeddings.weight
    summed = positions + embeddings.token_type_embeddings.weight[0]
    prefix = "distilbert." if isinstance(plain, DistilBertForMaskedLM) else ""
    parameter = nn.Parameter(summed, requires_grad=positions.requires_grad)
    transplant.set_tensor(plain, f"{prefix}embeddings.position_embeddings.weight", parameter)
