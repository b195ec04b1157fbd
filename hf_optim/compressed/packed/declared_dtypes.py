"""The dtypes of a model's floating-point tensors, kept where the loader of transformers does not cast what it reads.

That of 5.17 leaves every tensor of a quantized checkpoint whose name it converts in the dtype of the file (the
routers of Mixtral, for one). A model loaded in another dtype then has layers that do not take each other's outputs.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

STRICT = "_keep_in_fp32_modules_strict"


def declared_dtypes(model: nn.Module) -> dict[str, torch.dtype]:
    """Return the dtype that each floating-point parameter and buffer of a model on the meta device is to be loaded in.

    It is the tensor's own, but float32 where the class of the model says so (``_keep_in_fp32_modules`` in float16,
    ``_keep_in_fp32_modules_strict`` also in bfloat16).
    """
    strict = {*(getattr(model, STRICT, None) or ())}
    kept = {torch.bfloat16: strict, torch.float16: {*strict, *(getattr(model, "_keep_in_fp32_modules", None) or ())}}
    return {
        name: torch.float32 if _named(name, kept.get(value.dtype, ())) else value.dtype
        for name, value in model.state_dict().items()
        if value.is_floating_point()
    }


def _named(name: str, patterns: Any) -> bool:
    return any(re.search(pattern.replace("*", ".*"), name) for pattern in patterns)


@torch.no_grad()
def cast_to_declared(model: nn.Module, declared: Mapping[str, torch.dtype]) -> None:
    """Cast the loaded tensors of a model to what ``declared_dtypes`` returned before; tied ones stay tied."""
    loaded: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    loaded |= dict(model.named_buffers(remove_duplicate=False))
    for name, dtype in declared.items():
        tensor = loaded.get(name)
        if tensor is not None and tensor.dtype != dtype:
            tensor.data = tensor.data.to(dtype)
