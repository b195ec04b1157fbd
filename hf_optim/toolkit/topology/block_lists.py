"""The blocks of a transformer: lists of modules that pass the hidden state from one to the next."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol, TypeVar
from weakref import WeakKeyDictionary

from torch import nn

from ...errors import ModelError
from ...trust.bounds import first_line
from .fake_inputs import NoInputsError, has_example
from .graph import Call, Trace
from .linear_layers import is_linear
from .tracing import WithoutWeightsError, trace

log = logging.getLogger(__name__)


class ModuleScope(Protocol):
    """A part of a model, such as a ``Block``, that contains modules by qualified name."""

    def holds(self, name: str) -> bool:
        """Return True if the module with the qualified name is in the scope."""
        ...


@dataclass(frozen=True, eq=False)
class Block:
    """One block.

    Attributes:
        name: its qualified name.
        module: the module.
        list_name: the qualified name of its block list.
        index: its position in the block list.
    """

    name: str
    module: nn.Module
    list_name: str
    index: int

    def holds(self, name: str) -> bool:
        """Return True if the qualified name is that of the block or of a module in it."""
        return name == self.name or name.startswith(self.name + ".")


_cache: WeakKeyDictionary[nn.Module, tuple[tuple[int, ...], list[tuple[str, str, int]]]] = WeakKeyDictionary()
"""Model -> the identities of its modules, and the blocks found for them."""


after_tracing: list[Callable[[Trace], None]] = []
"""Functions to call with a trace in which blocks were found, to find what else they need in it."""


def blocks(source: nn.Module | Trace) -> list[Block]:
    """Return the blocks of a model in execution order; an encoder's blocks come before its decoder's.

    A block list is an ``nn.ModuleList`` or ``nn.Sequential`` whose members take a hidden state and return one of the
    same shape, each from the previous member; of nested lists the outermost counts. A member that only calls the block
    of another one again is not a block. Experts, which all read the same
    tensor, and stages that change the shape are therefore not block lists. Members that the forward does not reach are
    left out. A model without blocks gives an empty list, and so does, with a warning, a model that cannot be traced
    since nobody knows its inputs (``NoInputsError``).
    """
    model = source.model if isinstance(source, Trace) else source
    modules = dict(model.named_modules())
    state = (*map(id, modules.values()), int(has_example(model)))
    if _cache.get(model, ((), []))[0] != state:
        try:
            traced = source if isinstance(source, Trace) else trace(source)
        except NoInputsError as reason:
            log.warning("treated as a model without blocks: %s", reason)
            _cache[model] = (state, [])
            return []
        _cache[model] = (state, _find(traced))
        for remember in after_tracing:
            remember(traced)
    return [Block(name, modules[name], list_name, index) for name, list_name, index in _cache[model][1]]


def known_blocks(model: nn.Module) -> list[Block]:
    """Return the blocks of a model, or none if they cannot be found before its weights are read."""
    try:
        return blocks(model)
    except WithoutWeightsError as reason:
        log.debug("no blocks are known: %s", reason)
        return []


def require_blocks(model: nn.Module, driver: str) -> list[Block]:
    """Return the blocks of a model for a driver that calibrates one at a time.

    Raises ``ModelError`` if there are none, or if they cannot be found; it has the reason and what to do.
    """
    name, remedy = type(model).__name__, "use driver: whole_model, which needs no blocks but holds the whole model"
    try:
        found = blocks(model)
    except WithoutWeightsError as error:
        raise ModelError(
            f"driver {driver}: the blocks of {name} cannot be found before its weights are read, since its forward "
            f"depends on their values ({first_line(error.__cause__ or error, typed=True)}); use driver: blockwise, "
            "which loads the whole model first"
        ) from error
    if found:
        return found
    try:
        trace(model)
        reason = "none of its lists of modules passes a hidden state from one member to the next"
    except NoInputsError as error:
        reason = f"it cannot be traced ({first_line(error)})"
    raise ModelError(f"driver {driver}: no sequence of blocks was found in {name}: {reason}; {remedy}")


def block_of(found: Sequence[Block], name: str) -> Block | None:
    """Return the block that contains the module ``name``, or None."""
    return next((block for block in found if block.holds(name)), None)


def _find(trace: Trace) -> list[tuple[str, str, int]]:
    """Return (name, list name, index) of every block, in the order of their first calls."""
    first_calls: dict[str, Call] = {}
    for call in trace.calls:
        first_calls.setdefault(call.name, call)
    lists: list[str] = []
    members: list[tuple[str, str, int]] = []
    for list_name, module in trace.modules.items():
        nested = any(list_name.startswith(outer + ".") for outer in lists)
        if nested or not isinstance(module, (nn.ModuleList, nn.Sequential)):
            continue
        prefix = f"{list_name}." if list_name else ""
        called = [
            (index, first_calls[prefix + key])
            for index, key in enumerate(module._modules)
            if prefix + key in first_calls
        ]
        called.sort(key=lambda item: item[1].start)
        called = [item for item in called if not _repeats(trace, prefix, item[1])]
        if called and _is_chain(trace, [call for _, call in called]):
            lists.append(list_name)
            members += [(call.name, list_name, index) for index, call in called]
    return sorted(members, key=lambda member: first_calls[member[0]].start)


def _repeats(trace: Trace, prefix: str, call: Call) -> bool:
    """Return True if a member without weights of its own calls a module of another member: a shared block again."""
    if any(True for _ in trace.modules[call.name].parameters()):
        return False
    return any(
        inner.name.startswith(prefix) and not inner.name.startswith(f"{call.name}.") and inner.name != call.name
        for inner in trace.calls
        if call.start <= inner.start and inner.end <= call.end
    )


def _is_chain(trace: Trace, calls: list[Call]) -> bool:
    """Return True if each call is that of a block, and reads what the previous call wrote."""
    return all(_is_block(trace, call) for call in calls) and all(
        _feeds(trace, before, after) for before, after in pairwise(calls)
    )


def _is_block(trace: Trace, call: Call) -> bool:
    """Return True if the module has at least two matrices and returns a hidden state of the shape it takes."""
    module = trace.modules[call.name]
    matrices = sum(parameter.dim() >= 2 for parameter in module.parameters())
    # A layer on a kernel has its matrix in buffers.
    matrices += sum(is_linear(part) and "weight" not in part._parameters for part in module.modules())
    shapes = {trace.shapes[value] for value in call.reads if trace.dtypes[value].is_floating_point}
    is_leaf = is_linear(module) or not any(True for _ in module.children())
    return not is_leaf and matrices >= 2 and bool(call.writes) and trace.shapes[call.writes[0]] in shapes


def _feeds(trace: Trace, before: Call, after: Call) -> bool:
    """Return True if an output of ``before`` is an input of ``after``, directly or through operations in between."""
    reached = set(before.writes)
    for op in trace.ops[before.end : after.start]:
        if reached.intersection(op.reads):
            reached.update(op.produces)
    return bool(reached.intersection(after.reads))


M = TypeVar("M", bound=nn.Module)


def group_by_block(model: nn.Module, layers: Mapping[str, M]) -> list[dict[str, M]]:
    """Group ``layers`` (full names in ``model``) by block, in execution order; those outside the blocks come last."""
    holders = [block.holds for block in blocks(model)]
    inside = [{name: layer for name, layer in layers.items() if holds(name)} for holds in holders]
    outside = {name: layer for name, layer in layers.items() if not any(holds(name) for holds in holders)}
    return [part for part in (*inside, outside) if part]
