"""Fast kernels for a model in memory: ``accelerate`` packs its layers, ``restore`` unpacks them.

A layer on a kernel is the same module with another class, ``PackedLinear``: it keeps its compressed weight in the
kernel's layout and no dense one. No class is modified and no global state changes. ``save_pretrained`` writes the same
checkpoint as before.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from torch import nn

from ...errors import ModelError, require_any_model
from ...runs.acceptance import require_runnable
from ...runs.progress import progress
from ...runs.run import Run, find_run
from ...toolkit import attention, experts, packing, topology
from ...toolkit.offloading import find_state, restore_weights
from ...toolkit.topology.linear_layers import parameter_names
from ..experts import expert_schemes, has_decoding
from ..outlier_columns import outlier_thresholds
from ..quantized_forward import release_forwards
from . import codebook_layers
from .describe import describe_module
from .expert_swap import pack_stored, unpack_experts
from .fused_norm import fuse_norms
from .fused_projections import fuse_projections
from .installed import installed_kernels
from .kernel import NO_KERNEL, Kernel
from .packed_experts import PackedExperts
from .packed_linear import KernelWarning, PackedLinear
from .swap import pack, prepack, unpack, unsupported_reason, writes_weights

if TYPE_CHECKING:
    from transformers import CompileConfig

__all__ = [
    "accelerate",
    "compile_config",
    "kernels_for",
    "pack_layers",
    "restore",
]

UNSUPPORTED = "_hf_optim_unsupported"
ATTACHED = "_hf_optim_attached"
NOT_COMPRESSED = "not compressed"
WRITES_WEIGHTS = "the forward of the model writes to its weight"


def accelerate(model: nn.Module, kernels: Iterable[Kernel] | None = None) -> nn.Module:
    """Run the compressed layers of ``model`` on kernels, in place, where that is possible and faster.

    The kernels are those that the model's own recipe registers (``register_kernels``), then the installed ones
    (entry-point group ``hf_optim.kernels``). A layer on a kernel drops its dense weight. A layer that no kernel
    supports stays as it is, and one ``KernelWarning`` lists those layers with the reasons. Layers already on a kernel
    are kept; a layer that fell back to the dense path is tried again.

    Layers that read the same tensor, such as q, k and v, run as one product if their kernel can join them: the first
    one called computes the output of all. They remain separate modules. A norm that feeds only layers whose kernel can
    take quantized inputs from it quantizes its output in its own kernel (on a CUDA device, where that saves a launch).

    Experts of a mixture compute with hf_optim's function, on kernels where the model is on a CUDA device, unless an
    implementation other than transformers' own was chosen (``experts_implementation``). Experts whose configuration
    states a capacity (``capacity_routing``) compute with it from now on, and an encoder whose configuration says so
    computes no padding (``padding_removal``).

    Args:
        model: a model, or a wrapper around one (peft).
        kernels: try these instead, in this order.

    Raises ``ModelError`` for a model that is offloaded (``offload``), and for a compressed one that accelerate has
    offloaded to the CPU or to disk.
    """
    require_any_model(model)
    require_runnable(model)
    if find_state(model) is not None:
        raise ModelError(
            f"this {type(model).__name__} is offloaded, and its layers cannot be packed: call hf_optim.restore(model), "
            "then accelerate, then hf_optim.offload"
        )
    experts.attach_stored_settings(model)
    experts.attach_experts(model)
    packing.attach_stored_packing(model)
    attention.attach_again(model)
    pack_layers(model, tuple(kernels) if kernels is not None else kernels_for(model), {})
    return model


def pack_layers(model: nn.Module, kernels: tuple[Kernel, ...], decided: Mapping[str, str]) -> None:
    """Put the layers of ``model`` on ``kernels``, fuse projections and norms, and warn about unsupported layers.

    Args:
        model: a model, or a wrapper around one (peft).
        kernels: in order of preference.
        decided: layers that were tried already, with the reason why no kernel runs them (``""`` if one does).
    """
    look_for_24 = any(kernel.sparse24 for kernel in kernels)
    shared = shared_weights(model)
    linears = topology.linears(model)
    thresholds = outlier_thresholds(model, linears)
    unsupported = dict(decided)
    if writes_weights(model):
        unsupported = dict.fromkeys(linears, WRITES_WEIGHTS)
    with progress(linears.items(), "packing layers for kernels", unit="layers") as shown:
        for name, module in shown:
            if name in unsupported:
                continue
            if isinstance(module, PackedLinear):
                if not module.packing.failure:
                    continue
                unpack(module)
            decompress(module)
            other = shared.get(f"{name}.weight", "")
            unsupported[name] = _pack(name, module, kernels, look_for_24, other, thresholds.get(name))
    unsupported |= _pack_experts(model, kernels)
    for name, module in codebook_layers.codebook_linears(model).items():
        unsupported[name] = codebook_layers.try_kernels(module, kernels)
    _decompress_rest(model)
    release_forwards(model)
    inner = _pretrained(model)
    if inner is not None:
        fuse_norms(inner, fuse_projections(inner))
    model.__dict__[UNSUPPORTED] = {name: reason for name, reason in unsupported.items() if reason}
    make_savable(model)
    _warn_unsupported({name: reason for name, reason in unsupported.items() if reason not in ("", NOT_COMPRESSED)})


def finish_packed(model: nn.Module, decided: Mapping[str, str]) -> None:
    """Have a model whose layers were packed one by one saved as it was stored, and warn about unsupported layers.

    ``decided``: the reason why no kernel runs a layer, ``""`` if one does.
    """
    from ..quantizer import attach_quantizer, detach_quantizer
    from ..state import quantized_modules

    detach_quantizer(model)
    if quantized_modules(model):
        attach_quantizer(model)
    release_forwards(model)
    model.__dict__[UNSUPPORTED] = {name: reason for name, reason in decided.items() if reason}
    make_savable(model)
    _warn_unsupported({name: reason for name, reason in decided.items() if reason not in ("", NOT_COMPRESSED)})


def _pack_experts(model: nn.Module, kernels: tuple[Kernel, ...]) -> dict[str, str]:
    """Pack the quantized experts of a model; return for each module the reason why no kernel runs it, or ``""``."""
    found = {}
    for name, module in list(model.named_modules()):
        if not expert_schemes(module):
            continue
        if isinstance(module, PackedExperts):
            if not module.packing.failure:
                continue
            unpack_experts(module)
        if expert_schemes(module):
            found[name] = pack_stored(name, module, kernels)
    return found


def make_savable(model: nn.Module) -> None:
    """Make ``save_pretrained`` write the stored format of packed layers, also of a model that others quantized.

    The same for layers that stock transformers loaded and that were only decompressed: it would save their dense
    weights beside the scales, which no loader reads, and cannot save experts that it decoded.
    """
    inner: Any = _pretrained(model)
    if inner is None:
        return
    quantized = [module for module in model.modules() if hasattr(module, "quantization_scheme")]
    former = getattr(inner, "hf_quantizer", None)
    decoded = former is not None and (has_decoding(inner) or any(_is_decompressed(module) for module in quantized))
    if not decoded and not any(isinstance(module, (PackedLinear, PackedExperts)) for module in quantized):
        return
    from ..quantizer import attach_quantizer, detach_quantizer, quantizer_class

    if not quantized and not any(expert_schemes(module) for module in model.modules()):
        detach_quantizer(inner)  # of experts alone, which are decoded for good
    elif not isinstance(former, quantizer_class()):
        inner.__dict__[ATTACHED] = former is None
        attach_quantizer(inner)


def _is_decompressed(module: nn.Module) -> bool:
    """Return True for a layer with a dense weight that was stored as codes."""
    args = getattr(module.quantization_scheme, "weights", None)
    status = getattr(module, "quantization_status", None)
    return args is not None and getattr(status, "value", status) == "decompressed"


def restore(model: nn.Module) -> nn.Module:
    """Undo ``accelerate``: every layer gets back the weight and the forward it had before, bit-exact.

    The weights of an offloaded model (``offload``) are brought back to its device first, all of them.
    Experts compute with the implementation that they had before, and without a capacity (``capacity_routing``), as in
    stock transformers, until ``accelerate`` is called. An encoder has its stock forward, too.

    So has the attention of a technique, sparse or learned: the model computes the attention of its stock class with the
    weights that it has, and the function and mask of the technique leave transformers' registries with the last model
    that used them. Its settings stay in the configuration, and ``accelerate`` attaches them. Techniques that replaced
    modules of the model (``reformer``, ``routing_transformer``, ``set_transformer``, ``transformer_xl``,
    ``compressive_transformer``, ``mqa``, ``act``) stay: no stock class computes these. Other models without packed
    layers are left unchanged.
    """
    from ..quantizer import detach_quantizer

    require_any_model(model)
    restore_weights(model)
    for module in list(model.modules()):
        if isinstance(module, PackedLinear):
            unpack(module)
        if isinstance(module, PackedExperts):
            unpack_experts(module)
        codebook_layers.unpack(module)
    experts.detach_settings(model)
    experts.detach_experts(model)
    packing.detach_packing(model)
    attention.detach(model)
    model.__dict__.pop(UNSUPPORTED, None)
    inner = _pretrained(model)
    if inner is not None and inner.__dict__.pop(ATTACHED, False):
        detach_quantizer(inner)
    return model


_REGISTERED: WeakKeyDictionary[Run, tuple[Kernel, ...]] = WeakKeyDictionary()


def kernels_for(model: nn.Module) -> tuple[Kernel, ...]:
    """Return the kernels that the model's run registers, then the installed ones."""
    run = find_run(model)
    registered = () if run is None else _registered_by(run)
    return registered + tuple(kernel for kernel in installed_kernels() if kernel not in registered)


