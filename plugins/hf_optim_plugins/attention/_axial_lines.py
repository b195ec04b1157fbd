"""Attention along the rows and columns of an image: dense products of lines, so that time follows the pairs.

This file is stored beside checkpoints, so it imports only torch.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def along_lines(
    query: Tensor, key: Tensor, value: Tensor, grid: tuple[int, int, int], down: bool, scale: float, dropout: float
) -> Tensor:
    """Compute the attention of each patch over its row, or column, and the tokens before the grid.

    Args:
        query, key, value: ``[B, H, first + rows * columns, D]``.
        grid: tokens before the grid, rows and columns.
        down: along columns.
        scale: of the scores.
        dropout: share of the weights that is dropped.

    Returns:
        ``[B, H, first + rows * columns, D]``; tokens before the grid see all.
    """
    first = grid[0]
    lines = [_lines(part, grid, down).flatten(0, 1) for part in (query, key, value)]  # [B H, lines, patches, D]
    ends = [part[:, :, :first].flatten(0, 1)[:, None].expand(-1, lines[0].shape[1], -1, -1) for part in (key, value)]
    keys, values = torch.cat([ends[0], lines[1]], 2), torch.cat([ends[1], lines[2]], 2)
    out = functional.scaled_dot_product_attention(lines[0], keys, values, None, dropout, scale=scale)
    return _with_first(out.unflatten(0, query.shape[:2]), query, key, value, grid, down, scale, dropout)


def along_both(
    query: Tensor, key: Tensor, value: Tensor, grid: tuple[int, int, int], scale: float, dropout: float
) -> Tensor:
    """Compute one softmax for each patch over its row, its column and the tokens before the grid; see ``along_lines``.

    The patch itself counts once.
    """
    first = grid[0]
    accurate = torch.float64 if query.dtype == torch.float64 else torch.float32
    rows = [_lines(part, grid, False) for part in (query, key, value)]  # [B, H, rows, columns, D]
    columns = [part.transpose(2, 3) for part in rows]
    itself = torch.eye(grid[1], dtype=torch.bool, device=query.device)
    scores = [
        rows[0] @ key[:, :, None, :first].transpose(3, 4),
        rows[0] @ rows[1].transpose(3, 4),
        (columns[0] @ columns[1].transpose(3, 4)).masked_fill(itself, -torch.inf).transpose(2, 3),
    ]
    weights = torch.softmax(torch.cat([part.to(accurate) * scale for part in scores], 4), 4).to(query.dtype)
    if dropout:
        weights = functional.dropout(weights, dropout)
    ends, in_row, in_column = weights.split([first, grid[2], grid[1]], 4)
    out = ends @ value[:, :, None, :first] + in_row @ rows[2] + (in_column.transpose(2, 3) @ columns[2]).transpose(2, 3)
    return _with_first(out, query, key, value, grid, False, scale, dropout)


def _lines(part: Tensor, grid: tuple[int, int, int], down: bool) -> Tensor:
    """Return the patches of ``[B, H, N, D]`` as ``[B, H, lines, patches of a line, D]``."""
    patches = part[:, :, grid[0] :].unflatten(2, grid[1:])
    return patches.transpose(2, 3) if down else patches


def _with_first(
    patches: Tensor, query: Tensor, key: Tensor, value: Tensor, grid: tuple[int, int, int], down: bool, scale: float,
    dropout: float,
) -> Tensor:  # fmt: skip
    """Return the results of lines as ``[B, H, N, D]``, with those of the tokens before the grid."""
    patches = (patches.transpose(2, 3) if down else patches).flatten(2, 3)
    if not grid[0]:
        return patches
    ends = functional.scaled_dot_product_attention(query[:, :, : grid[0]], key, value, None, dropout, scale=scale)
    return torch.cat([ends, patches], 2)
