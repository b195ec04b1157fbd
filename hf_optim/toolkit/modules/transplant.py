"""Put the weights of a model into another class of transformers, tensor for tensor, without copying them.

Some changes of structure need no new code at all: a Llama with a window is a Mistral, a Llama whose feed-forward layers
are experts is a Mixtral.  Here is what such changes share: which class of the target architecture does the same job
(`find_counterpart`), what of the configuration goes over (`translate_config`), the transfer of the tensors (`transplant`)
and the proof that the function is the same (`output_difference`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, PretrainedConfig, PreTrainedModel

from ...errors import ModelError

# Fields of a configuration that say which class wrote it, not what the model is.
_OF_THE_CLASS = ("model_type", "architectures", "transformers_version", "_name_or_path", "auto_map")


def auto_classes(config_class: type[PretrainedConfig], model_class: type[PreTrainedModel]) -> list[type]:
    """The `AutoModel...` classes that make a `model_class` of a `config_class`; empty for a class they do not know."""
    return auto_heads(config_class).get(model_class, [])


def auto_heads(config_class: type[PretrainedConfig]) -> dict[type[PreTrainedModel], list[type]]:
    """Every model class of an architecture that the `AutoModel...` classes know, with the classes that make it."""
    heads: dict[type[PreTrainedModel], list[type]] = {}
    for auto in _every_auto_class():
        for model_class in _entries(auto, config_class):
            heads.setdefault(model_class, []).append(auto)
    return heads


def find_counterpart(
    model_class: type[PreTrainedModel],
    config_class: type[PretrainedConfig],
    target_config_class: type[PretrainedConfig],
) -> type[PreTrainedModel] | None:
    """The class that does for `target_config_class` what `model_class` does for `config_class`; None without one.

    `LlamaForCausalLM` and Llama's and Mistral's configurations give `MistralForCausalLM`.
    """
    for auto in auto_classes(config_class, model_class):
        position = _entries(auto, config_class).index(model_class)
        found = _entries(auto, target_config_class)
        if position < len(found):
            return found[position]
    return None


def config_class_of(model_type: str) -> type[PretrainedConfig]:
    """The configuration class of a `model_type` that ships in transformers."""
    return CONFIG_MAPPING[model_type]


def translate_config(config: PretrainedConfig, target: type[PretrainedConfig], **changes: Any) -> PretrainedConfig:
    """`config` as a `target`: every field that `target` declares, and every other one that was given a value.

    The latter are needed since modelling code reads some fields with `getattr` (`head_dim`).  `changes` win.
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
    """A `target_class(config)` that holds the very parameters and buffers of `model` (shared, not copied).

    Returns the new model and the parameters of `model` for which it has no place, by name.  Parameters that only
    the new model has are left on the meta device: `meta_tensor_names` names them, `set_tensor` fills them.  Mode, generation settings
    and ties are those of `model`.  Raises `ModelError` when a tensor of the same name has another shape.
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
                f"{target_class.__name__} wants {name} as {tuple(parameter.shape)}, "
                f"this {type(model).__name__} has it as {tuple(given[name].shape)}"
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
    """Names of the parameters and buffers that are still on the meta device."""
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return [name for name, tensor in tensors if tensor.is_meta]


def set_tensor(model: nn.Module, name: str, tensor: Tensor) -> None:
    """Make `tensor` the parameter or buffer `name` of `model`, replacing what stands there."""
    path, _, leaf = name.rpartition(".")
    owner = model.get_submodule(path)
    store: dict[str, Any] = owner._parameters if leaf in owner._parameters else owner._buffers
    store[leaf] = tensor


def output_difference(first: PreTrainedModel, second: PreTrainedModel, inputs: Mapping[str, Tensor]) -> float:
    """The largest difference of the outputs of two models, relative to the largest output.

    Both run in evaluation mode without gradients and get their modes back.
    """
    one, two = main_output(first, inputs), main_output(second, inputs)
    if one.shape != two.shape:
        raise ModelError(f"{type(first).__name__} gives {tuple(one.shape)}, {type(second).__name__} {tuple(two.shape)}")
    gap = (one - two).abs().max() / one.abs().max().clamp_min(torch.finfo(one.dtype).tiny)
    return float(gap)


def rounding_tolerance(model: PreTrainedModel) -> float:
    """How far two ways to compute one function may lie apart in the dtype of `model`, in the sense of `output_difference`."""
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    return max(1e-4, 16 * torch.finfo(dtype).eps)


def main_output(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> Tensor:
    """The logits, or else the first output, in float64; in evaluation mode without gradients, as in `output_difference`."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            outputs = model(**inputs)
    finally:
        for module, mode in modes:
            module.training = mode
    logits = getattr(outputs, "logits", None)
    return (logits if logits is not None else outputs[0]).double()


def _every_auto_class() -> list[type]:
    from transformers.models.auto import modeling_auto

    classes = [value for value in vars(modeling_auto).values() if isinstance(value, type)]
    return [cls for cls in classes if getattr(cls, "_model_mapping", None) is not None]


def _entries(auto: Any, config_class: type[PretrainedConfig]) -> list[type[PreTrainedModel]]:
    found = auto._model_mapping.get(config_class, ())
    return list(found) if isinstance(found, (tuple, list)) else [found]
