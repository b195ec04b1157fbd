from __future__ import annotations
"""Modules of a model replaced by others, by name, when the model is built: the base of remote code that stores codes.

This file is stored beside checkpoints, so it imports only torch and transformers.
"""


from typing import Any

from torch import nn


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` where the module `name` of `model` is."""
    parent, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(parent), attribute, module)


def own_name(model: nn.Module, name: str) -> str | None:
    """The name that a module has in `model`, given its name in that model with, or without, another head.

    None where the model has no such module.
    """
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    modules = dict(model.named_modules())
    for candidate in (name, prefix + name, name.removeprefix(prefix)):
        if candidate in modules:
            return candidate
    return None


class ReplacedModules:
    """Part of a model class: the modules that the configuration names are built as others.

    The configuration's field `replaced_field` is `{"modules": {name: entry}, ...}`; a class defines `replacement`.
    """

    replaced_field: str

    def __init__(self, config: Any, *inputs: Any, **kwargs: Any) -> None:
        super().__init__(config, *inputs, **kwargs)  # type: ignore[call-arg]
        said = getattr(config, self.replaced_field, None) or {}
        for name, entry in said.get("modules", {}).items():
            own = own_name(self, name)  # type: ignore[arg-type]
            if own is not None:
                replace_module(self, own, self.replacement(self.get_submodule(own), entry, said))  # type: ignore

    def replacement(self, module: nn.Module, entry: Any, said: dict[str, Any]) -> nn.Module:
        """The module to stand in the place of `module`; its tensors are then loaded from the checkpoint."""
        raise NotImplementedError

    def _init_weights(self, module: nn.Module) -> None:
        # Some classes (T5) initialize through `linear.weight`, which a module that stores codes need not have.
        try:
            super()._init_weights(module)  # type: ignore[misc]
        except AttributeError as error:
            if "weight" not in str(error):
                raise
"""Modules that round their input to 8-bit grids made beforehand, one grid for each group of channels.

This file is stored beside checkpoints whose activations no stock class can round, so it imports only torch and
transformers. With the scale ``s_g`` and the zero point ``z_g`` of the group ``g(j)`` that channel ``j`` is in::

    q(x)_j = s_g (clamp(round(x_j / s_g) + z_g, -128, 127) - z_g)

A linear layer keeps its weight as int8 codes with one scale for each row, or for each row and group of channels. Its
product is computed in floating point on the decoded weight: ``y = q(x) (s C)^T + b``.
"""


from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D



class InputGrids(nn.Module):
    """Base of modules that round their input. With ``groups`` 0 the input stays as it is.

    ``input_scale`` [groups], ``input_zero`` [groups] int8, ``input_group`` [channels] int32: the group of each channel.
    """

    holds_codes: ClassVar[bool] = True
    input_scale: Tensor
    input_zero: Tensor
    input_group: Tensor

    def add_grids(self, channels: int, groups: int, like: Tensor) -> None:
        """Make room for the grids."""
        self.groups = groups
        if groups:
            self.register_buffer("input_scale", torch.ones(groups, dtype=like.dtype, device=like.device))
            self.register_buffer("input_zero", torch.zeros(groups, dtype=torch.int8, device=like.device))
            self.register_buffer("input_group", torch.zeros(channels, dtype=torch.int32, device=like.device))

    def set_grids(self, scale: Tensor, zero: Tensor, group: Tensor) -> None:
        """Put the grids in."""
        for buffer, value in ((self.input_scale, scale), (self.input_zero, zero), (self.input_group, group)):
            buffer.copy_(value)

    def rounded(self, x: Tensor) -> Tensor:
        """``x`` [..., channels] moved to the nearest points of its grids, in its dtype."""
        if not self.groups:
            return x
        wide = x if x.dtype == torch.float64 else x.float()
        group = self.input_group.long()
        scale, zero = self.input_scale.to(wide.dtype)[group], self.input_zero.to(wide.dtype)[group]
        codes = (torch.round(wide / scale) + zero).clamp(-128, 127)
        return ((codes - zero) * scale).to(x.dtype)


class RoundedLinear(InputGrids):
    """A linear layer on rounded inputs. ``weight`` [out, in]: int8 codes if it has scales, else the weight as it was.

    Args:
        in_features, out_features, bias: of the layer.
        groups: of input channels, see ``InputGrids``.
        scales: how many each row has, ``weight_scale`` [out, scales]: 0, 1 or ``groups``.
        transposed: the stock layer is a ``Conv1D``, which stores its weight as [in, out].
        like: a tensor with the dtype and device of the stock layer.
    """

    weight_scale: Tensor

    def __init__(
        self, in_features: int, out_features: int, bias: bool, groups: int, scales: int, transposed: bool, like: Tensor
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.scales, self.transposed = scales, transposed
        dtype = torch.int8 if scales else like.dtype
        weight = torch.zeros(out_features, in_features, dtype=dtype, device=like.device)
        self.weight = nn.Parameter(weight, requires_grad=False)
        if scales:
            ones = torch.ones(out_features, scales, dtype=like.dtype, device=like.device)
            self.register_buffer("weight_scale", ones)
        self.bias = nn.Parameter(torch.zeros(out_features, dtype=like.dtype, device=like.device)) if bias else None
        self.add_grids(in_features, groups, like)

    @classmethod
    def in_place_of(cls, layer: Any, groups: int, scales: int) -> RoundedLinear:
        """A layer of the shape of a stock one, its tensors yet to be filled."""
        transposed = isinstance(layer, Conv1D)
        rows, columns = layer.weight.shape[::-1] if transposed else layer.weight.shape
        return cls(columns, rows, layer.bias is not None, groups, scales, transposed, layer.weight)

    def decoded(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight [out, in] as numbers."""
        if not self.scales:
            return self.weight if dtype is None else self.weight.to(dtype)
        scale = self.weight_scale.to(dtype or self.weight_scale.dtype)
        return self.weight.to(scale.dtype) * (scale if self.scales == 1 else scale[:, self.input_group.long()])

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(self.rounded(x), self.decoded(x.dtype), self.bias)

    def to_dense(self) -> tuple[nn.Module, bool]:
        """The stock layer with the decoded weight, and whether it computes the same."""
        weight = self.decoded()
        made: nn.Module
        if self.transposed:
            made = Conv1D(self.out_features, self.in_features).to(weight)
        else:
            made = nn.Linear(self.in_features, self.out_features, self.bias is not None).to(weight)
        with torch.no_grad():
            made.weight.copy_(weight.T if self.transposed else weight)  # type: ignore[operator, arg-type]
            if self.bias is not None:
                made.bias.copy_(self.bias)  # type: ignore[operator, arg-type]
        return made.train(self.training), self.groups == 0


class RoundedNorm(InputGrids):
    """A normalisation, whatever its class, on rounded inputs."""

    def __init__(self, inner: Any, groups: int) -> None:
        super().__init__()
        self.inner = inner
        self.add_grids(inner.weight.numel(), groups, inner.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(self.rounded(x))

    def to_dense(self) -> tuple[nn.Module, bool]:
        """The stock module; it computes on inputs that are not rounded."""
        return self.inner, self.groups == 0


class RoundedActivationModel(ReplacedModules):
    """Part of a model class: its configuration's `activation_grids` says which modules round their input."""

    replaced_field = "activation_grids"

    def replacement(self, module: nn.Module, entry: Any, said: dict[str, Any]) -> nn.Module:
        if entry["kind"] == "norm":
            return RoundedNorm(module, entry["groups"])
        return RoundedLinear.in_place_of(module, entry["groups"], entry["scales"])


"""Configurations that stock classes refuse: part of the configuration class of every model with code of its own.

`AutoModel` refuses a checkpoint of an unknown `model_type`. A stock class that is asked for by name only warns, and
would leave at random what it does not know. On disk the layers therefore have a type that no release of transformers
knows, so that the configuration class of the stock model raises.

This file is stored beside checkpoints, so it imports only transformers.
"""


import json
import os
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

FOREIGN = "needs_trust_remote_code"
TYPES, COUNT, ASIDE = "layer_types", "num_hidden_layers", "stock_layers"


class RefusedByStock(PreTrainedConfig):
    """Part of a configuration class: it writes `config.json` with layer types of its own, and reads them back.

    transformers looks at layer types where a configuration has a number of layers. That number is put aside on disk,
    with the layer types that the architecture has: stock classes have one by themselves and raise, but the bare
    `PreTrainedConfig`, by which `AutoTokenizer` reads a checkpoint whose code it may not run, has none and does not. A
    configuration that has no number of layers (of several towers) gets one on disk.
    """

    def to_json_file(self, json_file_path: str | os.PathLike, use_diff: bool = True) -> None:
        """Write the configuration, marked. `use_diff`: only what differs from the defaults."""
        fields = json.loads(self.to_json_string(use_diff=use_diff))
        count = getattr(self, COUNT, None)
        fields[ASIDE] = {key: fields.pop(key) for key in (TYPES, COUNT) if key in fields}
        fields |= {TYPES: [FOREIGN] * count} if count else {TYPES: [FOREIGN], COUNT: 1}
        Path(json_file_path).write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n", encoding="utf-8")

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """The configuration of what `to_json_file` wrote, or of any dictionary without marks."""
        fields = dict(config_dict)
        if FOREIGN in (fields.get(TYPES) or ()):
            aside = fields.pop(ASIDE, {})
            fields = {key: value for key, value in fields.items() if key not in (TYPES, COUNT)} | aside
        return super().from_dict(fields, **kwargs)


import transformers  # noqa: E402


class PegLlamaConfig(RefusedByStock, transformers.LlamaConfig):
    model_type = "peg_llama"
    activation_grids: dict | None = None


class PegLlamaModel(RoundedActivationModel, transformers.LlamaModel):
    config_class = PegLlamaConfig


class PegLlamaForCausalLM(RoundedActivationModel, transformers.LlamaForCausalLM):
    config_class = PegLlamaConfig


class PegLlamaForSequenceClassification(RoundedActivationModel, transformers.LlamaForSequenceClassification):
    config_class = PegLlamaConfig


class PegLlamaForQuestionAnswering(RoundedActivationModel, transformers.LlamaForQuestionAnswering):
    config_class = PegLlamaConfig


class PegLlamaForTokenClassification(RoundedActivationModel, transformers.LlamaForTokenClassification):
    config_class = PegLlamaConfig


AUTO_MAP = {
    "AutoConfig": "modeling_peg_llama.PegLlamaConfig",
    "AutoModel": "modeling_peg_llama.PegLlamaModel",
    "AutoModelForCausalLM": "modeling_peg_llama.PegLlamaForCausalLM",
    "AutoModelForSequenceClassification": "modeling_peg_llama.PegLlamaForSequenceClassification",
    "AutoModelForQuestionAnswering": "modeling_peg_llama.PegLlamaForQuestionAnswering",
    "AutoModelForTokenClassification": "modeling_peg_llama.PegLlamaForTokenClassification",
}
