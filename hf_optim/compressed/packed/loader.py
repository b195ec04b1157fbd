"""Loading a compressed checkpoint without a dense copy, through transformers' own loader.

The checkpoint's ``quantization_config`` is set aside, and one of ours takes its place, whose quantizer is registered
with transformers as any other: before the weights are read it gives the linears of the model (which have no data yet)
the tensors that the checkpoint has; after, it turns layer by layer into a ``PackedLinear``, and frees what was read.
A layer that no kernel serves is decoded, as stock transformers would have it. At most the compressed weights and one
layer's codes are in memory, and the dense weights of layers without a kernel.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import CheckpointError
from ...toolkit.checkpoint.safetensors import TensorInfo, SafetensorsHeaders, UnsupportedCheckpoint
from ..codes import is_sparse24, state_of
from ..outlier_columns import outlier_thresholds
from ..weights import Codes
from .checkpoint_formats import parse_checkpoint_format
from .describe import describe_weight
from .kernel import Kernel
from .layouts import Layout, empty_meta_tensor
from .swap import g_idx_of, pack, prepack

METHOD = "hf_optim_packed"
LAYOUT = "_hf_optim_layout"
STRICT = "_keep_in_fp32_modules_strict"


class PlaceholderLinear(nn.Linear):
    """A linear whose compressed tensors are being loaded."""

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """Stands in for a weight that classes initialize before they load (T5): nothing, and marked as initialized."""
        found = self._parameters.get("weight")
        if found is None:
            found = nn.Parameter(torch.empty(0), requires_grad=False)
            found._is_hf_initialized = True  # type: ignore[attr-defined]
        return found


def with_packed_quantizer(config: Any) -> Any:
    """Return a copy of a model configuration whose quantizer is ours. Raises ``UnsupportedCheckpoint``."""
    config = copy.deepcopy(config)
    holder = config
    if getattr(config, "quantization_config", None) is None:
        holder = config.get_text_config(decoder=True)
    stored = getattr(holder, "quantization_config", None)
    if stored is None:
        raise UnsupportedCheckpoint("it is not compressed")
    stored = dict(stored) if isinstance(stored, Mapping) else stored.to_dict()
    stored["quant_method"] = str(getattr(stored.get("quant_method"), "value", stored.get("quant_method")))
    parse_checkpoint_format(stored)
    _register()
    holder.quantization_config = {"quant_method": METHOD, "stored": stored}
    return config


@functools.cache
def _register() -> None:
    from transformers.quantizers import HfQuantizer
    from transformers.quantizers.auto import register_quantization_config, register_quantizer
    from transformers.utils.quantization_config import QuantizationConfigMixin

    @register_quantization_config(METHOD)
    class PackedConfig(QuantizationConfigMixin):
        """Holds the checkpoint's own configuration while it is loaded."""

        def __init__(self, stored: Mapping[str, Any], **kwargs: Any) -> None:
            self.quant_method: Any = METHOD
            self.stored = dict(stored)

    @register_quantizer(METHOD)
    class PackedQuantizer(HfQuantizer):
        """See the module."""

        requires_calibration = True
        is_trainable = True

        def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
            return True

        def _process_model_before_weight_loading(self, model: Any, checkpoint_files: Any = None, **kwargs: Any) -> Any:
            if not checkpoint_files:
                raise UnsupportedCheckpoint("its weights are no files")
            config: Any = self.quantization_config
            headers = SafetensorsHeaders(checkpoint_files, getattr(model, "base_model_prefix", ""))
            prepare(model, parse_checkpoint_format(config.stored)(model, headers), headers)
            return model

        def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
            from ..quantizer import attach_quantizer, detach_quantizer
            from ..state import quantized_modules
            from .accelerate import kernels_for

            convert(model, kernels_for(None))
            detach_quantizer(model)
            if quantized_modules(model):
                attach_quantizer(model)
            return model


