"""From a BERT with tied blocks to transformers' ALBERT, tensor for tensor."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import AlbertConfig, PreTrainedModel

from hf_optim import ModelError
from hf_optim.toolkit.modules import block_of_step, transplant

HEADS = (
    "BertModel",
    "BertForMaskedLM",
    "BertForSequenceClassification",
    "BertForTokenClassification",
    "BertForQuestionAnswering",
)
LAYER = re.compile(r"encoder\.layer\.(\d+)\.(.+)$")
IN_A_LAYER = (
    ("attention.self.", "attention."),
    ("attention.output.", "attention."),
    ("intermediate.dense.", "ffn."),
    ("output.dense.", "ffn_output."),
    ("output.LayerNorm.", "full_layer_layer_norm."),
)
ELSEWHERE = (
    ("pooler.dense.", "pooler."),
    ("cls.predictions.transform.", "predictions."),
    ("cls.predictions.", "predictions."),
)
MAPPING = "encoder.embedding_hidden_mapping_in"


def require_stock(model: PreTrainedModel, label: str) -> None:
    """Raise ``ModelError`` for a model that transformers' ALBERT does not express."""
    name, config = type(model).__name__, model.config
    target = transplant.find_counterpart(type(model), type(config), AlbertConfig)
    if config.model_type != "bert" or name not in HEADS or target is None or config.is_decoder:
        raise ModelError(
            f"{label}: transformers' ALBERT does not express {name}: it takes encoders {', '.join(HEADS)}. Leave out "
            "convert_to"
        )


def to_albert(model: PreTrainedModel, settings: Mapping[str, Any], label: str) -> PreTrainedModel:
    """Return the model as a stock ALBERT that shares its parameters.

    ALBERT maps embeddings to the hidden state by a matrix, which is the identity here.

    Args:
        model: a BERT that ``require_stock`` accepts; the blocks of a group are equal.
        settings: ``steps`` and ``groups``.
        label: the beginning of messages.
    """
    steps, groups, config = settings["steps"], settings["groups"], model.config
    if any(int(n / (steps / groups)) != block_of_step(n, steps, groups, "consecutive") for n in range(steps)):
        raise ModelError(f"{label}: ALBERT divides {steps} steps into {groups} groups in another way: take a divisor")
    target = transplant.find_counterpart(type(model), type(config), AlbertConfig)
    assert target is not None
    dropout = config.hidden_dropout_prob if config.classifier_dropout is None else config.classifier_dropout
    made_config = transplant.translate_config(
        config,
        AlbertConfig,
        num_hidden_layers=steps,
        num_hidden_groups=groups,
        inner_group_num=1,
        embedding_size=config.hidden_size,
        classifier_dropout_prob=dropout,
    )
    made = _empty(target, made_config, model)
    layers = config.num_hidden_layers
    own, new = (f"{each.base_model_prefix}." if each.base_model is not each else "" for each in (model, made))
    wanted = dict(made.named_parameters(remove_duplicate=False))
    for name, parameter in model.named_parameters(remove_duplicate=False):
        renamed = _renamed(name, own, new, layers, groups)
        if renamed in wanted:
            transplant.set_tensor(made, renamed, parameter)
    weight = model.get_input_embeddings().get_parameter("weight")
    about: Any = {"dtype": weight.dtype, "device": weight.device}
    width = config.hidden_size
    for leaf, value in (("weight", torch.eye(width, **about)), ("bias", torch.zeros(width, **about))):
        transplant.set_tensor(made, f"{new}{MAPPING}.{leaf}", nn.Parameter(value))
    buffers = dict(model.named_buffers())
    for name, buffer in list(made.named_buffers()):
        if buffer.is_meta:
            transplant.set_tensor(made, name, buffers[own + name.removeprefix(new)])
    if missing := transplant.meta_tensor_names(made):
        raise ModelError(f"{label}: {type(made).__name__} has {missing[0]}, which {type(model).__name__} does not have")
    made.tie_weights()
    return made.train(model.training)


def _renamed(name: str, own: str, new: str, layers: int, groups: int) -> str:
    """Return the name in an ALBERT of a parameter of a BERT."""
    inner = name.removeprefix(own)
    prefix = new if inner != name or not own else ""
    if found := LAYER.match(inner):
        group, rest = block_of_step(int(found[1]), layers, groups, "consecutive"), found[2]
        for before, after in IN_A_LAYER:
            if rest.startswith(before):
                rest = after + rest[len(before) :]
                break
        return f"{prefix}encoder.albert_layer_groups.{group}.albert_layers.0.{rest}"
    for before, after in ELSEWHERE:
        if inner.startswith(before):
            return prefix + after + inner[len(before) :]
    return prefix + inner


def _empty(target: type[PreTrainedModel], config: Any, model: PreTrainedModel) -> PreTrainedModel:
    with torch.device("meta"):
        if "add_pooling_layer" in target.__init__.__code__.co_varnames and getattr(model, "pooler", True) is None:
            return target(config, add_pooling_layer=False)  # type: ignore[call-arg]
        return target(config)
