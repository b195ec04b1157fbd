"""Find blocks of a model that exchange more than what they return.

Calibrating block by block replaces the blocks before the current one by their outputs. Where a block reads a tensor
that another one left in a container that both were given (the shared keys and values of Gemma 3n), that tensor is then
missing, or stale.
"""

from __future__ import annotations

from weakref import WeakKeyDictionary

from torch import nn

from .block_lists import after_tracing, blocks
from .graph import Trace

_found: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()
"""Model -> what ``exchanged_state`` returned when its blocks were found."""


def exchanged_state(model: nn.Module) -> str:
    """Return which block of a model reads what another one kept, as the end of a sentence; ``""`` if none does."""
    blocks(model)
    return _found.get(model, "")


def _remember(traced: Trace) -> None:
    _found[traced.model] = _exchanged(traced)


after_tracing.append(_remember)


def _exchanged(traced: Trace) -> str:
    inside: dict[int, str] = {}  # position of an operation -> the block that runs it
    returned: set[int] = set()
    names = {block.name for block in blocks(traced)}
    for call in traced.calls:
        if call.name in names:
            inside.update(dict.fromkeys(range(call.start, call.end), call.name))
            returned.update(call.writes)
    owner: dict[int, str] = {}  # a value that a block did not return, or that was computed from one -> that block
    for op in traced.ops:
        block = inside.get(op.position)
        for value in op.reads:
            if value in owner and block is not None and block != owner[value]:
                return f"{block} reads a tensor that {owner[value]} kept"
        held = block or next((owner[value] for value in op.reads if value in owner), None)
        if held is not None:
            owner.update({value: held for value in op.produces if value not in returned})
    return ""
