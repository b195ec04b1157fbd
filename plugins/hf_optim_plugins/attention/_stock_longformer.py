"""From BERT and RoBERTa to transformers' Longformer, tensor for tensor, and back to a RoBERTa."""

from __future__ import annotations

import re

import torch
from torch import nn
from transformers import LongformerConfig, PretrainedConfig, PreTrainedModel, RobertaConfig

from hf_optim import ModelError
from hf_optim.toolkit.modules import eval_mode, rounding_tolerance, transplant
from hf_optim.toolkit.topology import dummy_inputs

TYPE = "longformer"
ATTENTION = re.compile(r"attention\.self\.(query|key|value)\.(weight|bias)$")
POSITIONS = "embeddings.position_embeddings.weight"

# What other names the heads of BERT have, by the class.
BERT_HEADS = {
    "BertModel": {},
    "BertForMaskedLM": {
        "cls.predictions.transform.dense": "lm_head.dense",
        "cls.predictions.transform.LayerNorm": "lm_head.layer_norm",
        "cls.predictions.decoder": "lm_head.decoder",
        "cls.predictions": "lm_head",
    },
    "BertForSequenceClassification": {"bert.pooler.dense": "classifier.dense", "classifier": "classifier.out_proj"},
    "BertForTokenClassification": {},
}
OWN_MARKS = ("LongformerForQuestionAnswering", "LongformerForMultipleChoice")
# The stock classes for question answering and multiple choice take other inputs.
ROBERTA_HEADS = tuple(name.replace("Bert", "Roberta") for name in BERT_HEADS)


def require_stock(model: PreTrainedModel, label: str) -> None:
    """Raise ``ModelError`` for a model that transformers' Longformer does not express."""
    name, config = type(model).__name__, model.config
    fits = (config.model_type, name in BERT_HEADS, name in ROBERTA_HEADS) in (
        ("bert", True, False),
        ("roberta", False, True),
    )
    if not fits or _counterpart(type(model), type(config), LongformerConfig) is None:
        raise ModelError(
            f"{label}: transformers' Longformer does not express {name}: it takes BERT and RoBERTa without a head, for "
            "masked language modelling, and for classification of sequences or tokens. Leave out stock_class"
        )
    if "MaskedLM" in name and config.hidden_act != "gelu":
        raise ModelError(f"{label}: the head of LongformerForMaskedLM has gelu, that of {name} {config.hidden_act}")


def require_counterpart(model_class: type[PreTrainedModel], global_first: int, label: str) -> None:
    """Raise ``ModelError`` unless a RoBERTa with so many first tokens global computes what a class of Longformer does.

    Without marks, the stock classifier of sequences makes its first token global, the classes in ``OWN_MARKS`` those of
    the question, and all others none.
    """
    name = model_class.__name__
    if name in OWN_MARKS:
        raise ModelError(
            f"{label}: {name} finds the tokens of the question and makes them global, which no RoBERTa does; take "
            "LongformerModel, or a class for masked language modelling or for classification of sequences or tokens"
        )
    expected = int(name == "LongformerForSequenceClassification")
    if global_first != expected:
        does = "makes the first token of a row global" if expected else "makes no token global by itself"
        raise ModelError(f"{label}: {name} {does}: set global_first to {expected}, not {global_first}")
    if _counterpart(model_class, LongformerConfig, RobertaConfig) is None:
        raise ModelError(f"{label}: there is no RoBERTa like {model_class.__name__}")


def to_stock(model: PreTrainedModel, window: int, label: str) -> PreTrainedModel:
    """Return the model as a stock Longformer that shares its parameters but those that are copied.

    Args:
        model: a BERT or RoBERTa that ``require_stock`` accepts.
        window: tokens on both sides, even.
        label: the beginning of messages.

    Raises ``ModelError`` if the result with a window over the whole text does not compute what the model does.
    """
    target = _counterpart(type(model), type(model.config), LongformerConfig)
    assert target is not None
    inputs = {name: value for name, value in dummy_inputs(model).items() if name != "token_type_ids"}
    with eval_mode(model):
        full = model(**inputs)[0].double()
    wide = _as_longformer(model, target, 2 * full.shape[1] if full.dim() > 2 else 2 * inputs["input_ids"].shape[1])
    with eval_mode(wide):
        same = (wide(**inputs)[0].double() - full).abs().max() / full.abs().max()
    if not float(same) <= rounding_tolerance(model):
        raise ModelError(
            f"{label}: {target.__name__} of this {type(model).__name__} computes something else (relative difference "
            f"{float(same):.2g}); leave out stock_class"
        )
    return _as_longformer(model, target, window)


