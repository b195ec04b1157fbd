"""The repeated blocks of a transformer: lists of modules that hand the hidden state from one to the next."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol, TypeVar
from weakref import WeakKeyDictionary

from torch import nn

from .graph import Call, Trace
from .linear_layers import is_linear
from .tracing import trace


class ModuleScope(Protocol):
    """Anything that knows which qualified names lie inside it; a `Block` is one."""

    def holds(self, name: str) -> bool:
        """Whether the qualified name lies inside."""
        ...


@dataclass(frozen=True, eq=False)
class Block:
    """One block: its qualified `name`, its `module`, the name of its block list and its `index` in it."""

    name: str
    module: nn.Module
    list_name: str
    index: int

    def holds(self, name: str) -> bool:
        """Whether the qualified name `name` is the block or lies inside it."""
        return name == self.name or name.startswith(self.name + ".")


_known: WeakKeyDictionary[nn.Module, tuple[tuple[int, ...], list[tuple[str, str, int]]]] = WeakKeyDictionary()
"""Per model its modules, by identity, and the blocks found for them: asking again costs nothing."""


def blocks(source: nn.Module | Trace) -> list[Block]:
    """The repeated blocks of a model in the order in which they run; an encoder's before its decoder's.

    A stack is an `nn.ModuleList` or `nn.Sequential` whose members take a hidden state and return one of the
    same shape, each from the one before; the outermost such lists count.  Experts, which all read the same
    tensor, and stages that change the shape are therefore no stacks.  Members that the forward does not reach
    are left out. A model without blocks gives an empty list.
    """
    model = source.model if isinstance(source, Trace) else source
    modules = dict(model.named_modules())
    state = tuple(map(id, modules.values()))
    if _known.get(model, ((), []))[0] != state:
        _known[model] = (state, _find(source if isinstance(source, Trace) else trace(source)))
    return [Block(name, modules[name], stack, index) for name, stack, index in _known[model][1]]


def block_of(found: Sequence[Block], name: str) -> Block | None:
    """The block that the qualified name `name` lies in."""
    return next((block for block in found if block.holds(name)), None)


def _find(trace: Trace) -> list[tuple[str, str, int]]:
    """(name, stack, index) of every block, in the order of their first calls."""
    first_calls: dict[str, Call] = {}
    for call in trace.calls:
        first_calls.setdefault(call.name, call)
    stacks: list[str] = []
    members: list[tuple[str, str, int]] = []
    for stack, module in trace.modules.items():
        nested = any(stack.startswith(outer + ".") for outer in stacks)
        if nested or not isinstance(module, (nn.ModuleList, nn.Sequential)):
            continue
        prefix = f"{stack}." if stack else ""
        called = [
            (index, first_calls[prefix + key])
            for index, key in enumerate(module._modules)
            if prefix + key in first_calls
        ]
        called.sort(key=lambda item: item[1].start)
        if called and _is_chain(trace, [call for _, call in called]):
            stacks.append(stack)
            members += [(call.name, stack, index) for index, call in called]
    return sorted(members, key=lambda member: first_calls[member[0]].start)


def _is_chain(trace: Trace, calls: list[Call]) -> bool:
    """Whether each call is one of a block, and reads what the call before it wrote."""
    return all(_is_block(trace, call) for call in calls) and all(
        _feeds(trace, before, after) for before, after in pairwise(calls)
    )


def _is_block(trace: Trace, call: Call) -> bool:
    """Whether a module that holds at least two matrices returns a hidden state of the shape it takes."""
    module = trace.modules[call.name]
    matrices = sum(parameter.dim() >= 2 for parameter in module.parameters())
    shapes = {trace.shapes[value] for value in call.reads if trace.dtypes[value].is_floating_point}
    is_leaf = is_linear(module) or not any(True for _ in module.children())
    return not is_leaf and matrices >= 2 and bool(call.writes) and trace.shapes[call.writes[0]] in shapes


def _feeds(trace: Trace, before: Call, after: Call) -> bool:
    """Whether an output of one call is an input of the next, perhaps through operations between the two."""
    reached = set(before.writes)
    for op in trace.ops[before.end : after.start]:
        if reached.intersection(op.reads):
            reached.update(op.produces)
    return bool(reached.intersection(after.reads))


M = TypeVar("M", bound=nn.Module)


def group_by_block(model: nn.Module, layers: Mapping[str, M]) -> list[dict[str, M]]:
    """``layers`` (full names in ``model``) by block, in execution order, and last those outside the blocks."""
    holders = [block.holds for block in blocks(model)]
    inside = [{name: layer for name, layer in layers.items() if holds(name)} for holds in holders]
    outside = {name: layer for name, layer in layers.items() if not any(holds(name) for holds in holders)}
    return [part for part in (*inside, outside) if part]


def is_output_head(model: nn.Module, name: str) -> bool:
    """Whether the linear `name` is the model's output embedding, or lies outside all blocks.

    False for what is no linear layer.  Raises `AttributeError` if the model has no such module.
    """
    module = model.get_submodule(name)
    if not is_linear(module):
        return False
    embeddings = getattr(model, "get_output_embeddings", lambda: None)()
    return module is embeddings or block_of(blocks(model), name) is None
