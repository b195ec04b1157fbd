"""Apply masks to many tensors at once: one launch per device and element width on CUDA.

The kernel package is imported when the first mask is on CUDA; without it, without Triton, and on other devices,
PyTorch's ``foreach`` operators do the same.
"""

from __future__ import annotations

import functools
import importlib
import logging
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

log = logging.getLogger(__name__)

KERNEL = "hf_optim_kernels.masked_step.launch"


class FusedMasking:
    """Zeroes masked elements of tensors whose masks are known in advance.

    Args:
        masks: bool, each on the device of its tensor.
        like: a tensor per mask, with the device and element width of the tensors to be masked.
    """

    def __init__(self, masks: Sequence[Tensor], like: Sequence[Tensor]) -> None:
        groups: dict[Any, list[int]] = defaultdict(list)
        for place, tensor in enumerate(like):
            groups[tensor.device, tensor.element_size()].append(place)
        self._parts = [(places, _part([masks[i] for i in places])) for places in groups.values()]

    @torch.no_grad()
    def __call__(self, tensors: Sequence[Tensor | None]) -> None:
        """Zero each tensor in place where its mask is False; None entries are skipped."""
        for places, part in self._parts:
            part([tensors[i] for i in places])


class _Foreach:
    def __init__(self, masks: list[Tensor]) -> None:
        self._masks = masks

    def __call__(self, tensors: list[Tensor | None]) -> None:
        found = [(tensor, mask) for tensor, mask in zip(tensors, self._masks, strict=True) if tensor is not None]
        if found:
            torch._foreach_mul_([tensor for tensor, _ in found], [mask for _, mask in found])


class _Fused:
    """Masks with the kernel; tensors it does not accept (a gradient with other strides) take the ``foreach`` path.

    So does everything if the kernel cannot be compiled: Triton needs a C compiler, which not every container has.
    """

    def __init__(self, masks: list[Tensor], kernel: Any) -> None:
        self._kernel, self._otherwise = kernel.Zeroing(masks), _Foreach(masks)

    def __call__(self, tensors: list[Tensor | None]) -> None:
        if self._kernel is not None:
            try:
                self._kernel(tensors)
                return
            except ValueError:
                pass
            except Exception as error:
                log.warning("masks are applied without the fused kernel, which failed: %s", error)
                self._kernel = None
        self._otherwise(tensors)


def _part(masks: list[Tensor]) -> _Foreach | _Fused:
    kernel = _kernel() if masks[0].is_cuda else None
    fits = kernel is not None and all(mask.is_contiguous() for mask in masks)
    return _Fused(masks, kernel) if fits else _Foreach(masks)


@functools.cache
def _kernel() -> Any:
    try:
        return importlib.import_module(KERNEL)
    except ImportError:
        return None
