"""CUDA graphs simulated on a CPU: a graph is the function itself, run as often before as for a real capture."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from hf_optim.generation import capture, door


class Graphs:
    """What was captured: one entry for each graph; how often graphs were replayed; and what was compiled."""

    def __init__(self) -> None:
        self.compiled = CompileCounter()
        self.captured: list[object] = []
        self.replays = 0

    def record(self, run, restore, device, pool):
        for _ in range(capture.WARM_UPS):
            run()
            restore()
        self.captured.append(run)

        def replay() -> None:
            self.replays += 1
            run()

        return replay, pool


@contextmanager
def simulated_graphs() -> Iterator[Graphs]:
    """Let ``hf_optim.generate`` capture on a CPU inside the context, and ``torch.compile`` generate no code."""
    graphs, compiled = Graphs(), torch.compile

    def counted(function, **options):
        return compiled(function, backend=graphs.compiled, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(door, "has_graphs", lambda device: True)
        patch.setattr(capture, "_record", graphs.record)
        patch.setattr(capture, "_end_capture", lambda device, random, pool: torch.set_rng_state(random))
        patch.setattr(torch, "compile", counted)
        yield graphs