def _registered_by(run: Run) -> tuple[Kernel, ...]:
    """Return the kernels of a run's ``register_kernels`` hooks, which are called once per run."""
    if run in _REGISTERED:
        return _REGISTERED[run]
    found: list[Kernel] = []

    def register(kernel: Kernel) -> None:
        if not isinstance(kernel, Kernel):
            raise TypeError(f"register_kernels gave a {type(kernel).__name__}, not an hf_optim.Kernel")
        if kernel not in found:
            found.append(kernel)

    run.call_on(run.recipe.steps, "register_kernels", register=register)
    _REGISTERED[run] = tuple(found)
    return _REGISTERED[run]


def _pack(
    name: str,
    module: nn.Module,
    kernels: tuple[Kernel, ...],
    look_for_24: bool,
    shared: str,
    outliers: float | None,
) -> str:
    """Pack a layer for the first kernel that supports it; return the reason why none does, or ``""``.

    ``shared`` is another name of its weight (``""`` if it has none), ``outliers`` its outlier threshold.
    """
    compressed = getattr(module, "quantization_scheme", None) is not None
    if not isinstance(module, nn.Linear):
        return f"a {type(module).__name__} is not laid out as nn.Linear" if compressed else NOT_COMPRESSED
    weight = describe_module(name, module, look_for_24, outliers)
    if isinstance(weight, str):
        return weight or NOT_COMPRESSED
    if shared:
        return tied_reason(shared) if compressed else NOT_COMPRESSED
    found = prepack(weight, kernels)
    if isinstance(found, str):
        return found or (NO_KERNEL if compressed else NOT_COMPRESSED)
    if reason := unsupported_reason(module):
        return reason
    pack(module, weight, *found)
    return ""


