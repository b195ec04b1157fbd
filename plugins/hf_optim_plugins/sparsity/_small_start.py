"""Branches that begin small in the residual stream of the model, as its own layers do.

The authors draw embeddings of size 1, and projections by Glorot. transformers' decoders draw all matrices with one
small standard deviation, so embeddings are of its size (0.02), and values by Glorot, of size 0.7, would drown them: a
model of few steps learns only the frequencies of tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ._sparse_qkv_modules import SparseQKV
from ._terraformer_modules import RecurrentBranch


@torch.no_grad()
def begin_small(model: nn.Module, std: float) -> None:
    """Scale values, and outputs of recurrences, to the size that two matrices of ``std`` would give, in place.

    That is ``d std^2`` for an input of size 1. Nothing is made larger.
    """
    for module in model.modules():
        if isinstance(module, SparseQKV):
            part: Any = module.value
            width = module.settings.width
            now = (0.5 * width / (width + width // module.settings.modules)) ** 0.5
        elif isinstance(module, RecurrentBranch):
            part, width, now = module.up, module.up.out_features, 1.0
        else:
            continue
        part.weight.mul_(min(1.0, width * std * std / now))
