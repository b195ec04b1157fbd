"""Products of one row in the graph of a compiled step: what a launch can compute besides, it does.

The graph is that of inductor before its own passes: each value has one name, whatever the modules were, so that what is
joined here is what the model computes, under hooks and adapters too. Layers that read the same row become one launch;
the sum with the residual stream behind a layer and the root mean square norm before it are taken into its launch.
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

aten, prims = torch.ops.aten, torch.ops.prims
VIEWS = (
    aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.unsqueeze.default, aten.squeeze.dim,
    aten.squeeze.dims,
)  # fmt: skip
# The least numbers of a weight outside of linear layers, such as a router's: there a launch is most of the time.
LEAST_NUMBERS = 1 << 17
NO_ACT = -1
# Arguments of ``dense_rows``.
X, WEIGHTS, BIASES, ACT, SCALE, EPSILON, RESIDUAL = range(7)


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
    if "sums" in parts:
        for node in of(target=row):
            _add_behind(graph, node, rows)
    if "norms" in parts:
        _norm_before(graph, row, rows)


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
    _replace(graph, nodes, target, (x, [node.args[1] for node in nodes], biases, NO_ACT, None, 0.0, None))


# -- what is behind and before ----------------------------------------------------------------------------------------
def _add_behind(graph: Graph, node: Node, target: Any) -> None:
    """Take the sum of a product and another row of its shape into the product's launch."""
    end = node
    while len(end.users) == 1 and _is_view(user := next(iter(end.users))):
        end = user
    total = next(iter(end.users), None)
    if total is None or len(end.users) != 1 or total.target != aten.add.Tensor or total.kwargs or len(total.args) != 2:
        return
    other = total.args[1] if total.args[0] is end else total.args[0]
    if not isinstance(other, Node) or other is end or not isinstance(other.meta.get("val"), Tensor):
        return
    same = {(_value(each).dtype, _value(each).numel()) for each in (total, other, node)}
    if len(same) != 1:
        return
    x, weight, bias = node.args
    _replace(graph, [total], target, (x, [weight], _several(bias), NO_ACT, None, 0.0, other))


def _norm_before(graph: Graph, row: Any, rows: Any) -> None:
    """Take norms whose result products alone read into the launches of these."""
    readers: dict[Node, list[Node]] = {}
    for node in graph.nodes:
        if node.op == "call_function" and node.target in (row, rows):
            readers.setdefault(_root(node.args[0]), []).append(node)
    for normed, nodes in readers.items():
        if (found := _norm(normed)) is None or not _read_by(normed, set(nodes)):
            continue
        hidden, scale, epsilon = found
        for node in nodes:
            given = _in_shape(graph, node, hidden, _value(node.args[X]))
            if node.target == row:
                _, weight, bias = node.args
                _replace(graph, [node], rows, (given, [weight], _several(bias), NO_ACT, scale, epsilon, None))
                continue
            args, before = [*node.args], node.args[X]
            args[X], args[SCALE], args[EPSILON] = given, scale, epsilon
            node.args = tuple(args)
            _erase(before)  # type: ignore[arg-type]


def _read_by(node: Node, readers: set[Node]) -> bool:
    """Return True if nothing but ``readers`` reads a value, itself or another view of it."""
    return all(user in readers or (_is_view(user) and _read_by(user, readers)) for user in node.users)


def _norm(node: Node) -> tuple[Node, Node, float] | None:
    """Return input, scale and epsilon of a root mean square norm in 16 bits, computed in float32; None for another."""
    found = _factors(node, lambda each: each.op == "placeholder")
    if found is None or _value(found[0]).shape != _value(node).shape[-1:]:
        return None
    scale, rounded = found
    inside = _converted(rounded, _value(node).dtype)
    if _value(scale).dtype != _value(node).dtype or inside is None:
        return None
    found = _factors(inside, lambda each: each.target == aten.rsqrt.default)
    if found is None:
        return None
    root, wide = found
    hidden, total = _converted(wide, torch.float32), root.args[0]
    if hidden is None or _value(hidden).dtype != _value(node).dtype or _value(hidden).shape != _value(node).shape:
        return None
    if not isinstance(total, Node) or total.target not in (aten.add.Tensor, aten.add.Scalar) or total.kwargs:
        return None
    mean, epsilon = total.args
    if not isinstance(mean, Node) or not isinstance(epsilon, float) or mean.target != aten.mean.dim or mean.kwargs:
        return None
    square, dims, *keep = mean.args
    last = [-1, wide.meta["val"].ndim - 1]
    if keep != [True] or len(dims) != 1 or dims[0] not in last or not isinstance(square, Node):  # type: ignore
        return None
    if square.target != aten.pow.Tensor_Scalar or square.args != (wide, 2) or _value(root).numel() != 1:
        return None
    return hidden, scale, epsilon


def _factors(node: Any, wanted: Callable[[Node], bool]) -> tuple[Node, Node] | None:
    """Return the factors of a product of two values, first the one that is wanted."""
    if not isinstance(node, Node) or node.target != aten.mul.Tensor or len(node.all_input_nodes) != 2 or node.kwargs:
        return None
    first, second = node.args
    if wanted(first):  # type: ignore[arg-type]
        return first, second  # type: ignore[return-value]
    return (second, first) if wanted(second) else None  # type: ignore[return-value, arg-type]


def _converted(node: Node, dtype: torch.dtype) -> Node | None:
    """Return what a node converts to a dtype; None if it does not."""
    converts = node.target == prims.convert_element_type.default and node.args[1] == dtype
    return node.args[0] if converts else None  # type: ignore[return-value]


# -- nodes ------------------------------------------------------------------------------------------------------------
def _value(node: Any) -> Tensor:
    return node.meta["val"]  # type: ignore[no-any-return]


def _is_view(node: Node) -> bool:
    """Return True for a view of all numbers of a value, in their order; a slice may be one."""
    whole = node.target == aten.slice.Tensor and _value(node).shape == _value(node.args[0]).shape
    return node.target in VIEWS or whole


def _several(bias: Any) -> list[Any]:
    return [] if bias is None else [bias]


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


def _in_shape(graph: Graph, before: Node, node: Node, like: Tensor) -> Node:
    if _value(node).shape == like.shape:
        return node
    with graph.inserting_before(before):
        return _call(graph, aten.reshape.default, (node, list(like.shape)))


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
