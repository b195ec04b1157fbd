"""Loading a compressed checkpoint without a dense copy, through the loader of transformers.

The ``quantization_config`` of the checkpoint is replaced by one of hf_optim, whose quantizer is registered with
transformers like any other. Before the weights are read, it gives the linears of the model (on the meta device) the
tensors that the checkpoint stores. Afterwards it turns one layer after the other into a ``PackedLinear``, and frees the
tensors that were read. A layer that no kernel supports is decoded, as stock transformers would load it. Memory holds at
most the compressed weights, the codes of one layer, and the dense weights of layers without a kernel.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...errors import CheckpointError
from ...toolkit.checkpoint.safetensors import SafetensorsHeaders, TensorInfo, UnsupportedCheckpoint
from ..codes import is_sparse24, store_arguments
from ..experts import stack_again
from ..float4 import GLOBAL, holds_float4
from ..outlier_columns import outlier_thresholds
from ..weights import Codes
from . import mxfp4_experts
from .accelerate import kernels_for, pack_layers
from .checkpoint_formats import parse_checkpoint_format
from .declared_dtypes import STRICT, cast_to_declared, declared_dtypes
from .describe import describe_weight
from .expert_loader import (
    convert_experts,
    expert_renamings,
    expose_experts,
    exposed_experts,
    require_compressed,
    without_experts,
)
from .kernel import NO_KERNEL, Kernel
from .layouts import Layout, empty_meta_tensor
from .placeholders import PlaceholderEmbedding, PlaceholderLinear, linear_names, shape_of
from .rank_part import LOADING
from .swap import g_idx_of, pack, prepack, writes_weights

ROWS = "an embedding is read row by row"
METHOD = "hf_optim_packed"
PENDING = "_hf_optim_pending"


def with_packed_quantizer(config: Any, key_mapping: Mapping[str, str] | None = None, deferred: bool = False) -> Any:
    """Return a copy of a model configuration that selects the packed quantizer. Raises ``UnsupportedCheckpoint``.

    ``key_mapping`` is the argument of ``from_pretrained``: the caller's renamings, which come before transformers'.
    ``deferred``: the tensors stay on the meta device, and the layers are converted by who loads them.
    """
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
    holder.quantization_config = {
        "quant_method": METHOD,
        "stored": stored,
        "key_mapping": key_mapping,
        "deferred": deferred,
    }
    return config


@functools.cache
def _register() -> None:
    """Register the packed quantizer and its configuration with transformers, once per process."""
    from transformers.quantizers import HfQuantizer
    from transformers.quantizers.auto import register_quantization_config, register_quantizer
    from transformers.utils.quantization_config import QuantizationConfigMixin

    @register_quantization_config(METHOD)
    class PackedConfig(QuantizationConfigMixin):
        """A configuration that holds the original one of the checkpoint while it is loaded."""

        def __init__(
            self,
            stored: Mapping[str, Any],
            key_mapping: Mapping[str, str] | None = None,
            deferred: bool = False,
            **kwargs: Any,
        ) -> None:
            self.quant_method: Any = METHOD
            self.stored = dict(stored)
            self.key_mapping = dict(key_mapping or {})
            self.deferred = deferred

    @register_quantizer(METHOD)
    class PackedQuantizer(HfQuantizer):
        """A quantizer that loads the linears of a compressed checkpoint as packed layers; see the module docstring."""

        requires_calibration = True
        is_trainable = True
        exposes = False  # experts have a layer for each matrix while they are loaded
        renamings: tuple[Any, ...] = ()  # of these layers
        declared: Mapping[str, torch.dtype] = {}  # of the tensors that are loaded

        def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
            return True

        def _process_model_before_weight_loading(self, model: Any, checkpoint_files: Any = None, **kwargs: Any) -> Any:
            part = LOADING.get()
            if not checkpoint_files and part is None:
                raise UnsupportedCheckpoint("its weights are not in files")
            config: Any = self.quantization_config
            native = config.stored["quant_method"] == mxfp4_experts.METHOD
            if native:
                if part is not None or config.deferred:
                    raise UnsupportedCheckpoint("experts in mxfp4 are packed all at once, on one device")
                mxfp4_experts.expose_blocks(model)
            else:
                if part is not None:
                    part.cut_experts(model)
                expose_experts(model, any(kernel.prepack_experts is not None for kernel in kernels_for(model)))
            self.exposes = bool(exposed_experts(model))
            if self.exposes and config.deferred:
                raise UnsupportedCheckpoint("its experts are packed all at once")

            def names(entries: Mapping[str, TensorInfo]) -> dict[str, str]:
                self.renamings = tuple(expert_renamings(model, entries))
                return linear_names(model, config.key_mapping, entries, self.renamings)

            headers = part.headers_of(names) if part is not None else SafetensorsHeaders(checkpoint_files, names)
            layouts = parse_checkpoint_format(config.stored)(model, headers)
            if part is not None:
                headers = part.cut(model, layouts, headers)
            mxfp4_experts.require_blocks(model, headers)
            prepare(model, layouts, headers)
            self.declared = declared_dtypes(model)
            return model

        def update_weight_conversions(self, weight_conversions: list[Any], *args: Any) -> list[Any]:
            found = without_experts(weight_conversions) if self.exposes else weight_conversions
            return super().update_weight_conversions([*self.renamings, *found], *args)

        def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
            from ..quantizer import attach_quantizer, detach_quantizer
            from ..state import quantized_modules

            cast_to_declared(model, self.declared)
            if self.quantization_config.deferred:  # type: ignore[union-attr, attr-defined]
                for module in model.modules():
                    if PENDING in module.__dict__:  # what checks the load sees that its codes are those of a layer
                        module.quantization_scheme = module.__dict__[PENDING].layout
                return model
            kernels = kernels_for(model)
            if exposed_experts(model):
                stack_again(model)
            decided = convert(model, kernels)
            mxfp4_experts.convert_blocks(model, kernels, self.quantization_config.stored)  # type: ignore[union-attr, attr-defined]
            detach_quantizer(model)
            if quantized_modules(model):
                attach_quantizer(model)
            pack_layers(model, kernels, decided)
            return model


class _Pending(NamedTuple):
    """The data from which a ``PlaceholderLinear`` is converted once its tensors are loaded."""

    layout: Layout
    former: type[nn.Module]
    dtype: torch.dtype
    keys: tuple[str, ...]


def prepare(model: nn.Module, layouts: Mapping[str, Layout], headers: SafetensorsHeaders) -> None:
    """Give the linears of a model on the meta device the tensors that their layouts name.

    Raises ``CheckpointError`` if one is missing from the checkpoint, or has another shape or dtype.
    """
    require_compressed(model, layouts, headers)
    if writes_weights(model):
        raise UnsupportedCheckpoint("its forward writes to its weights")
    for name, layout in layouts.items():
        module: Any = model.get_submodule(name)
        if isinstance(module, nn.Embedding) and _ties(model):
            raise UnsupportedCheckpoint(f"{name} is quantized, and the head is tied to it")
        found = _stored_tensors(name, shape_of(module), layout, headers)
        dtype = module._parameters.pop("weight").dtype
        module.__dict__[PENDING] = _Pending(layout, type(module), dtype, tuple(found))
        module.__class__ = PlaceholderEmbedding if isinstance(module, nn.Embedding) else PlaceholderLinear
        for key, entry in found.items():
            wide = torch.float32 if key == GLOBAL else dtype
            module._parameters[key] = nn.Parameter(empty_meta_tensor(entry, wide), requires_grad=False)


def _ties(model: Any) -> bool:
    return bool(getattr(model.config.get_text_config(decoder=True), "tie_word_embeddings", False))


def _stored_tensors(
    name: str, shape: tuple[int, int], layout: Layout, headers: SafetensorsHeaders
) -> dict[str, TensorInfo]:
    """Return the headers of a layer's tensors, by local name. Raises ``CheckpointError``."""
    try:
        specs = layout.tensor_specs(shape)
    except ValueError as error:
        raise CheckpointError(f"{name}: {error}") from error
    found: dict[str, TensorInfo] = {}
    for key, spec in specs.items():
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
    return found


