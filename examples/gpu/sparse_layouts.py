"""Patterns of the benchmark of block-sparse attention, and their layouts: blocks are tried in bulk on the device.

A pattern is a predicate on positions (also the ``mask_mod`` of FlexAttention), the pairs of blocks that may have a
visible pair, and an order of tokens. ``layout`` is the only part that knows the format of the operator.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from hf_optim_kernels.sparse_attention.naive import Layout

# Pairs of blocks whose masks are computed at a time, in elements.
CHUNK = 1 << 26


class Pattern(NamedTuple):
    """Which tokens see which.

    Attributes:
        predicate: positions of query and key -> bool; broadcasts, and traces in FlexAttention.
        candidates: block -> pairs ``[n, 2]`` of blocks of places that may see each other, each once.
        order: the token at each place; None: its position.
    """

    name: str
    n: int
    predicate: Callable
    candidates: Callable
    order: Tensor | None = None


def window(n: int, device: str, behind: int = 256, ahead: int = 256) -> Pattern:
    """``behind`` tokens before a query and ``ahead`` after it; 0 ahead is causal."""

    def predicate(q, k):
        return (k >= q - behind) & (k <= q + ahead)

    def candidates(block):
        return _band(n, block, behind, ahead, device)

    return Pattern(f"window {behind}" + ("" if ahead else " causal"), n, predicate, candidates)


def global_tokens(n: int, device: str, count: int = 64, side: int = 256) -> Pattern:
    """A window, and the first tokens, which see all and are seen by all (Longformer, ETC)."""

    def predicate(q, k):
        return ((k >= q - side) & (k <= q + side)) | (q < count) | (k < count)

    def candidates(block):
        blocks, wide = -(-n // block), -(-count // block)
        every = torch.arange(blocks, device=device)
        few = torch.arange(min(wide, blocks), device=device)
        pairs = torch.cartesian_prod(few, every)
        return torch.cat([_band(n, block, side, side, device), pairs, pairs.flip(1)]).unique(dim=0)

    return Pattern(f"globals {count}", n, predicate, candidates)


def big_bird(n: int, device: str, size: int = 64, drawn: int = 3, seed: int = 0) -> Pattern:
    """Blocks of ``size``: three neighbours, the first and the last global, and ``drawn`` random ones of each row."""
    blocks = -(-n // size)
    number = torch.arange(blocks, device=device)
    seen = (number - number[:, None]).abs() <= 1
    seen[[0, -1]] = True
    seen[:, [0, -1]] = True
    scores = torch.rand(blocks, blocks, generator=torch.Generator(device).manual_seed(seed), device=device)
    chosen = scores.masked_fill(seen, -1.0).topk(min(drawn, blocks), dim=1).indices
    seen.scatter_(1, chosen, True)

    def predicate(q, k):
        return seen[q // size, k // size]

    def candidates(block):
        pairs = seen.nonzero()
        if block >= size:
            return (pairs // (block // size)).unique(dim=0)
        parts = torch.cartesian_prod(*[torch.arange(size // block, device=device)] * 2)
        return (pairs[:, None] * (size // block) + parts).flatten(0, 1).unique(dim=0)

    return Pattern("big bird", n, predicate, candidates)


def strided(n: int, device: str, stride: int = 32) -> Pattern:
    """Tokens a multiple of ``stride`` apart: dense in natural order, blocks when tokens are sorted by their rest."""
    order = torch.arange(n, device=device).view(-1, stride).T.flatten()

    def predicate(q, k):
        return q % stride == k % stride

    def candidates(block):
        length = n // stride
        first = torch.arange(-(-n // block), device=device) * block // length
        last = ((torch.arange(-(-n // block), device=device) + 1) * block - 1).clamp(max=n - 1) // length
        return ((first[:, None] <= last) & (first <= last[:, None])).nonzero()

    return Pattern(f"strided {stride}", n, predicate, candidates, order)


def _band(n: int, block: int, behind: int, ahead: int, device: str) -> Tensor:
    """Pairs of blocks that a window touches."""
    number = torch.arange(-(-n // block), device=device)
    reach = torch.arange((-behind) // block, -(-ahead // block) + 1, device=device)
    pairs = torch.stack([number[:, None].expand(-1, len(reach)), number[:, None] + reach], -1).flatten(0, 1)
    return pairs[(pairs[:, 1] >= 0) & (pairs[:, 1] < len(number))]


def layout(pattern: Pattern, block: int, heads: int) -> Layout:
    """The layout of a pattern, the same for all heads."""
    pairs = pattern.candidates(block)
    pairs = pairs[(pairs * block < pattern.n).all(1)]
    pairs = pairs[torch.argsort(pairs[:, 0] * (1 << 32) + pairs[:, 1])]
    device, n, places = pairs.device, pattern.n, -(-pattern.n // block) * block
    order = torch.arange(places, device=device)
    order = order.masked_fill(order >= n, -1) if pattern.order is None else _filled(pattern.order, places)
    inside, shifts = torch.arange(block, device=device), torch.arange(32, device=device)
    words, whole, some = [], [], []
    for chunk in pairs.split(max(1, CHUNK // block**2)):
        q, k = (order[chunk[:, side, None] * block + inside] for side in (0, 1))
        # Empty places are shown, so that a ragged block is whole: the operator leaves them out.
        real = (q >= 0)[:, :, None] & (k >= 0)[:, None]
        seen = pattern.predicate(q.clamp(min=0)[:, :, None], k.clamp(min=0)[:, None])
        whole.append((seen | ~real).flatten(1).all(1))
        some.append((seen & real).flatten(1).any(1))
        words.append((seen.unflatten(2, (-1, 32)).long() << shifts).sum(-1).to(torch.int32).flatten(1))
    whole, some = torch.cat(whole), torch.cat(some)
    pairs, whole, words = pairs[some], whole[some], torch.cat(words)[some]
    masks = torch.full((len(pairs),), -1, device=device)
    bits, masks[~whole] = torch.unique(words[~whole], dim=0, return_inverse=True)
    rows, columns = pairs.unbind(1)
    by_key = torch.argsort(columns, stable=True)
    counts = [torch.bincount(each, minlength=places // block) for each in (rows, columns)]
    starts = [torch.cat([each.new_zeros(1), each.cumsum(0)])[None] for each in counts]
    lists = (starts[0], columns, masks, bits.view(-1, block, block // 32), starts[1], rows[by_key], masks[by_key])
    sent = [each.to(torch.int32).contiguous() for each in (torch.zeros(heads, device=device), *lists)]
    orders = [None if pattern.order is None else order[None].to(torch.int32).contiguous()] * 2
    return Layout(block, *sent, *orders)


def _filled(order: Tensor, places: int) -> Tensor:
    return torch.cat([order, order.new_full((places - len(order),), -1)])


def visible_share(given: Layout, n: int) -> float:
    """The visible pairs of all pairs, by the lists (blocks with a mask by their bits); n is a multiple of the block."""
    shifts = torch.arange(32, device=given.bits.device)
    partial = ((given.bits.long()[..., None] >> shifts) & 1).flatten(1).sum(1)
    masks = given.masks.long()
    total = int((masks < 0).sum()) * given.block**2
    return (total + int(partial[masks[masks >= 0]].sum())) / n**2


def block_mask(pattern: Pattern, given: Layout):
    """FlexAttention's ``BlockMask`` of the same lists; a pattern with an order must be given permuted tokens."""
    from torch.nn.attention.flex_attention import BlockMask

    blocks = given.starts.shape[1] - 1
    device, masks = given.masks.device, given.masks
    rows = torch.repeat_interleave(torch.arange(blocks, device=device), given.starts[0].diff())
    found = []
    for kept in (masks >= 0, masks < 0):
        row, column = rows[kept], given.columns[kept]
        counts = torch.bincount(row, minlength=blocks)
        place = torch.arange(len(row), device=device) - (counts.cumsum(0) - counts)[row]
        indices = torch.zeros(blocks, blocks, dtype=torch.int32, device=device)
        indices[row, place] = column
        found += [counts.to(torch.int32)[None, None], indices[None, None]]
    order = pattern.order

    def mask_mod(b, h, q, k):
        return pattern.predicate(q, k) if order is None else pattern.predicate(order[q], order[k])

    return BlockMask.from_kv_blocks(
        *found, BLOCK_SIZE=given.block, mask_mod=mask_mod, seq_lengths=(pattern.n, pattern.n)
    )
