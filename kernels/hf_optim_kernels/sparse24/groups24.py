"""Which two columns of every four are stored."""

from __future__ import annotations

import torch
from torch import Tensor


def places(kept: Tensor) -> tuple[Tensor, Tensor]:
    """Which two columns of each four are stored: uint8 [..., fours] each, the first below the second.

    ``kept`` is bool [..., 4 * fours]. A four with fewer than two entries stores zeros beside them, chosen so that an
    only entry in column 0, 1 or 2 comes first. Raises ``ValueError`` where a four has more than two.
    """
    four = kept.unflatten(-1, (-1, 4))
    if bool((four.sum(-1, dtype=torch.uint8) > 2).any()):
        raise ValueError("some four consecutive columns have more than two entries that are not zero")
    zero, one, _, three = four.unbind(-1)
    first = torch.where(zero, 0, torch.where(one, 1, 2)).to(torch.uint8)
    last = torch.where(three, 3, torch.where(four[..., 2], 2, torch.where(one, 1, 0))).to(torch.uint8)
    return first, torch.maximum(last, first + 1)
