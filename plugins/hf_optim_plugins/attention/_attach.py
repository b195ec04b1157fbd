"""Give a model the attention of a pattern, and prove on the model that nothing else changes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from hf_optim import ModelError, RecipeError, Reload, Run, Technique, hookimpl
from hf_optim.checkpoints.remote_code import RemoteCode, convert, joined, require_own_code
from hf_optim.toolkit.attention import (
    FIELD,
    GLOBAL_TOKENS,
    STORED,
    Attachment,
    GlobalTokensModel,
    HeadPatterns,
    PatternModel,
    context_length,
    hidden_states,
    probe,
    prove,
    require_on_interface,
    require_self_attention,
    share_of_attention,
)
from hf_optim.toolkit.topology import dummy_inputs

__all__ = [
    "PatternTechnique",
    "alike_as_one",
    "attach",
    "check_stride",
    "context_length",
    "layer_patterns",
    "probe",
    "prove",
    "remote_code_of",
    "require_encoder",
    "require_interface",
    "require_self_attention",
    "stride_of",
]

LONGEST = 2**30  # a distance of tokens
LONGEST_COUNTED = 8192  # tokens for which the share of attention is counted


def remote_code_of(name: str, page: ModuleType, config_base: str, global_tokens: bool = False) -> RemoteCode:
    """Return the code that is stored with the models of a technique.

    Args:
        name: of the technique.
        page: the module with its pattern.
        config_base: name of the base of configuration classes in ``page``.
        global_tokens: its models have tokens that are global in their row.
    """
    more = GLOBAL_TOKENS if global_tokens else ()
    model_base = GlobalTokensModel if global_tokens else PatternModel
    return RemoteCode(
        name=name,
        source=joined(*STORED, *more, page),
        config_base=config_base,
        field=FIELD,
        model_base=model_base.__name__,
    )


def require_interface(model: PreTrainedModel, code: RemoteCode, label: str) -> None:
    """Raise ``ModelError`` unless the model takes its attention from transformers' ``AttentionInterface``.

    ``code`` is what will be stored with the model; its class must be one that such code can be written for.
    """
    require_own_code(model, code, label)
    require_on_interface(model, label)


def require_encoder(model: PreTrainedModel, encoders_only: str, label: str) -> None:
    """Raise ``ModelError`` if all attention of the model says that it is causal, with the text that ``attach`` has.

    ``encoders_only`` is the reason; empty, any model passes. What the model computes is seen by ``attach`` alone.
    """
    found = [module.is_causal for module in model.base_model.modules() if hasattr(module, "is_causal")]
    if encoders_only and found and all(each is True for each in found):
        raise ModelError(_causal(model, encoders_only, label))


def _causal(model: PreTrainedModel, encoders_only: str, label: str) -> str:
    return f"{label}: {type(model).__name__} is causal: {encoders_only}"


def layer_patterns(
    config: PretrainedConfig, attachment: Attachment, settings: Mapping[str, Any], causal: bool, label: str
) -> list[HeadPatterns]:
    """Return the patterns of the layers. Raises ``ModelError`` for settings that do not fit the model."""
    text, context = config.get_text_config(), context_length(config)
    try:
        return [
            attachment.make(settings, context, layer, text.num_attention_heads, causal)
            for layer in range(text.num_hidden_layers)
        ]
    except ValueError as error:
        raise ModelError(f"{label}: {error}") from None


class PatternTechnique(Technique):
    """Base of the techniques that compute one pattern: subclasses have the page, the code and ``settings``."""

    attachment: ClassVar[Attachment]
    remote_code: ClassVar[RemoteCode]

    def settings(self, config: PretrainedConfig, label: str) -> dict[str, Any]:
        """Return the settings of the pattern for a model, as they go into its ``config.json``."""
        raise NotImplementedError

    def encoders_only(self, settings: Mapping[str, Any]) -> str:
        """Return why the pattern is for models that are not causal; empty if it is for both."""
        return ""

    def check_fields(self, model: PreTrainedModel, label: str) -> None:
        """Raise ``ModelError`` for fields that mean nothing to a model."""

    def check_model(self, model: PreTrainedModel, label: str) -> None:
        require_interface(model, self.remote_code, label)
        self.check_fields(model, label)
        settings = self.settings(model.config, label)
        require_encoder(model, self.encoders_only(settings), label)
        layer_patterns(model.config, self.attachment, settings, False, label)

    @hookimpl
    def prepare_load(self, run: Run, load_kwargs: Mapping[str, Any]) -> dict[str, Any] | None:
        label = run.label(self)
        require_self_attention(run.config, label, run.loaded_class)
        layer_patterns(run.config, self.attachment, self.settings(run.config, label), False, label)
        return None

    @hookimpl
    def transform_model(self, run: Run) -> PreTrainedModel:
        require_interface(run.model, self.remote_code, run.label(self))
        settings = self.settings(run.model.config, run.label(self))
        return attach(run, self, self.remote_code, self.attachment, settings, self.encoders_only(settings))

    def recompute(self, case: Any) -> dict[str, Any]:
        settings, config = case.config[FIELD], case.config
        context, layers = config["max_position_embeddings"], len(config["layer_types"])
        place = torch.arange(min(context, LONGEST_COUNTED))
        causal = "CausalLM" in config["architectures"][0]
        allowed = place[:, None] >= place if causal else torch.ones(len(place), len(place), dtype=torch.bool)
        heads = config["num_attention_heads"]
        pairs = sum(
            int((self.sees(settings, place, layer, head, causal) & allowed).sum())
            for layer in range(layers)
            for head in range(heads)
        )
        return {
            **settings,
            "layers": layers,
            "context": context,
            "share_of_attention": pairs / (layers * heads * int(allowed.sum())),
            "model_class": config["architectures"][0],
        }

    @staticmethod
    def sees(settings: Mapping[str, Any], place: Tensor, layer: int, head: int, causal: bool) -> Tensor:
        """Return the formula of the paper as bool ``[N, N]``, computed apart from the terms, to check records by."""
        raise NotImplementedError


def alike_as_one(values: Sequence[int]) -> list[int]:
    """Return numbers by layer or head as a list, of one if all are the same, so that it fits any number of layers."""
    return list(values[:1]) if len(set(values)) == 1 else list(values)


def check_stride(step: Any) -> None:
    """Raise ``RecipeError`` for a stride below 1."""
    if step.stride != "sqrt" and not 1 <= step.stride <= LONGEST:
        raise RecipeError(f"{step.name}: stride must be from 1 to {LONGEST:,}, or sqrt, not {step.stride}")


def stride_of(stride: int | str, config: PretrainedConfig, label: str) -> int:
    """Return a stride as a number; ``sqrt`` is the rounded root of the model's context."""
    if isinstance(stride, int):
        return stride
    context = context_length(config)
    if context is None:
        raise ModelError(f"{label}: {config.model_type} has no fixed context, whose root could be the stride: set it")
    return max(1, round(context**0.5))