def tied_reason(shared: str) -> str:
    """Return why a compressed layer whose weight has another name runs dense."""
    return f"its weight is tied to {shared}"


def shared_weights(model: nn.Module) -> dict[str, str]:
    """Map the name of each parameter that has several names to another one of them."""
    several = [names for names in parameter_names(model).values() if len(names) > 1]
    return {name: names[i == 0] for names in several for i, name in enumerate(names)}


def decode_loaded(model: nn.Module) -> None:
    """Give the layers of a compressed checkpoint that stock transformers loaded their weights, as a forward would.

    Until the first forward of the whole model they have none, so that a part of it cannot be called.
    """
    for module in model.modules():
        decompress(module)
    _decompress_rest(model)


def decompress(module: nn.Module) -> None:
    """Decompress one layer that stock transformers loaded, as compressed-tensors would at the first forward."""
    status = getattr(module, "quantization_status", None)
    if getattr(status, "value", None) == "compressed" and "weight_scale" in module._parameters:
        from compressed_tensors.compressors.base import decompress_module

        decompress_module(module)


def _decompress_rest(model: nn.Module) -> None:
    """Decompress the modules that are not linear layers, and remove the hook that would do it at the first forward."""
    for module in model.modules():
        if "ct_decompress_hook" in module.__dict__:
            for part in module.modules():
                decompress(part)
            module.ct_decompress_hook.remove()  # type: ignore[union-attr, operator]
            del module.ct_decompress_hook


def _pretrained(model: nn.Module) -> nn.Module | None:
    from transformers import PreTrainedModel

    return next((part for part in model.modules() if isinstance(part, PreTrainedModel)), None)


def _warn_unsupported(unsupported: Mapping[str, str]) -> None:
    by_reason: dict[str, list[str]] = {}
    for name, reason in unsupported.items():
        by_reason.setdefault(reason, []).append(name)
    if by_reason:
        parts = [f"{_few(names)} ({reason})" for reason, names in by_reason.items()]
        text = "these layers run on dense kernels, not on compressed ones: " + "; ".join(parts)
        warnings.warn(text, KernelWarning, stacklevel=4)


def _few(names: list[str], most: int = 3) -> str:
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest


def compile_config(**changes: Any) -> CompileConfig:
    """Return a ``CompileConfig`` with which ``generate`` compiles a model without guards on its modules.

    Before each compiled step torch checks about a hundred attributes and tensors per block: 2.7 of the 6.9
    milliseconds of a step of a W4A16 8B model on an H200 with a slow host. This configuration omits these checks::

        model.generate(..., cache_implementation="static", compile_config=hf_optim.compile_config())

    The modules must then not change: the compiled step does not detect ``restore``, adapters or other weights. Call
    ``torch.compiler.reset()`` after such a change. Guards on the inputs remain.

    Args:
        changes: other fields of transformers' ``CompileConfig``.
    """
    import torch
    from transformers import CompileConfig

    options = {"triton.cudagraphs": True, "guard_filter_fn": torch.compiler.skip_guard_on_all_nn_modules_unsafe}
    return CompileConfig(**{"fullgraph": True, "mode": None, "options": options, **changes})
