"""FlexAttention in encoders, for ``sparse_encoders.py``: a compiled function with the lists of blocks of a mask.

``local`` and ``big_bird`` get the blocks that their masks touch. The natural order of ``strided`` has no empty block, so
FlexAttention visits all of them: permuting the tokens by residue, as this package does, is not part of its interface.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import sparse_layouts
import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

LENGTHS = (1024, 4096, 16384, 65536, 131072)
LINEAR = ("local", "big_bird")  # of the masks, those with a bounded number of keys
LIKE_A_TECHNIQUE = ("local", "strided")  # masks of the same pairs as the settings of ``sparse_encoders.py``
BLOCK, STRIDE = 128, 128


def strided(n: int, device: str) -> Any:
    """Return the mask of tokens a multiple of 128 apart, and of those less than 128 away: every block has some."""
    from torch.nn.attention.flex_attention import BlockMask

    def mask_mod(b: Any, h: Any, q: Any, k: Any) -> Any:
        return ((q - k) % STRIDE == 0) | ((q - k < STRIDE) & (k - q < STRIDE))

    blocks = -(-n // BLOCK)
    counts = torch.full((1, 1, blocks), blocks, dtype=torch.int32, device=device)
    index = torch.arange(blocks, dtype=torch.int32, device=device).expand(1, 1, blocks, blocks).contiguous()
    return BlockMask.from_kv_blocks(counts, index, BLOCK_SIZE=BLOCK, mask_mod=mask_mod, seq_lengths=(n, n))


def of_layout(make: Any) -> Any:
    """Return a function of length and device that returns the ``BlockMask`` of a pattern of ``sparse_layouts``."""

    def made(n: int, device: str) -> Any:
        pattern = make(n, device)
        return sparse_layouts.block_mask(pattern, sparse_layouts.layout(pattern, BLOCK, 1))

    return made


MASKS = {
    "local": of_layout(sparse_layouts.window),
    "big_bird": of_layout(sparse_layouts.big_bird),
    "strided": strided,
}


@lru_cache(maxsize=2)
def _mask(name: str, n: int, device: str) -> Any:
    return MASKS[name](n, device)


@lru_cache(maxsize=1)
def _compiled() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    torch._dynamo.config.recompile_limit = 64  # one version for each mask and length
    return torch.compile(flex_attention, dynamic=False)


def use(model: Any, name: str) -> None:
    """Let a model of transformers compute its attention by FlexAttention under a mask of ``MASKS``, without padding."""

    def attention(
        module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float | None = None, **_: Any
    ) -> tuple[Tensor, None]:
        blocks = _mask(name, query.shape[2], query.device.type)
        return _compiled()(query, key, value, block_mask=blocks, scale=scaling).transpose(1, 2).contiguous(), None

    AttentionInterface.register(f"flex_{name}", attention)
    AttentionMaskInterface.register(f"flex_{name}", lambda **_: None)
    model.set_attn_implementation(f"flex_{name}")
