"""Put the weights of a model into another class of transformers, tensor for tensor, without copying them.

Some changes of structure need no new code: a Llama with a window is a Mistral, a Llama whose feed-forward layers are
experts is a Mixtral. This module has what such changes share: the corresponding class of the target architecture
(``find_counterpart``), the fields of the configuration to keep (``translate_config``) and the transfer of the tensors
(``transplant``). ``compare.output_difference`` checks that the model computes the same.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, PretrainedConfig, PreTrainedModel

from ...errors import ModelError

# Fields of a configuration that describe the class that wrote it, not the model.
_OF_THE_CLASS = ("model_type", "architectures", "transformers_version", "_name_or_path", "auto_map")


def auto_classes(config_class: type[PretrainedConfig]) -> dict[type[PreTrainedModel], list[type]]:
    """Return every model class that the ``AutoModel...`` classes build for a configuration class.

    Each model class is mapped to the ``AutoModel...`` classes that build it.
    """
    classes: dict[type[PreTrainedModel], list[type]] = {}
    for auto in _all_auto_classes():
        for model_class in _entries(auto, config_class):
            classes.setdefault(model_class, []).append(auto)
    return classes


def find_counterpart(
    model_class: type[PreTrainedModel],
    config_class: type[PretrainedConfig],
    target_config_class: type[PretrainedConfig],
) -> type[PreTrainedModel] | None:
    """Return the model class of ``target_config_class`` that corresponds to ``model_class`` of ``config_class``.

    ``LlamaForCausalLM`` with the configuration classes of Llama and Mistral gives ``MistralForCausalLM``. Returns None
    if there is no such class.
    """
    for auto in auto_classes(config_class).get(model_class, []):
        position = _entries(auto, config_class).index(model_class)
        found = _entries(auto, target_config_class)
        if position < len(found):
            return found[position]
    return None


def config_class_of(model_type: str) -> type[PretrainedConfig]:
    """Return the configuration class of a ``model_type`` of transformers."""
    return CONFIG_MAPPING[model_type]


def translate_config(config: PretrainedConfig, target: type[PretrainedConfig], **changes: Any) -> PretrainedConfig:
    """Return ``config`` as a ``target``: the fields that ``target`` declares, and all others that are not the default.

    The latter are needed since modelling code reads some fields with ``getattr`` (``head_dim``). ``changes`` take
    precedence.
    """
    known = {f.name for f in dataclasses.fields(target)}  # type: ignore[arg-type]
    defaults = type(config)().to_dict()
    fields = {
        name: value
        for name, value in config.to_dict().items()
        if name not in _OF_THE_CLASS and (name in known or value != defaults.get(name))
    }
    made = target(**{**fields, **changes})
    made.name_or_path = config.name_or_path or ""
    for chosen in ("_attn_implementation_internal", "_experts_implementation_internal"):
        setattr(made, chosen, getattr(config, chosen, None))
    return made


def transplant(
    model: PreTrainedModel, target_class: type[PreTrainedModel], config: PretrainedConfig
) -> tuple[PreTrainedModel, dict[str, nn.Parameter]]:
    """Build a ``target_class(config)`` with the parameters and buffers of ``model`` (shared, not copied).

    Returns the new model, and the parameters of ``model`` that it does not have, by name. Parameters that only the new
    model has stay on the meta device: ``meta_tensor_names`` lists them, ``set_tensor`` fills them. Training mode,
    generation settings and tied weights are those of ``model``. Raises ``ModelError`` if a tensor of the same name has
    another shape.
    """
    with torch.device("meta"):
        new = target_class(config)
    given = dict(model.named_parameters(remove_duplicate=False))
    wanted = dict(new.named_parameters(remove_duplicate=False))
    for name, parameter in wanted.items():
        if name not in given:
            continue
        if parameter.shape != given[name].shape:
            raise ModelError(
                f"{name} has shape {tuple(parameter.shape)} in {target_class.__name__}, but "
                f"{tuple(given[name].shape)} in this {type(model).__name__}"
            )
        set_tensor(new, name, given[name])
    wanted_buffers = dict(new.named_buffers(remove_duplicate=False))
    for name, buffer in model.named_buffers(remove_duplicate=False):
        if name in wanted_buffers:
            set_tensor(new, name, buffer)
    new.train(model.training)
    if model.can_generate() and new.can_generate():
        new.generation_config = model.generation_config
    return new, {name: value for name, value in given.items() if name not in wanted}


def meta_tensor_names(model: nn.Module) -> list[str]:
    """Return the names of the parameters and buffers that are still on the meta device."""
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return [name for name, tensor in tensors if tensor.is_meta]


def set_tensor(model: nn.Module, name: str, tensor: Tensor) -> None:
    """Replace the parameter or buffer ``name`` of a model by ``tensor``."""
    path, _, leaf = name.rpartition(".")
    owner = model.get_submodule(path)
    store: dict[str, Any] = owner._parameters if leaf in owner._parameters else owner._buffers
    store[leaf] = tensor


def _all_auto_classes() -> list[type]:
    from transformers.models.auto import modeling_auto

    classes = [value for value in vars(modeling_auto).values() if isinstance(value, type)]
    return [cls for cls in classes if getattr(cls, "_model_mapping", None) is not None]


def _entries(auto: Any, config_class: type[PretrainedConfig]) -> list[type[PreTrainedModel]]:
    found = auto._model_mapping.get(config_class, ())
    return list(found) if isinstance(found, (tuple, list)) else [found]
