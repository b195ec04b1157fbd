"""Forwards in float64 of classes that cast to float32, as norms and rotary embeddings do."""

from __future__ import annotations

import torch
from torch.overrides import TorchFunctionMode

CASTS = (torch.Tensor.to, torch.Tensor.float, torch.Tensor.type)


class DoublePrecision(TorchFunctionMode):
    """Leaves float64 tensors as they are where a forward would cast them to float32."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        single = func is torch.Tensor.float or torch.float32 in args[1:] or kwargs.get("dtype") == torch.float32
        if func in CASTS and args[0].dtype == torch.float64 and single:
            return args[0]
        if kwargs.get("dtype") == torch.float32:
            kwargs["dtype"] = torch.float64
        return func(*args, **kwargs)


def exact_logits(model, inputs):
    """Return the logits of a float64 model, computed in float64 throughout."""
    with DoublePrecision(), torch.no_grad():
        return model(**inputs).logits