def convert(
    model: nn.Module, kernels: tuple[Kernel, ...], prefix: str = "", owner: nn.Module | None = None
) -> dict[str, str]:
    """Turn every placeholder, whose tensors are loaded, into a packed layer or a decoded one, one layer at a time.

    ``model`` may be a part of the model ``owner``, in which its names begin with ``prefix``.

    Returns the reason why a layer runs on no kernel, for each of these layers; ``""`` for one that runs on a kernel.
    """
    owner = owner if owner is not None else model
    wide = {*(getattr(owner, "_keep_in_fp32_modules", None) or ()), *(getattr(owner, STRICT, None) or ())}
    placeholders = {prefix + name: module for name, module in model.named_modules() if PENDING in module.__dict__}
    experts: dict[str, dict[str, tuple[Layout, dict[str, Tensor]]]] = {name: {} for name in exposed_experts(model)}
    thresholds = outlier_thresholds(owner, placeholders)
    reasons: dict[str, str] = {}
    for name, module in placeholders.items():
        layout, tensors, dtype = _loaded(name, module, wide)
        block = ".".join(name.split(".")[:-2])  # a layer of an expert is inside of its number
        if block in experts:
            experts[block][name.removeprefix(f"{block}.")] = layout, tensors
            continue
        reasons[name] = _convert_layer(name, module, layout, tensors, dtype, kernels, thresholds.get(name))
    del placeholders
    for name, layers in experts.items():
        convert_experts(name, model.get_submodule(name), layers, kernels)
    return reasons


