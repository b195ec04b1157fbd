"""Where a table of positions ends.

This file is stored beside checkpoints, so it imports nothing.
"""

from __future__ import annotations

from typing import Any


def require_positions(given: dict[str, Any], table: int) -> None:
    """Raise ``ValueError`` for tokens beyond the last row of a table of positions."""
    ids, asked = given.get("input_ids"), given.get("position_ids")
    like = given["inputs_embeds"] if ids is None else ids
    caches = [given[name] for name in ("cache", "past_key_values") if given.get(name) is not None]
    reached = like.shape[1] + (caches[0].get_seq_length() if caches else 0)
    if reached > table and asked is not None and asked.numel():
        reached = int(asked.max()) + 1
    if reached > table:
        raise ValueError(
            f"the model has a table of {table:,} positions, and the text {reached:,} tokens: a memory carries "
            "positions on, and cannot lead beyond the table"
        )