def from_stock(model: PreTrainedModel, label: str) -> PreTrainedModel:
    """Return a stock Longformer as a RoBERTa, without its projections of global tokens; parameters are shared."""
    target = _counterpart(type(model), LongformerConfig, RobertaConfig)
    assert target is not None
    drop = {"attention_window": None, "onnx_export": None}
    config = transplant.translate_config(model.config, RobertaConfig)
    for name in drop:
        vars(config).pop(name, None)
    made = _empty(target, config, model)
    prefix, wanted = f"{target.base_model_prefix}.", dict(made.named_parameters(remove_duplicate=False))
    for name, parameter in model.named_parameters(remove_duplicate=False):
        new = re.sub(rf"^{model.base_model_prefix}\.", prefix, name)
        if new in wanted:
            transplant.set_tensor(made, new, parameter)
    return _finished(made, model)


def with_projections(made: PreTrainedModel, stock: PreTrainedModel) -> PreTrainedModel:
    """Return ``made`` with the projections of global tokens of a stock Longformer; any other ``stock`` has none."""
    if stock.config.model_type != TYPE:
        return made
    modules = dict(made.named_modules())
    for name, module in stock.named_modules():
        own = re.sub(rf"^{stock.base_model_prefix}\.", f"{made.base_model_prefix}.", name)
        if name.endswith("_global") and own in modules:
            for leaf, parameter in module.named_parameters():
                transplant.set_tensor(made, f"{own}.{leaf}", parameter)
    return made


def _counterpart(
    model_class: type[PreTrainedModel], config: type[PretrainedConfig], target: type[PretrainedConfig]
) -> type[PreTrainedModel] | None:
    return transplant.find_counterpart(model_class, config, target)


def _as_longformer(model: PreTrainedModel, target: type[PreTrainedModel], window: int) -> PreTrainedModel:
    bert = model.config.model_type == "bert"
    behind = model.config.pad_token_id + 1 if bert else 0  # a Longformer counts positions from behind the padding
    positions = model.config.max_position_embeddings + behind
    config = transplant.translate_config(
        model.config,
        LongformerConfig,
        attention_window=[window] * model.config.num_hidden_layers,
        max_position_embeddings=positions,
        sep_token_id=model.config.eos_token_id if not bert else None,
    )
    made = _empty(target, config, model)
    heads = BERT_HEADS[type(model).__name__] if bert else {}
    wanted = dict(made.named_parameters(remove_duplicate=False))
    for name, parameter in model.named_parameters(remove_duplicate=False):
        new = _renamed(name, heads, f"{model.base_model_prefix}.", f"{made.base_model_prefix}.")
        if new not in wanted:
            continue
        if behind and new.endswith(POSITIONS):
            table = nn.functional.pad(parameter.detach(), (0, 0, behind, 0))
            parameter = nn.Parameter(table, requires_grad=parameter.requires_grad)
        transplant.set_tensor(made, new, parameter)
        if ATTENTION.search(new):
            own = ATTENTION.sub(r"attention.self.\1_global.\2", new)
            transplant.set_tensor(made, own, nn.Parameter(parameter.detach().clone(), requires_grad=True))
    return _finished(made, model)


def _renamed(name: str, heads: dict[str, str], old: str, new: str) -> str:
    for before, after in heads.items():
        if name.startswith(f"{before}."):
            return after + name[len(before) :]
    return re.sub(f"^{re.escape(old)}", new, name)


def _empty(target: type[PreTrainedModel], config: PretrainedConfig, model: PreTrainedModel) -> PreTrainedModel:
    config._attn_implementation_internal = None
    with torch.device("meta"):
        if "add_pooling_layer" in target.__init__.__code__.co_varnames and getattr(model, "pooler", True) is None:
            return target(config, add_pooling_layer=False)  # type: ignore[call-arg]
        return target(config)


def _finished(made: PreTrainedModel, model: PreTrainedModel) -> PreTrainedModel:
    for name, buffer in list(made.named_buffers()):
        if buffer.is_meta:
            like = dict(model.named_buffers())
            ids = torch.arange(made.config.max_position_embeddings)[None]
            stock = next((value for other, value in like.items() if other.endswith(name.rpartition(".")[2])), None)
            transplant.set_tensor(made, name, stock if stock is not None else (ids if "position" in name else ids * 0))
    if missing := transplant.meta_tensor_names(made):
        raise ModelError(f"{type(made).__name__} has {missing[0]}, which {type(model).__name__} does not have")
    return made.train(model.training)
