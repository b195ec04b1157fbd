"""Passes over the graph of a compiled decoding step, for the option ``post_grad_custom_pre_pass`` of inductor."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch._inductor.custom_graph_pass import CustomGraphPass

from ..toolkit.experts import kernels
from . import choices, one_row, row_launches


class StepPasses(CustomGraphPass):
    """The passes that are on."""

    def __init__(self) -> None:
        self.chooses = choices.ENABLED and kernels.load() is not None
        self.parts = one_row.USED if one_row.PRODUCTS in one_row.USED and one_row.kernel() is not None else frozenset()

    def __bool__(self) -> bool:
        return bool(self.chooses or self.parts)

    def __call__(self, graph: torch.fx.Graph) -> None:
        """Change a graph in place."""
        if self.chooses:
            choices.choose_in_one_launch(graph)
        if self.parts:
            row_launches.join_rows(graph, self.parts, one_row.kernel(), one_row.runs_on)

    def uuid(self) -> Any:
        """Return what changes when the passes do, for inductor's cache."""
        files = (__file__, choices.__file__, row_launches.__file__)
        sources = b"".join(Path(file).read_bytes() for file in files)
        return hashlib.sha256(sources).hexdigest(), self.chooses, tuple(sorted(self.parts))


def compile_options() -> dict[str, Any]:
    """Return options of inductor for a step; none while all passes are off, and without the kernels' package."""
    passes = StepPasses()
    return {"post_grad_custom_pre_pass": passes} if passes else {}