def attach(
    run: Run,
    step: Technique,
    code: RemoteCode,
    attachment: Attachment,
    settings: Mapping[str, Any],
    encoders_only: str = "",
) -> PreTrainedModel:
    """Change the attention of ``run.model`` to the patterns of a technique, in place, and return the model.

    Args:
        run: its model has no pattern yet.
        step: the technique, for messages and the report.
        code: what is stored with the model.
        attachment: the implementation, as it is registered.
        settings: the settings of the pattern, as they go into ``config.json``: plain JSON.
        encoders_only: why the pattern is for models that are not causal; empty if it is for both.

    Raises ``ModelError``, and leaves the model unchanged, if the pattern does not reach each attention of the model.
    """
    model, label = run.model, run.label(step)
    require_own_code(model, code, label)
    inputs = dummy_inputs(model.base_model)  # type: ignore[arg-type]
    full = hidden_states(model, inputs)
    causal, shared = prove(model, inputs, full, label)
    if causal and encoders_only:
        raise ModelError(_causal(model, encoders_only, label))
    each = layer_patterns(model.config, attachment, settings, causal, label)
    if shared and len(set(each)) > 1:
        raise ModelError(
            f"{label}: {type(model).__name__} shares one attention between its layers, and this pattern differs by "
            "layer: choose settings that are the same in all layers"
        )
    convert(model, code, dict(settings))
    model.set_up_attention()  # type: ignore[operator]
    model.attach_attention()  # type: ignore[operator]
    run.record.reload = Reload.REMOTE_CODE.name
    context = context_length(model.config) or full.shape[1]
    counted = min(context, LONGEST_COUNTED)
    shares = {one: share_of_attention(one, counted) for one in set(each)}
    run.report(
        step,
        **settings,
        layers=len(each),
        context=context,
        share_of_attention=sum(shares[one] for one in each) / len(each),
        model_class=type(model).__name__,
    )
    return model
