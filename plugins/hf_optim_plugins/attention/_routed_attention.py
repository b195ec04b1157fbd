"""Attention within clusters of tokens: among the top tokens of each cluster, or to the last keys of a query's cluster.

This file is stored beside checkpoints, so it imports only torch.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from ._cluster_kernel import last_by_kernel
from ._query_blocks import in_blocks, put_back, rows_of, slices_of, weights_of

LEAST = 16  # places of a block of queries, and keys of a run


def top_of_clusters(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    near: tuple[Tensor, Tensor],
    valid: Tensor | None,
    width: int,
    scale: float,
    dropout: float = 0.0,
    causal: bool = False,
    nearest: bool = False,
) -> Tensor:
    """Compute attention among the ``width`` queries and the ``width`` keys that are nearest to each centroid.

    Args:
        query: ``[R, H, P, D]``.
        key, value: ``[R, G, P, D]``.
        near: how near queries ``[R, H, C, P]`` and keys ``[R, G, C, P]`` are to the centroids.
        valid: bool ``[R, P]``, False for padding; None if there is none.
        width: tokens of a cluster.
        scale: of the scores.
        dropout: share of the weights that is dropped.
        causal: the keys of a cluster are those of its queries, and a query sees those up to itself. Later tokens still
            decide which tokens these are.
        nearest: a query in no cluster sees the keys of the nearest one.

    Returns:
        ``[R, H, P, D]``: the mean over the clusters that a query is in; zero for a query in none, unless ``nearest``.
    """
    asked_near, held_near = near
    if valid is not None:
        asked_near, held_near = (part.masked_fill(~valid[:, None, None], -torch.inf) for part in near)
    width = min(width, query.shape[2])
    asked = asked_near.topk(width, -1).indices  # [R, H, C, W]
    if causal:
        shared = query.shape[1] // key.shape[1]
        held, key, value = asked, key.repeat_interleave(shared, 1), value.repeat_interleave(shared, 1)
    else:
        held = held_near.topk(width, -1).indices  # [R, G, C, W]
    k, v = _members(key, held), _members(value, held)
    there = None if valid is None else valid[:, None, None].expand(-1, *held.shape[1:3], -1).gather(3, held)
    q = _members(query, asked).unflatten(1, (k.shape[1], -1))  # [R, G, H / G, C, W, D]
    scores = torch.einsum("rgscwd,rgcvd->rgscwv", q * scale, k)
    seen = None if there is None else there[:, :, None, :, None]
    if causal:
        before = (held[..., :, None] >= held[..., None, :])[:, :, None]
        seen = before if seen is None else before & seen
    out = torch.einsum("rgscwv,rgcvd->rgscwd", weights_of(scores, seen, dropout), v).flatten(1, 2).flatten(2, 3)
    places = asked.flatten(2)
    found = out.new_zeros(*query.shape[:3], value.shape[-1])
    found = found.scatter_add(2, places[..., None].expand_as(out), out)
    times = torch.zeros_like(query[..., 0], dtype=torch.float32).scatter_add(2, places, torch.ones_like(places).float())
    found = found / times.clamp_min(1)[..., None].to(found)
    if nearest:
        left = times == 0 if valid is None else (times == 0) & valid[:, None]
        more = _of_nearest(query, k, v, held, there, asked_near, left, scale, dropout, causal)
        found = found + more
    return found if valid is None else found.masked_fill(~valid[:, None, :, None], 0)


def _members(part: Tensor, places: Tensor) -> Tensor:
    """Return the tokens of ``[R, H, P, D]`` at ``[R, H, C, W]``: ``[R, H, C, W, D]``."""
    index = places.flatten(2)[..., None].expand(-1, -1, -1, part.shape[-1])
    return part.gather(2, index).unflatten(2, places.shape[2:])


def _of_nearest(
    query: Tensor, key: Tensor, value: Tensor, held: Tensor, there: Tensor | None, near: Tensor, left: Tensor,
    scale: float, dropout: float, causal: bool,
) -> Tensor:  # fmt: skip
    """Return the attention of queries where ``left``, bool ``[R, H, P]``, to the keys of their nearest cluster; else 0.

    ``key``, ``value``: ``[R, G, C, W, D]`` at the places ``held``, bool ``there``; ``near``: ``[R, H, C, P]``.
    """
    rows, heads, length = left.shape
    lanes, clusters, width = rows * key.shape[1], key.shape[2], key.shape[3]
    lane = torch.arange(lanes, device=query.device).view(rows, -1, 1).repeat_interleave(heads // key.shape[1], 1)
    group = torch.where(left, lane * clusters + near.argmax(2), -1).flatten()
    size = max(LEAST, min(width, length))
    table, run = in_blocks(group, size, lanes * clusters)
    q, k, v = query.flatten(0, 2), key.flatten(0, 2), value.flatten(0, 2)
    known = None if there is None else there.flatten(0, 2)
    outs, items = [], []
    for part in slices_of(len(table), size * width):
        item, own = table[part], run[part]
        scores = (rows_of(q, item.clamp_min(0)) * scale) @ rows_of(k, own).transpose(1, 2)
        seen = None if known is None else known[own][:, None]
        if causal:
            before = (item % length)[..., None] >= held.flatten(0, 2)[own][:, None]
            seen = before if seen is None else before & seen
        out = weights_of(scores, seen, dropout) @ rows_of(v, own)
        outs.append(out)
        items.append(item)
    if not outs:
        return query.new_zeros(rows, heads, length, value.shape[-1])
    return put_back(outs, items, rows * heads * length).view(rows, heads, length, -1)


def last_of_clusters(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cluster: tuple[Tensor, Tensor],
    valid: Tensor | None,
    width: int,
    clusters: int,
    scale: float,
    dropout: float = 0.0,
    earlier: tuple[Tensor, Tensor, Tensor] | None = None,
) -> Tensor:
    """Compute the attention of each query to itself and to the last ``width - 1`` earlier keys of its own cluster.

    Nothing that comes after a token decides what it sees. Keys are sorted by cluster, so that those of a query are a
    run, and queries are sorted by where their runs end: a block of queries then reads two neighbouring parts of the
    keys, and time and memory are those of ``4 P width`` scores.

    Args:
        query: ``[R, H, P, D]``.
        key, value: ``[R, G, P, D]``.
        cluster: int16 or int64 of queries ``[R, H, P]`` and of keys ``[R, G, P]``.
        valid: bool ``[R, P]``, False for padding, which is at the end of rows; None if there is none.
        width: keys that a query sees, its own among them.
        clusters: how many there are.
        scale: of the scores.
        dropout: share of the weights that is dropped.
        earlier: keys and values ``[R, G, C, W, D]`` of the tokens before, in their order, and how many there are of
            each cluster, int64 ``[R, G, C]``: the last ones of ``W`` places. None if there are none.

    Returns:
        ``[R, H, P, D]``, zero at padding.
    """
    rows, heads, length, _ = query.shape
    if earlier is None and not dropout:
        made = last_by_kernel(query, key, value, cluster, valid, width, clusters, scale)
        if made is not None:
            return made
    shared = heads // key.shape[1]
    lanes, device = rows * key.shape[1], query.device
    cluster = cluster[0].long(), cluster[1].long()
    keys, values, code, ahead = _sorted_keys(key, value, cluster[1], valid, clusters, earlier)
    each = ahead + length  # codes count groups in steps of this
    width = min(width, each)
    lane = torch.arange(lanes, device=device).view(rows, -1, 1).repeat_interleave(shared, 1)
    group = lane * clusters + cluster[0]
    own_code = group * each + ahead + torch.arange(length, device=device)
    end = torch.searchsorted(code, own_code.flatten())
    begin = torch.searchsorted(code, (group * each).flatten())
    begin = torch.maximum(begin, end - (width - 1))
    size = max(LEAST, width - 1)
    room = -len(keys) % size
    if room:
        keys, values = (torch.cat([part, part.new_zeros(room, part.shape[1])]) for part in (keys, values))
    keys, values = keys.unflatten(0, (-1, size)), values.unflatten(0, (-1, size))
    # A query without earlier keys sees itself: it is put to the first part, of which it sees nothing.
    own = torch.where(end > begin, (end - 1) // size, 0)
    if valid is not None:
        own = torch.where(valid[:, None].expand(-1, heads, -1).flatten(), own, -1)
    table, run = in_blocks(own, size, len(keys))
    q = query.flatten(0, 2)
    itself = torch.arange(rows * heads * length, device=device).view(rows, heads, length)
    itself = (lane * length + itself % length).flatten()
    # Gaps read some query or other: the gradients of all of them in one place would wait for each other.
    filled = torch.where(table < 0, torch.arange(table.numel(), device=device).view_as(table) % len(q), table)
    own_keys, own_values = key.flatten(0, 2), value.flatten(0, 2)
    outs, items = [], []
    for part in slices_of(len(table), 2 * size * size):
        items.append(table[part])
        item, last = filled[part], run[part]
        both = torch.stack([(last - 1).clamp_min(0), last], 1)
        asked = rows_of(q, item) * scale
        scores = asked @ rows_of(keys, both).flatten(1, 2).transpose(1, 2)
        at = (last - 1)[:, None] * size + torch.arange(2 * size, device=device)
        seen = (at[:, None] >= begin[item][..., None]) & (at[:, None] < end[item][..., None])
        alone = (asked * rows_of(own_keys, itself[item])).sum(-1, keepdim=True)
        weights = weights_of(torch.cat([scores, alone], -1), functional.pad(seen, (0, 1), value=True), dropout)
        of_itself = weights[..., -1:] * rows_of(own_values, itself[item])
        out = weights[..., :-1] @ rows_of(values, both).flatten(1, 2) + of_itself
        outs.append(out)
    if not outs:
        return query.new_zeros(rows, heads, length, value.shape[-1])
    return put_back(outs, items, rows * heads * length).view(rows, heads, length, -1)


def _sorted_keys(
    key: Tensor, value: Tensor, cluster: Tensor, valid: Tensor | None, clusters: int,
    earlier: tuple[Tensor, Tensor, Tensor] | None,
) -> tuple[Tensor, Tensor, Tensor, int]:  # fmt: skip
    """Return keys and values ``[N, D]`` by cluster and place, and their codes: group times step, plus place.

    A group is a cluster of one row and head. The last result is how many places are before those of the new tokens.
    """
    rows, heads, length, _ = key.shape
    device = key.device
    place = torch.arange(length, device=device).expand(rows, heads, -1)
    there = None if valid is None else valid[:, None].expand(-1, heads, -1)
    ahead = 0
    if earlier is not None and earlier[0].shape[3]:
        old_key, old_value, counts = earlier
        width = old_key.shape[3]
        ahead = clusters * width
        slots = torch.arange(width, device=device) >= width - counts[..., None]
        if there is None:
            there = torch.ones_like(place, dtype=torch.bool)
        there = torch.cat([slots.flatten(2), there], 2)
        of_slots = torch.arange(clusters, device=device).repeat_interleave(width).expand(rows, heads, -1)
        cluster = torch.cat([of_slots, cluster], 2)
        place = torch.arange(ahead + length, device=device).expand(rows, heads, -1)
        key, value = (torch.cat([a.flatten(2, 3), b], 2) for a, b in ((old_key, key), (old_value, value)))
    lane = torch.arange(rows * heads, device=device).view(rows, heads, 1)
    code = (lane * clusters + cluster) * (ahead + length) + place
    if there is not None:  # behind those of all groups
        code = code.masked_fill(~there, rows * heads * clusters * (ahead + length))
    code, order = code.flatten().sort()
    return rows_of(key.flatten(0, 2), order), rows_of(value.flatten(0, 2), order), code, ahead


def one_step(
    query: Tensor, key: Tensor, value: Tensor, cluster: Tensor, earlier: tuple[Tensor, Tensor, Tensor], scale: float
) -> Tensor:
    """Return ``last_of_clusters`` of one token for each row, ``[R, H, 1, D]``, without sorting.

    ``cluster``: of the queries, int64 ``[R, H, 1]``; ``key`` and ``value``: ``[R, G, 1, D]``.
    """
    shared = query.shape[1] // key.shape[1]
    old_key, old_value, counts = earlier
    width, asked = old_key.shape[3], (query * scale).unflatten(1, (-1, shared))  # [R, G, H / G, 1, D]
    of_query = cluster.unflatten(1, (-1, shared))  # [R, G, H / G, 1]
    lane = torch.arange(old_key.shape[0] * old_key.shape[1], device=query.device).view(*old_key.shape[:2], 1, 1)
    group = lane * old_key.shape[2] + of_query
    k, v = old_key.flatten(0, 2)[group], old_value.flatten(0, 2)[group]  # [R, G, H / G, 1, W, D]
    seen = torch.arange(width, device=query.device) >= width - counts.flatten()[group][..., None]
    scores = torch.cat([(k @ asked[..., None])[..., 0], (asked * key[:, :, None]).sum(-1, keepdim=True)], -1)
    weights = weights_of(scores, functional.pad(seen, (0, 1), value=True), 0.0)
    out = (weights[..., None, :-1] @ v)[..., 0, :] + weights[..., -1:] * value[:, :, None]
    return out.flatten(1, 2)


def kept_of_clusters(
    key: Tensor,
    value: Tensor,
    cluster: Tensor,
    valid: Tensor | None,
    width: int,
    clusters: int,
    earlier: tuple[Tensor, Tensor, Tensor] | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the last ``width - 1`` keys and values of each cluster, as ``earlier`` of ``last_of_clusters``.

    There are fewer places while fewer tokens were read.
    """
    rows, heads, length, _ = key.shape
    before = 0 if earlier is None else earlier[0].shape[3]
    if earlier is not None and length == 1 and valid is None and before == width - 1:
        return _pushed(key, value, cluster, earlier)
    room, groups = min(width - 1, before + length), rows * heads * clusters
    keys, values, code, ahead = _sorted_keys(key, value, cluster, valid, clusters, earlier)
    bounds = torch.searchsorted(code, torch.arange(groups + 1, device=key.device) * (ahead + length))
    counts = (bounds[1:] - bounds[:-1]).clamp_max(room)
    at = bounds[1:, None] - room + torch.arange(room, device=key.device)
    there = at >= bounds[:-1, None]
    keys, values = (part[at.clamp_min(0)].masked_fill(~there[..., None], 0) for part in (keys, values))
    shape = (rows, heads, clusters)
    return keys.unflatten(0, shape), values.unflatten(0, shape), counts.view(shape)


