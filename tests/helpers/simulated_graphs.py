"""CUDA graphs simulated on a CPU: a graph is the function itself, run as often before as for a real capture."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.utils import import_utils

from hf_optim.generation import door
from hf_optim.toolkit.modules import graph_capture

SYNCHRONIZES = {"aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::masked_select", "aten::is_nonzero"}


class Capturing(TorchDispatchMode):
    """Raise, as a capture on a device would, where the host asks for a value."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.name().partition(".")[0] in SYNCHRONIZES:
            raise RuntimeError(f"operation not permitted when stream is capturing: {func.name()}")
        return func(*args, **(kwargs or {}))


class Graphs:
    """What was captured: one entry for each graph; how often graphs were replayed; and what was compiled."""

    def __init__(self) -> None:
        self.compiled = CompileCounter()
        self.captured: list[Callable[[], None] | None] = []
        self.replays = 0
        self.runs_compiled = False

    def record(self, run, restore, device, pool):
        self.runs_compiled = False
        for _ in range(graph_capture.WARM_UPS):
            run()
            restore()
        if not self.runs_compiled:  # compiled steps ask the host for nothing, and a mode would compile them again
            with Capturing(), pytest.MonkeyPatch.context() as patch:
                patch.setattr(import_utils, "is_cuda_stream_capturing", lambda: True)
                run()
            restore()
        number = len(self.captured)
        self.captured.append(run)

        def replay() -> None:
            self.replays += 1
            self.captured[number]()

        return replay, pool

    def forget(self) -> None:
        """Drop the functions: a session would keep their model alive, and a graph on a device refers to none."""
        self.captured = [None] * len(self.captured)


@contextmanager
def simulated_graphs() -> Iterator[Graphs]:
    """Let ``hf_optim.generate`` capture on a CPU inside the context, and ``torch.compile`` generate no code."""
    graphs, compiled = Graphs(), torch.compile

    def counted(function, **options):
        options.pop("options", None)  # of inductor
        step = compiled(function, backend=graphs.compiled, **options)

        def called(*args, **kwargs):
            graphs.runs_compiled = True
            return step(*args, **kwargs)

        return called

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(door, "has_graphs", lambda device: True)
        patch.setattr(graph_capture, "_record", graphs.record)
        patch.setattr(graph_capture, "_end_capture", lambda device, random, *_: torch.set_rng_state(random))
        patch.setattr(torch, "compile", counted)
        try:
            yield graphs
        finally:
            graphs.forget()
