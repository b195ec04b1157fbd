"""Choices of experts in a compiled decoding step, in one launch each.

``torch.compile`` leaves ``topk`` to PyTorch, whose two launches are a large part of a router at one token. A pass over
the graph of the step puts the kernels' operator in its place where the rows are few and short. It is off (``ENABLED``):
the operator is right on a device, but a step with it was not timed on one yet.
"""

from __future__ import annotations

import hashlib
import importlib
from pathlib import Path
from typing import Any

import torch
from torch._inductor.custom_graph_pass import CustomGraphPass

from ..toolkit.experts import kernels

KERNEL = "hf_optim_kernels.experts.choose"
# Whether compiled steps choose experts in one launch; not timed on a device yet.
ENABLED = False


class ChooseInOneLaunch(CustomGraphPass):
    """Replaces ``topk`` of few, short rows; for the option ``post_grad_custom_pre_pass`` of inductor."""

    def __call__(self, graph: torch.fx.Graph) -> None:
        kernel: Any = importlib.import_module(KERNEL)
        for node in graph.find_nodes(op="call_function", target=torch.ops.aten.topk.default):
            x, k, *rest = node.args
            dim, largest = ([*rest, -1, True][0], [*rest, *(-1, True)[len(rest) :]][1])
            value = x.meta.get("val") if isinstance(x, torch.fx.Node) else None
            if node.kwargs or not isinstance(value, torch.Tensor) or not isinstance(k, int):
                continue
            if dim in (-1, value.dim() - 1) and largest and kernel.takes(value, k):
                node.target, node.args = torch.ops.hf_optim.choose.default, (x, k)

    def uuid(self) -> Any:
        """Return what changes when the pass does, for inductor's cache."""
        return hashlib.sha256(Path(__file__).read_bytes()).hexdigest()


def compile_options() -> dict[str, Any]:
    """Return options of inductor for a step; none while the pass is off, and without the kernels' package."""
    if not ENABLED or kernels.load() is None:
        return {}
    return {"post_grad_custom_pre_pass": ChooseInOneLaunch()}
