"""Numbers as tensors on a device, each copied there once.

This file is stored beside checkpoints, so it imports only torch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

CONSTANTS = 1024  # that are kept on devices
_constants: dict[tuple[Any, torch.device, torch.dtype], Tensor] = {}


def constant_on(numbers: tuple[Any, ...], device: torch.device, dtype: torch.dtype = torch.int64) -> Tensor:
    """Return numbers as a tensor, made at the first call: later ones, and captured steps, copy nothing from the host.

    It must not be changed.
    """
    key = numbers, device, dtype
    found = _constants.get(key)
    if found is None:
        with torch.inference_mode(False):  # a gradient may need it later
            found = torch.tensor(numbers, dtype=dtype, device=device)
        if type(found) is Tensor and not found.is_meta:  # not one without values, of a model that is analysed
            while len(_constants) >= CONSTANTS:
                _constants.pop(next(iter(_constants)))
            _constants[key] = found
    return found
