"""Two ways in which a model with equal heads in each group gets one head for each in a class of transformers.

A conversion is planned on a model whose weights may be on the meta device, and applied to the same model once its heads
are equal. ``_own_heads`` has the third way.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hf_optim import ModelError, Reload, Run
from hf_optim.toolkit.modules import transplant
from hf_optim.toolkit.pruning import shrink
from hf_optim.toolkit.topology import KeyValueHeads

from ._pooling import kept_rows, output_dim, projections


@dataclass(frozen=True)
class Conversion:
    """How a model gets fewer heads.

    Attributes:
        reload: how stock transformers loads the result.
        apply: makes the model, given the run (whose masks and names it changes) and the model with equal heads.
        new_names: projections that have another name afterwards.
    """

    reload: Reload
    apply: Callable[[Run, PreTrainedModel], PreTrainedModel]
    new_names: Mapping[str, str]

    def new_name(self, name: str) -> str:
        """Return the name of a projection afterwards."""
        return self.new_names.get(name, name)


# -- the same class, with another configuration -----------------------------------------------------------------------
def by_stock_config(model: PreTrainedModel, heads: list[KeyValueHeads], kv_heads: int, label: str) -> Conversion | None:
    """Return the conversion of a class whose configuration has a number of key/value heads; None for any other.

    Raises ``ModelError`` if no number there gives the narrower projections.
    """
    if not has_field(model.config):
        return None
    kept: dict[str, dict[int, Tensor]] = {}
    for name, parts in projections(heads).items():
        layer = model.get_submodule(name)
        assert isinstance(layer.weight, Tensor)
        dim = output_dim(layer)
        rows = kept_rows(layer.weight.shape[dim], parts, kv_heads)
        kept[f"{name}.weight"] = {dim: rows}
        if layer.bias is not None:
            kept[f"{name}.bias"] = {0: rows}
    slicing = shrink.Slicing(kept, {len(one): kv_heads for one in heads}, kv_heads)
    try:
        plan = shrink.plan(model, [slicing])
    except ModelError as error:
        raise ModelError(f"{label}: {error}") from error

    def apply(run: Run, model: PreTrainedModel) -> PreTrainedModel:
        shrink.apply_(model, plan)
        run.masks.update({name: plan.slice(name, mask) for name, mask in run.masks.items()})
        return model

    return Conversion(Reload.STOCK_ARCH, apply, {})


def has_field(config: PretrainedConfig) -> bool:
    """Return True if a configuration, or one of its parts, has a number of key/value heads."""
    parts = [config, *(value for value in vars(config).values() if isinstance(value, PretrainedConfig))]
    return any("kv_heads" in name or "key_value_heads" in name for part in parts for name in vars(part))


# -- GPT-BigCode ------------------------------------------------------------------------------------------------------
def by_bigcode(model: PreTrainedModel, heads: list[KeyValueHeads], kv_heads: int) -> Conversion | None:
    """Return the conversion of a GPT-2 to a GPT-BigCode, which has one key/value head; None for any other model."""
    config = model.config
    if config.model_type != "gpt2" or kv_heads != 1 or config.add_cross_attention:
        return None
    target_config = transplant.config_class_of("gpt_bigcode")
    target = transplant.find_counterpart(type(model), type(config), target_config)
    unlike = config.scale_attn_by_inverse_layer_idx or config.reorder_and_upcast_attn
    if target is None or unlike or {len(one) for one in heads} != {config.n_head}:
        return None
    translated = transplant.translate_config(config, target_config, multi_query=True, num_key_value_heads=None)
    kept = {name: kept_rows(3 * config.n_embd, parts, 1) for name, parts in projections(heads).items()}

    def apply(run: Run, model: PreTrainedModel) -> PreTrainedModel:
        for name, module in model.named_modules():  # until here the shapes are those of GPT-2, in the target's order
            if isinstance(module, Conv1D):
                rows = kept.get(name, torch.arange(module.weight.shape[1]))
                module.weight = _parameter(module.weight.T, rows)
                module.bias = _parameter(module.bias, rows)
                if (mask := run.masks.get(f"{name}.weight")) is not None:
                    run.masks[f"{name}.weight"] = mask.T[rows].contiguous()
        made, spare = transplant.transplant(model, target, translated)
        _fill_buffers(made, target, translated)
        if spare or (missing := transplant.meta_tensor_names(made)):
            left = ", ".join([*sorted(spare), *missing][:4])
            raise ModelError(f"{type(model).__name__} and {target.__name__} do not have the same tensors: {left}")
        return made

    return Conversion(Reload.STOCK_ARCH, apply, {})


def _fill_buffers(made: PreTrainedModel, target: type[PreTrainedModel], config: PretrainedConfig) -> None:
    """Give a model the buffers that no checkpoint has, as its class makes them: of a model without layers."""
    small = transplant.translate_config(config, type(config), n_layer=0, vocab_size=1, n_embd=config.n_head)
    buffers = dict(target(small).named_buffers())
    for name in transplant.meta_tensor_names(made):
        if name in buffers:
            transplant.set_tensor(made, name, buffers[name].to(made.device))


def _parameter(tensor: Tensor, rows: Tensor) -> nn.Parameter:
    """Return the rows of a parameter, or of its transpose, as a parameter."""
    taken = tensor.detach().index_select(0, rows.to(tensor.device)).contiguous()
    return nn.Parameter(taken, requires_grad=tensor.requires_grad)