def _pushed(
    key: Tensor, value: Tensor, cluster: Tensor, earlier: tuple[Tensor, Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``earlier`` with one more token in each row and head, in its cluster, int64 ``[R, G, 1]``."""
    old_key, old_value, counts = earlier
    room = old_key.shape[3]
    if not room:
        return earlier
    lanes = old_key.shape[0] * old_key.shape[1]
    group = torch.arange(lanes, device=key.device) * old_key.shape[2] + cluster.flatten()
    made = []
    for old, new in ((old_key, key), (old_value, value)):
        flat = old.flatten(0, 2)
        moved = torch.cat([flat[group][:, 1:], new.flatten(0, 1)], 1)
        made.append(flat.index_copy(0, group, moved).view(old.shape))
    more = counts.flatten().index_copy(0, group, (counts.flatten()[group] + 1).clamp_max(room))
    return made[0], made[1], more.view(counts.shape)


def near_tokens(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    valid: Tensor | None,
    width: int,
    scale: float,
    dropout: float = 0.0,
) -> Tensor:
    """Compute the attention of each query to the tokens fewer than ``width`` positions away, on both sides.

    A block of queries reads the blocks of keys before it, its own and the one behind it.

    Args:
        query: ``[R, H, P, D]``.
        key, value: ``[R, G, P, D]``.
        valid: bool ``[R, P]``, False for padding; None if there is none.
        width: see above.
        scale: of the scores.
        dropout: share of the weights that is dropped.

    Returns:
        ``[R, H, P, D]``.
    """
    length = query.shape[2]
    size = max(LEAST, min(width, length) - 1)
    blocks = -(-length // size)
    behind = blocks * size - length
    q = functional.pad(query * scale, (0, 0, 0, behind)).unflatten(2, (blocks, size)).unflatten(1, (key.shape[1], -1))
    # Blocks of 3 * size places: the keys around each block of queries.
    k, v = (functional.pad(part, (0, 0, size, behind + size)).unfold(2, 3 * size, size) for part in (key, value))
    place = torch.arange(blocks * size, device=query.device).view(blocks, size)
    at = place[:, :1] - size + torch.arange(3 * size, device=query.device)  # [blocks, 3 * size]
    seen = ((place[..., None] - at[:, None]).abs() < width) & (at >= 0)[:, None] & (at < length)[:, None]
    if valid is not None:
        there = functional.pad(valid, (size, behind + size)).unfold(1, 3 * size, size)  # [R, blocks, 3 * size]
        seen = (seen & there[:, :, None])[:, None, None]
    scores = torch.einsum("rgsbqd,rgbdk->rgsbqk", q, k)
    out = torch.einsum("rgsbqk,rgbdk->rgsbqd", weights_of(scores, seen, dropout), v)
    return out.flatten(3, 4).flatten(1, 2)[:, :, :length]
