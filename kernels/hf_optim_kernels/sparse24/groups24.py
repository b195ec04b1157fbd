"""Which two columns of every 2:4 group are stored."""

from __future__ import annotations

import torch
from torch import Tensor


def places(kept: Tensor) -> tuple[Tensor, Tensor]:
    """Return which two columns of each 2:4 group are stored: uint8 [..., groups24] each, the first below the second.

    ``kept`` is bool [..., 4 * groups24]. A group with fewer than two entries stores zeros as well, chosen so that a
    single entry in column 0, 1 or 2 comes first. Raises ``ValueError`` if a group has more than two.
    """
    group = kept.unflatten(-1, (-1, 4))
    if bool((group.sum(-1, dtype=torch.uint8) > 2).any()):
        raise ValueError("a group of four consecutive columns has more than two entries that are not zero")
    zero, one, _, three = group.unbind(-1)
    first = torch.where(zero, 0, torch.where(one, 1, 2)).to(torch.uint8)
    last = torch.where(three, 3, torch.where(group[..., 2], 2, torch.where(one, 1, 0))).to(torch.uint8)
    return first, torch.maximum(last, first + 1)
