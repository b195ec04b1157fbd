"""PyTorch's attention for queries and keys of different numbers, without a plan for each of them.

This file is stored beside checkpoints, so it imports only torch.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.backends import cuda
from torch.nn import functional


def dense_product(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    dropout: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """Return ``torch.nn.functional.scaled_dot_product_attention``, by another of its backends than cuDNN.

    cuDNN makes a plan for each pair of lengths. In PyTorch 2.11 on an H200 that takes 10 ms, the attention of a new
    token 20 us, and each token of a text has a number of keys of its own. Where both lengths are equal it is left the
    choice. Heads of keys are shared by an equal number of query heads each. Arguments and result as in PyTorch.
    """
    shared = key.shape[1] != query.shape[1]
    avoided = query.is_cuda and query.shape[2] != key.shape[2] and not torch.compiler.is_compiling()
    avoided = avoided and cuda.cudnn_sdp_enabled()
    if avoided:
        cuda.enable_cudnn_sdp(False)
    try:
        return functional.scaled_dot_product_attention(
            query, key, value, mask, dropout, is_causal=is_causal, scale=scale, enable_gqa=shared
        )
    finally:
        if avoided:
            cuda.enable_cudnn_sdp(True)
