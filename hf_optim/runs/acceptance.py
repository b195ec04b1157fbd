"""Which models a run accepts: whole in memory, not wrapped, not compiled, with finite floating-point weights.

Everything here is checked before any work, since such a model fails later in the middle of another library, or gives a
wrong result: hooks of a compiled model do not run, and a weight on the meta device has no values.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from transformers import PreTrainedModel

from ..errors import ModelError, NumericalError
from ..toolkit.modules.finite import nonfinite_tensors

OFFLOAD = (
    "load the whole model on one device (leave device_map out, or device_map={'': 'cpu'}), or compress the checkpoint "
    "block by block with `hf-optim compress MODEL --recipe R --output D --driver streamed`"
)


def require_model(model: Any) -> None:
    """Raise ``ModelError`` with the remedy unless ``model`` is a plain transformers model that is whole in memory."""
    if not isinstance(model, PreTrainedModel):
        raise ModelError(_not_a_model(model))
    kind = type(model).__name__
    compiled = next((n or kind for n, m in model.named_modules() if _is_compiled(m)), None)
    if compiled is not None:
        raise ModelError(
            f"{compiled} was compiled, and hooks of a compiled module do not run: optimize the model first, then "
            "compile it"
        )
    adapted = next((n for n, m in model.named_modules() if hasattr(m, "lora_A") or hasattr(m, "get_base_layer")), None)
    if adapted is not None:
        raise ModelError(
            f"{adapted} of {kind} holds adapters: merge them first (merge_and_unload() of the PeftModel), or take the "
            "model without them"
        )
    require_in_memory(model)
    _require_constant_weights(model)
    for name, parameter in model.named_parameters():
        if parameter.is_inference():
            raise ModelError(
                f"{name} of {kind} was created under torch.inference_mode(), so it cannot be changed: load the model "
                "outside of it"
            )
    for name, module in model.named_modules():
        weight = module._parameters.get("weight") if isinstance(module, nn.Linear) else None
        foreign = weight is not None and not weight.is_floating_point()
        if foreign and getattr(module, "quantization_scheme", None) is None:
            raise ModelError(
                f"{name}.weight of {kind} holds {str(weight.dtype).removeprefix('torch.')} codes of another quantizer: "  # type: ignore[union-attr]
                "load the original model in a floating-point dtype"
            )


def _require_constant_weights(model: Any) -> None:
    """Raise ``ModelError`` for RWKV models that divide the weights of deep layers, in place, at their first forward.

    The divided weights would be quantized and saved, and divided again when they are loaded.
    """
    every, layers = (getattr(model.config, key, 0) for key in ("rescale_every", "num_hidden_layers"))
    if every and layers > every and any(hasattr(module, "_rescale_layers") for module in model.modules()):
        raise ModelError(
            f"the forward of {type(model).__name__} divides weights in place every {every} layers: load it with "
            "from_pretrained(..., rescale_every=0), which gives the same outputs in bfloat16 and float32",
            cli=f"the forward of {type(model).__name__} divides weights in place every {every} layers: set "
            "rescale_every to 0 in its config.json, which gives the same outputs in bfloat16 and float32",
        )


def require_in_memory(model: nn.Module) -> None:
    """Raise ``ModelError`` if parameters or buffers have no data: offloaded by accelerate, or never loaded."""
    tensors = (*model.named_parameters(), *model.named_buffers())
    empty = [name for name, tensor in tensors if tensor.is_meta]
    if not empty:
        return
    kind, few = type(model).__name__, ", ".join(empty[:3]) + (" ..." if len(empty) > 3 else "")
    if any(hasattr(module, "_hf_hook") for module in model.modules()) or getattr(model, "hf_device_map", None):
        raise ModelError(f"{len(empty)} tensors of {kind} are offloaded to the CPU or to disk ({few}): {OFFLOAD}")
    raise ModelError(
        f"{len(empty)} tensors of {kind} are on the meta device and have no values ({few}): load the weights with "
        "from_pretrained, or build the model without init_empty_weights"
    )


def require_runnable(model: nn.Module) -> None:
    """Raise ``ModelError`` for a compressed model with offloaded weights, which stock transformers cannot run either.

    An offloaded model that is not compressed runs as it is.
    """
    if getattr(getattr(model, "config", None), "quantization_config", None) is not None:
        require_in_memory(model)


def require_in_memory_map(device_map: Any) -> None:
    """Raise ``ModelError`` if a ``device_map`` names the disk or the meta device, before anything is loaded."""
    places = device_map.values() if isinstance(device_map, dict) else (device_map,)
    for place in places:
        if str(place) in ("disk", "meta"):
            raise ModelError(
                f"device_map puts modules on {str(place)!r}, where they have no values in memory: {OFFLOAD}"
            )


def require_finite(module: nn.Module, prefix: str, doing: str) -> None:
    """Raise ``NumericalError`` if weights of ``module`` are not finite.

    Args:
        module: a model or a block of it.
        prefix: the name of the block in its model; empty for the model.
        doing: how the message begins, such as the label of the step that wrote the weights.
    """
    refuse_nonfinite([f"{prefix}.{name}" if prefix else name for name in nonfinite_tensors(module)], doing)


def refuse_nonfinite(names: list[str], doing: str = "") -> None:
    """Raise ``NumericalError`` naming these tensors; nothing is raised for an empty list.

    Without ``doing``, the tensors were read from the model to be optimized.
    """
    if not names:
        return
    few = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
    if doing:
        raise NumericalError(
            f"{doing}: {few} would hold NaN or infinite values; load the model in bfloat16 or float32 (float16 ends at "
            "65504), or leave these layers out with `skip`"
        )
    raise NumericalError(
        f"{few}: the weights of the model hold NaN or infinite values, so no step can work on them; the checkpoint is "
        "damaged, or was saved in a dtype whose range it exceeds"
    )


def _not_a_model(model: Any) -> str:
    """Return why an object that is not a ``PreTrainedModel`` is refused, and what to pass instead."""
    kind = type(model).__name__
    if isinstance(model, (DataParallel, DistributedDataParallel)):
        return f"the model is wrapped in {kind}: pass model.module, and wrap the result"
    if hasattr(model, "_orig_mod"):
        return "the model was compiled by torch.compile: pass model._orig_mod, and compile the result"
    if hasattr(model, "peft_config"):
        return f"{kind} holds adapters: merge them first (model = model.merge_and_unload()), and pass the result"
    if hasattr(model, "_fsdp_wrapped_module"):
        return f"the model is wrapped in {kind} (FSDP1): optimize it before it is wrapped"
    if isinstance(getattr(model, "module", None), nn.Module):
        return f"the model is wrapped in {kind}: pass model.module, and wrap the result"
    if isinstance(model, nn.Module):
        return f"{kind} is not a transformers model (PreTrainedModel), so it has no configuration and no checkpoint"
    return f"expected a transformers model, not a {kind}: load it with from_pretrained(...)"


def _is_compiled(module: nn.Module) -> bool:
    # A module compiled by torch.compile holds the original as _orig_mod; importing its class would import the compiler.
    return getattr(module, "_compiled_call_impl", None) is not None or "_orig_mod" in module._modules
