"""Choices of experts in a compiled decoding step, in one launch each.

``torch.compile`` leaves ``topk`` to PyTorch, whose two launches are a large part of a router at one token. A pass over
the graph of the step puts the kernels' operator in its place where the rows are few and short.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch

KERNEL = "hf_optim_kernels.experts.choose"
# Whether compiled steps choose experts in one launch.
ENABLED = True


def choose_in_one_launch(graph: torch.fx.Graph) -> None:
    """Replace ``topk`` of few, short rows in a graph."""
    kernel: Any = importlib.import_module(KERNEL)
    for node in graph.find_nodes(op="call_function", target=torch.ops.aten.topk.default):
        x, k, *rest = node.args
        dim, largest = ([*rest, -1, True][0], [*rest, *(-1, True)[len(rest) :]][1])
        value = x.meta.get("val") if isinstance(x, torch.fx.Node) else None
        if node.kwargs or not isinstance(value, torch.Tensor) or not isinstance(k, int):
            continue
        if dim in (-1, value.dim() - 1) and largest and kernel.takes(value, k):
            node.target, node.args = torch.ops.hf_optim.choose.default, (x, k)
