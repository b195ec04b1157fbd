"""Saving a quantized model as a compressed-tensors checkpoint, through the hook of transformers for quantized models.

``attach_quantizer`` attaches an instance of ``quantizer_class()`` to a model, from which ``save_pretrained`` gets the
state dict. It packs module by module and leaves the model in memory unchanged.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import logging
from collections.abc import Hashable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..errors import ModelError
from ..runs.run import Run, find_run
from ..toolkit.distributed.tensor_parts import require_whole
from ..toolkit.topology.trace_cache import StructureCache
from .codec import scheme_on
from .dense_conversions import keep_model_names
from .experts import (
    discard_decoding,
    expert_schemes,
)
from .packed.mxfp4_experts import native_config, native_experts, native_state_dict
from .quantization_config import quantization_config, stored_schemes
from .state import quantized_modules
from .state_dict import packed_state_dict

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

logger = logging.getLogger(__name__)


@functools.cache
def quantizer_class() -> type:
    """Return the class of quantizer for models in the quantized state; it is created at the first call."""
    from transformers.quantizers.quantizer_compressed_tensors import CompressedTensorsHfQuantizer

    class StoredQuantizer(CompressedTensorsHfQuantizer):
        """A quantizer that saves packed codes, and allows adapters to be trained on top of the frozen weights."""

        use_fp8_kernel = (
            False  # normally set by validate_environment, which runs only when transformers loads a checkpoint
        )
        is_trainable = True
        is_qat_trainable = False  # type: ignore[assignment]  # transformers reads it as a property

        def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
            return True

        def __reduce__(self) -> Any:
            return _empty_quantizer, (), self.__dict__  # a pickle cannot name this class

        def get_state_dict_and_metadata(self, model: Any, *args: Any) -> tuple[dict[str, torch.Tensor] | None, dict]:
            if getattr(model, "_hf_peft_config_loaded", False):
                return None, {}  # save_pretrained then saves the adapter only
            require_whole(model)
            discard_decoding(model)
            keep_model_names(model)
            if native_experts(model):
                self.quantization_config = model.config.quantization_config = native_config(model)
                return native_state_dict(model), {}
            state, off_grid = packed_state_dict(model)
            if off_grid:
                logger.warning(
                    "%d of %d quantized weights have changed since they were quantized (by a merged adapter, a cast, "
                    "or transformers decoding experts) and are saved dense: %s. Quantize again for a smaller "
                    "checkpoint.",
                    len(off_grid),
                    len(quantized_modules(model)),
                    ", ".join(off_grid[:3]) + (", ..." if len(off_grid) > 3 else ""),
                )
            self._update_config(model, set(off_grid))
            return state, {}

        def _update_config(self, model: Any, off_grid: set[str]) -> None:
            # save_pretrained writes model.config after it gets the state dict.
            schemes = stored_schemes(model, off_grid)
            if schemes:
                self.quantization_config = model.config.quantization_config = quantization_config(model, schemes)
            else:
                model.config.__dict__.pop("quantization_config", None)

    return StoredQuantizer


def _empty_quantizer() -> Any:
    return object.__new__(quantizer_class())


def apply_packing_fallback(model: Any) -> None:
    """Store one code per byte, as ``weight``, if transformers cannot prepare a packed model of this class.

    Before transformers reads weights, it initializes the modules. Some classes (T5) access ``module.weight`` to do so,
    which a packed linear layer does not have. This function tries it on a meta model.
    """
    packed = packed_modules(model)
    if packed and not packing_fits(model, packed):
        store_unpacked(model, packed)


def packed_modules(model: Any, inside: str = "") -> dict[str, nn.Module]:
    """Return the quantized linear layers whose codes are packed, by full name; only those in the module ``inside``.

    Fused experts are not included: they are linear layers in the checkpoint only.
    """
    holder = model.get_submodule(inside) if inside else model
    found = quantized_modules(holder).items()
    named = {f"{inside}.{name}" if inside and name else inside + name: m for name, m in found}
    return {n: m for n, m in named.items() if scheme_on(m).format == "pack-quantized" and not expert_schemes(m)}


def store_unpacked(model: Any, packed: Mapping[str, nn.Module]) -> None:
    """Store the codes of these modules one per byte, and note the reason in the model's record."""
    for module in packed.values():
        scheme_on(module).format = "naive-quantized"
    sentence = (
        f"Codes are stored one per byte: transformers cannot prepare a packed {type(model).__name__}, whose "
        "initialization reads the weights of its linear layers."
    )
    if (run := find_run(model)) is not None:
        if sentence in run.record.notes:
            return
        run.record.note(sentence)
    logger.warning(sentence)


