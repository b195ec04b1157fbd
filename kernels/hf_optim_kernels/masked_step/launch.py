"""One launch over a table of tensors. The table is on the device, and is renewed when a tensor has moved."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.launch import launch
from .kernel import zero_kernel

BLOCK, _WARPS = 4096, 4
_KINDS = {1: tl.int8, 2: tl.int16, 4: tl.int32, 8: tl.int64}


class Zeroing:
    """Zeroes masked elements of many tensors: built once for their masks, called at every step.

    Args:
        masks: bool, contiguous, on one device. They are not copied: later changes of them take effect.

    Raises ``ValueError`` for other masks.
    """

    def __init__(self, masks: Sequence[Tensor]) -> None:
        if not all(mask.dtype == torch.bool and mask.is_contiguous() for mask in masks):
            raise ValueError("masks must be contiguous tensors of dtype bool")
        self.masks = list(masks)
        self.device = self.masks[0].device
        sizes = [mask.numel() for mask in self.masks]
        chunks = torch.tensor([triton.cdiv(size, BLOCK) for size in sizes])
        owners = torch.repeat_interleave(torch.arange(len(sizes)), chunks)
        within = torch.arange(len(owners)) - (chunks.cumsum(0) - chunks)[owners]
        self._programs = len(owners)
        self._fixed = (
            self._table([mask.data_ptr() for mask in self.masks]),
            self._table(sizes),
            owners.to(torch.int32).to(self.device),
            within.to(torch.int32).to(self.device),
        )
        self._aligned = not any(mask.data_ptr() % 16 for mask in self.masks)
        self._known: list[int] = []
        self._addresses, self._now_aligned, self._width = self._fixed[0], False, 0

    @torch.no_grad()
    def __call__(self, tensors: Sequence[Tensor | None]) -> None:
        """Zero the tensors in place where their masks are False.

        Args:
            tensors: in the order and shapes of the masks, contiguous and of one element width; None is skipped. If no
                tensor has moved since the last call, nothing is copied to the device.

        Raises ``ValueError`` for other tensors, and then writes nothing.
        """
        found = [tensor for tensor in tensors if tensor is not None]
        if not all(map(Tensor.is_contiguous, found)):
            raise ValueError("a tensor to be masked is not contiguous")
        known = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
        if known != self._known:
            self._renew(tensors, found, known)
        if not found or not self._programs:
            return
        key = (self._width, self._now_aligned)
        constants = {"KIND": _KINDS[self._width], "ALIGNED": self._now_aligned, "BLOCK": BLOCK}
        tables = (self._addresses, *self._fixed)
        launch(zero_kernel, (self._programs, 1, 1), tables, constants, num_warps=_WARPS, num_stages=1, key=key)

    def _renew(self, tensors: Sequence[Tensor | None], found: list[Tensor], known: list[int]) -> None:
        widths = {tensor.element_size() for tensor in found}
        if len(widths) > 1 or not widths <= _KINDS.keys():
            raise ValueError(f"tensors with elements of {sorted(widths)} bytes cannot share a table")
        for tensor, mask in zip(tensors, self.masks, strict=True):
            if tensor is not None and (tensor.shape != mask.shape or tensor.device != mask.device):
                raise ValueError(f"a mask of shape {tuple(mask.shape)} does not fit a tensor of {tuple(tensor.shape)}")
        self._width = widths.pop() if widths else 0
        self._now_aligned = self._aligned and not any(address % 16 for address in known)
        self._addresses = self._table(known)
        self._known = known

    def _table(self, numbers: list[int]) -> Tensor:
        # The copy from pinned memory, which PyTorch keeps until it is done, is asynchronous.
        host = torch.tensor(numbers, dtype=torch.int64, pin_memory=self.device.type == "cuda")
        return host.to(self.device, non_blocking=True)
