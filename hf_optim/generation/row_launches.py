"""Products of one row in the graph of a compiled step: those that read the same row become one launch.

The graph is that of inductor before its own passes: each value has one name, whatever the modules were, so that what is
joined here is what the model computes, under hooks and adapters too.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Iterable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

aten = torch.ops.aten
VIEWS = (
    aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.unsqueeze.default, aten.squeeze.dim,
    aten.squeeze.dims,
)  # fmt: skip
# The least numbers of a weight outside of linear layers, such as a router's: there a launch is most of the time.
LEAST_NUMBERS = 1 << 17
NO_ACT = -1


def join_rows(
    graph: Graph, parts: Collection[str], kernel: Any, runs_on: Callable[[torch.device], bool] = lambda device: True
) -> None:
    """Change a graph in place.

    Args:
        graph: nodes have fake tensors in ``meta["val"]``.
        parts: of ``one_row.PARTS``.
        kernel: the module of the operators.
        runs_on: True for a device of the kernel.
    """
    row, rows = torch.ops.hf_optim.dense_row.default, torch.ops.hf_optim.dense_rows.default
    of = partial(graph.find_nodes, op="call_function")
    for node in (*of(target=aten.mm.default), *of(target=aten.addmm.default)):
        if (given := _product(node, kernel)) is not None and runs_on(_value(node).device):
            _replace(graph, [node], row, given)
    if "joined" in parts:
        for same in _of_the_same_row(of(target=row)):
            for first in range(0, len(same), kernel.MOST_WEIGHTS):
                _join(graph, same[first : first + kernel.MOST_WEIGHTS], rows)


# -- products ---------------------------------------------------------------------------------------------------------
def _product(node: Node, kernel: Any) -> tuple[Node, Node, Node | None] | None:
    """Return row, weight and bias of a product that the kernel takes; None for another."""
    bias, (x, turned) = (None, node.args) if len(node.args) == 2 else (node.args[0], node.args[1:])
    if node.kwargs or not (isinstance(turned, Node) and turned.target in (aten.permute.default, aten.t.default)):
        return None
    weight, value = turned.args[0], _value(turned.args[0])
    if turned.target == aten.permute.default and list(turned.args[1]) != [1, 0]:  # type: ignore[call-overload, arg-type]
        return None
    tensors = [_value(each) for each in (x, bias) if each is not None]
    if weight.op != "placeholder" or value.ndim != 2 or not value.is_contiguous():  # type: ignore[union-attr]
        return None
    if bias is not None and (bias.op != "placeholder" or _value(bias).shape != value.shape[:1]):  # type: ignore[union-attr]
        return None
    if _value(x).shape[0] != 1 or value.dtype not in kernel.DTYPES or any(t.dtype != value.dtype for t in tensors):
        return None
    if value.shape[1] % 8 or value.shape[1] > kernel.MOST_CHANNELS or value.numel() < LEAST_NUMBERS:
        return None
    return x, weight, bias  # type: ignore[return-value]


# -- layers of the same row -------------------------------------------------------------------------------------------
def _of_the_same_row(nodes: Iterable[Node]) -> list[list[Node]]:
    """Return products of the same row in groups, each in the order of the graph."""
    groups: dict[Any, list[Node]] = {}
    for node in nodes:
        x, weight, bias = node.args
        if all(each is None or each.op == "placeholder" for each in (weight, bias)):  # type: ignore[union-attr]
            groups.setdefault((_root(x), _value(weight).shape[1], bias is None), []).append(node)  # type: ignore[arg-type]
    return [group for group in groups.values() if len(group) > 1]


def _join(graph: Graph, nodes: list[Node], target: Any) -> None:
    if len(nodes) < 2:
        return
    x, _, bias = nodes[0].args
    biases = [] if bias is None else [node.args[2] for node in nodes]
    _replace(graph, nodes, target, (x, [node.args[1] for node in nodes], biases, NO_ACT))


# -- nodes ------------------------------------------------------------------------------------------------------------
def _value(node: Any) -> Tensor:
    return node.meta["val"]  # type: ignore[no-any-return]


def _is_view(node: Node) -> bool:
    """Return True for a view of all numbers of a value, in their order; a slice may be one."""
    whole = node.target == aten.slice.Tensor and _value(node).shape == _value(node.args[0]).shape
    return node.target in VIEWS or whole


def _root(node: Node) -> Node:
    """Return the value that a view of all its numbers shows."""
    while _is_view(node):
        node = node.args[0]  # type: ignore[assignment]
    return node


def _call(graph: Graph, target: Any, args: tuple[Any, ...]) -> Node:
    """Insert a call, with what it returns."""
    node = graph.call_function(target, args)
    with _value(node.all_input_nodes[0]).fake_mode if target is not operator.getitem else nullcontext():  # type: ignore[attr-defined]
        node.meta["val"] = target(*torch.fx.node.map_arg(args, _value))
    return node


def _replace(graph: Graph, old: list[Node], target: Any, args: tuple[Any, ...]) -> None:
    """Let the results of a call, inserted before the first of some nodes, stand for them, in their shapes."""
    with graph.inserting_before(old[0]):
        made = _call(graph, target, args)
        results = [made]
        if isinstance(made.meta["val"], list):
            results = [_call(graph, operator.getitem, (made, index)) for index in range(len(old))]
        for index, (one, node) in enumerate(zip(results, old, strict=True)):
            if _value(one).shape != _value(node).shape:
                results[index] = _call(graph, aten.reshape.default, (one, list(_value(node).shape)))
    for one, node in zip(results, old, strict=True):
        node.replace_all_uses_with(one)
        _erase(node)


def _erase(node: Node) -> None:
    """Erase a node that nothing reads, and what it alone has read."""
    erased: set[Node] = set()
    left = [node]
    while left:
        node = left.pop()
        if node not in erased and not node.users and node.op == "call_function" and not node.is_impure():
            left += node.all_input_nodes
            node.graph.erase_node(node)
            erased.add(node)