def prepare(model: nn.Module, layouts: Mapping[str, Layout], headers: SafetensorsHeaders) -> None:
    """Give the linears of a model on the meta device the tensors that their layouts name.

    Raises ``CheckpointError`` where the checkpoint lacks one or has it in another shape or type.
    """
    _require_plain(model)
    for name, layout in layouts.items():
        module: Any = model.get_submodule(name)
        shape = (module.out_features, module.in_features)
        try:
            tensor_specs = layout.tensor_specs(shape)
        except ValueError as error:
            raise CheckpointError(f"{name}: {error}") from error
        found: dict[str, TensorInfo] = {}
        for key, spec in tensor_specs.items():
            entry = headers.find(f"{name}.{key}")
            if entry is None and spec.optional:
                continue
            if entry is None:
                raise CheckpointError(f"the checkpoint has no {name}.{key}")
            found[key] = entry
            if not spec.matches(entry):
                raise CheckpointError(
                    f"{entry.key} is {entry.type} {list(entry.shape)}, expected {' or '.join(spec.types)} "
                    f"{list(spec.shape)} for a layer of {shape[0]} x {shape[1]}"
                )
        dtype = module._parameters.pop("weight").dtype
        module.__dict__[LAYOUT] = (layout, type(module), dtype, tuple(found))
        module.__class__ = PlaceholderLinear
        for key, entry in found.items():
            module._parameters[key] = nn.Parameter(empty_meta_tensor(entry, dtype), requires_grad=False)


def _require_plain(model: Any) -> None:
    from ..storability import is_stack

    if any(is_stack(module) for module in model.modules()):
        raise UnsupportedCheckpoint("its experts are stacked matrices")


def convert(model: nn.Module, kernels: tuple[Kernel, ...]) -> None:
    """Turn the loaded tensors of every planned layer into a packed weight or the decoded state, one layer at a time."""
    wide = {*(getattr(model, "_keep_in_fp32_modules", None) or ()), *(getattr(model, STRICT, None) or ())}
    planned = [name for name, module in model.named_modules() if LAYOUT in module.__dict__]
    apart = outlier_thresholds(model, planned)
    for name, module in model.named_modules():
        if LAYOUT in module.__dict__:
            layout, former, dtype, keys = module.__dict__.pop(LAYOUT)
            parts = {key: module._parameters.pop(key).detach() for key in keys}  # type: ignore[union-attr]
            if any(part.is_meta for part in parts.values()):
                raise UnsupportedCheckpoint("its weights are offloaded")
            module.__class__ = former
            if any(part in name.split(".") for part in wide) and dtype.itemsize < 4:
                dtype = next(part.dtype for part in parts.values() if part.dtype.is_floating_point)
            _convert_layer(name, module, layout, parts, dtype, kernels, apart.get(name))  # type: ignore[arg-type]


@torch.no_grad()
def _convert_layer(
    name: str,
    module: nn.Linear,
    layout: Layout,
    parts: dict[str, Tensor],
    dtype: torch.dtype,
    kernels: Any,
    outliers: float | None,
) -> None:
    from ..state import attach_scheme, store

    for key, part in parts.items():
        if part.dtype.is_floating_point and part.dtype.itemsize > 1:
            parts[key] = part.to(dtype).reshape(part.shape or (1,))
    shape = (module.out_features, module.in_features)
    try:
        found, scheme = layout.read(parts, shape)
    except ValueError as error:
        raise CheckpointError(f"{name}: {error}") from error
    parts.clear()
    size = shape[1] if scheme.weights.strategy != "group" else scheme.weights.group_size
    weight = describe_weight(
        name,
        shape,
        scheme,
        _as_scale(found.scale),
        module.bias,
        lambda: found,
        ordered=found.order is not None,
        sparse24=any(kernel.sparse24 for kernel in kernels) and _is_sparse24(found, scheme.weights.num_bits),
        outliers=outliers,
    )
    bound = prepack(weight, kernels)
    if isinstance(bound, str):
        empty = torch.empty(shape, dtype=dtype, device=weight.device)
        module.register_parameter("weight", nn.Parameter(empty, requires_grad=False))
        store(module, scheme, **state_of(found, scheme), g_idx=g_idx_of(found, size))
    else:
        attach_scheme(module, scheme, found.input_scale, found.input_zero)
        pack(module, weight, *bound)


def _is_sparse24(found: Codes, bits: int) -> bool:
    if found.order is not None or found.codes.dtype != torch.uint8:
        return False
    rows, columns = found.codes.shape
    grouped = found.codes.view(rows, _as_scale(found.scale).shape[1], -1)
    return is_sparse24(
        (grouped != (2 ** (bits - 1) if found.zero is None else found.zero[..., None])).view(rows, columns)
    )


def _as_scale(scale: Tensor | None) -> Tensor:
    assert scale is not None
    return scale
