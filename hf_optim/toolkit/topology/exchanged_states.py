"""Find blocks of a model that exchange more than what they return, or that are applied several times.

Calibrating block by block replaces the blocks before the current one by their outputs. Where a block reads a tensor
that another one left in a container that both were given (the shared keys and values of Gemma 3n), that tensor is then
missing, or stale. A block that is applied again (ALBERT, tied blocks) has other inputs each time, of which it would see
only the first.
"""

from __future__ import annotations

from weakref import WeakKeyDictionary

from torch import nn

from .block_lists import after_tracing, blocks
from .graph import Call, Trace

_found: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()
"""Model -> what ``exchanged_state`` returned when its blocks were found."""


def exchanged_state(model: nn.Module) -> str:
    """Return which block of a model reads what another one kept, or is applied again; ``""`` if none does.

    The text is the end of a sentence.
    """
    blocks(model)
    return _found.get(model, "")


def _remember(traced: Trace) -> None:
    _found[traced.model] = _exchanged(traced)


after_tracing.append(_remember)


def _exchanged(traced: Trace) -> str:
    inside: dict[int, str] = {}  # position of an operation -> the block that runs it
    returned: set[int] = set()
    names = {block.name for block in blocks(traced)}
    if again := _applied_again(traced, names):
        return f"{again} is applied several times in a forward"
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


def _applied_again(traced: Trace, names: set[str]) -> str:
    """Return the name of a block of which a part runs outside of its first call; ``""`` if there is none."""
    first: dict[str, Call] = {}
    for call in traced.calls:
        if call.name in names:
            first.setdefault(call.name, call)
    for call in traced.calls:
        for name, own in first.items():
            inside = call.name == name or call.name.startswith(f"{name}.")
            if inside and not own.start <= call.start < max(own.end, own.start + 1):
                return name
    return ""