class PackingFallback:
    """``apply_packing_fallback`` for a model that is written block by block. The first block decides."""

    def __init__(self) -> None:
        self._packable: bool | None = None

    def apply(self, run: Run, name: str) -> None:
        """Apply the fallback to the module ``name``, before its codes are written."""
        packed = packed_modules(run.model, name)
        if not packed:
            return
        if self._packable is None:
            keep_model_names(run.model)
            self._packable = packing_fits(run.model, packed)
        if not self._packable:
            store_unpacked(run.model, packed)


def packing_fits(model: Any, names: Iterable[str]) -> bool:
    """Return True if transformers can initialize a model whose linear layers of these names have no ``weight``."""
    config = copy.deepcopy(model.config)
    vars(config).pop("quantization_config", None)
    cls, without = type(model), frozenset(names)
    key: Hashable | None = None
    with contextlib.suppress(TypeError):  # a value that is not one of JSON
        key = cls, getattr(cls, "_init_weights", None), config.to_json_string(use_diff=False), without
    fits: bool = _fits.get(key, lambda: _initializes(cls, config, without))
    return fits


_fits = StructureCache()
"""The last results: a step asks before its work, and again when it stores codes."""


def _initializes(cls: Any, config: Any, without: Iterable[str]) -> bool:
    with torch.device("meta"), torch.no_grad():
        meta_model = cls(config)
        for name in without:
            del meta_model.get_submodule(name).weight
        try:
            for module in meta_model.modules():  # built on the meta device, all count as initialized
                module._is_hf_initialized = False
            meta_model.initialize_weights()  # each part of a composite model by its own class, as from_pretrained does
        except Exception:  # of any kind: the code of the class, on a model that lacks weights
            return False
    return True


def attach_quantizer(model: Any) -> None:
    """Make ``model.save_pretrained`` write a compressed-tensors checkpoint, and set the configuration accordingly.

    Call it once the modules are in the quantized state; another call updates the configuration. Raises ``ModelError``
    if no module is quantized.
    """
    apply_packing_fallback(model)
    if native_experts(model):
        config: Any = native_config(model)
        model.hf_quantizer = _empty_quantizer()
        vars(model.hf_quantizer).update(quantization_config=config, pre_quantized=True)
    else:
        schemes = stored_schemes(model)
        if not schemes:
            raise ModelError("no module of this model is quantized")
        config = quantization_config(model, schemes)
        model.hf_quantizer = quantizer_class()(config)
    model.quantization_method = config.quant_method
    model.is_quantized = True
    model.config.quantization_config = config
    for own in model_configs(model):
        own._is_quantized = True


def detach_quantizer(model: Any) -> None:
    """Undo ``attach_quantizer``. The modules keep their state."""
    discard_decoding(model)
    for name in ("hf_quantizer", "quantization_method", "is_quantized"):
        model.__dict__.pop(name, None)
    for config in model_configs(model):
        for name in ("quantization_config", "_is_quantized"):
            vars(config).pop(name, None)


def model_configs(model: nn.Module) -> list[PreTrainedConfig]:
    """Return the configurations of a model and of the models inside it."""
    from transformers import PreTrainedConfig

    found = (getattr(part, "config", None) for part in model.modules())
    return [config for config in found if isinstance(config, PreTrainedConfig)]
