"""Stacked experts that transformers' grouped product computes only where it takes their sizes and dtype.

PyTorch's grouped product needs rows of a multiple of 16 bytes, and no float64: whether it takes experts changes with
their dtype. Experts that it does not take are computed one by one, by the forward of their class.

This file is stored with checkpoints, so it imports only torch.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn

GROUPED = "grouped_mm"
GROUPED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def fits_grouped_product(experts: nn.Module) -> bool:
    """Return True if PyTorch's grouped product takes the stacked matrices of a module, also in the backward."""
    stacks = [p for p in experts.parameters(recurse=False) if p.dim() == 3]
    return all(
        p.dtype in GROUPED_DTYPES and all(size * p.element_size() % 16 == 0 for size in p.shape[1:]) for p in stacks
    )


def grouped_where_it_fits(experts_class: Any) -> Any:
    """Decorate a class that transformers' ``use_experts_implementation`` has decorated."""
    dispatched = experts_class.forward
    one_by_one = dispatched.__wrapped__

    @functools.wraps(one_by_one)
    def forward(self: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        is_grouped = self.config._experts_implementation == GROUPED
        chosen = one_by_one if is_grouped and not fits_grouped_product(self) else dispatched
        return chosen(self, *args, **kwargs)

    experts_class.forward = forward
    return experts_class