def _loaded(name: str, module: nn.Module, wide: Collection[str]) -> tuple[Layout, dict[str, Tensor], torch.dtype]:
    """Return layout, loaded tensors and dtype of a placeholder, which is a linear layer without a weight afterwards.

    ``wide`` are the names of parts that keep the dtype of the checkpoint.
    """
    pending: _Pending = module.__dict__.pop(PENDING)
    module.__dict__.pop("quantization_scheme", None)
    tensors: dict[str, Any] = {key: module._parameters.pop(key) for key in pending.keys}
    if any(tensor.is_meta for tensor in tensors.values()):
        raise UnsupportedCheckpoint("its weights are offloaded")
    module.__class__ = pending.former
    dtype = pending.dtype
    if any(part in name.split(".") for part in wide) and dtype.itemsize < 4:
        dtype = next(tensor.dtype for tensor in tensors.values() if tensor.dtype.is_floating_point)
    for key, tensor in tensors.items():
        scale = tensor.dtype.is_floating_point and tensor.dtype.itemsize > 1 and key != GLOBAL
        tensors[key] = tensor.detach().to(dtype).reshape(tensor.shape or (1,)) if scale else tensor.detach()
    return pending.layout, tensors, dtype


@torch.no_grad()
def _convert_layer(
    name: str,
    module: Any,
    layout: Layout,
    tensors: dict[str, Tensor],
    dtype: torch.dtype,
    kernels: tuple[Kernel, ...],
    outliers: float | None,
) -> str:
    """Pack or decode one layer; return the reason why it is on no kernel. ``tensors`` is emptied to free memory."""
    from ..state import attach_scheme, store

    shape = shape_of(module)
    try:
        found, scheme = layout.read(tensors, shape)
    except ValueError as error:
        raise CheckpointError(f"{name}: {error}") from error
    tensors.clear()
    weight = describe_weight(
        name,
        shape,
        scheme,
        _scale_of(found).new_empty(0, dtype=dtype) if holds_float4(found) else _scale_of(found),
        getattr(module, "bias", None),
        lambda: found,
        ordered=found.order is not None,
        sparse24=any(kernel.sparse24 for kernel in kernels) and _is_sparse24(found, scheme.weights.num_bits),
        outliers=outliers,
    )
    prepacked = prepack(weight, kernels) if isinstance(module, nn.Linear) else ROWS
    if not isinstance(prepacked, str):
        attach_scheme(module, scheme, found.input_scale, found.input_zero)
        pack(module, weight, *prepacked)
        return ""
    empty = torch.empty(shape, dtype=dtype, device=weight.device)
    module.register_parameter("weight", nn.Parameter(empty, requires_grad=False))
    store(module, scheme, **store_arguments(found, scheme), g_idx=g_idx_of(found, weight.group_size))
    return prepacked or NO_KERNEL


def _is_sparse24(found: Codes, bits: int) -> bool:
    if found.order is not None or found.codes.dtype != torch.uint8 or holds_float4(found):
        return False
    rows, columns = found.codes.shape
    grouped = found.codes.view(rows, _scale_of(found).shape[1], -1)
    zero = 2 ** (bits - 1) if found.zero is None else found.zero[..., None]
    return is_sparse24((grouped != zero).view(rows, columns))


def _scale_of(found: Codes) -> Tensor:
    assert found.scale is not None
    return found.scale
