"""The blockwise driver: calibrate one block after another in a model that is whole in memory."""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from torch import nn
from tqdm.auto import tqdm

from ..recipes.technique import Technique
from ..runs.run import Run
from ..runs.scope import Example, Scope
from ..toolkit import topology
from .forward import Batch, capture_block_inputs, device_of, to_device
from .steps import any_needs_data, batches_for, exact_targets, run_calibration


class Journal(Protocol):
    """Where the blockwise driver keeps finished blocks, so that a killed run can go on (``resume.BlockJournal``)."""

    def restore(self, run: Run, first: Technique, name: str) -> bool: ...

    def keep(self, run: Run, first: Technique, name: str) -> None: ...


class BlockwiseDriver:
    """Calibrates blocks in execution order, each on the outputs of the blocks before it as they are by then.

    A block's arguments (masks, rotary embeddings, position biases) are made by the model's own forward: it is run with
    the blocks that are done replaced by stubs that return their stored outputs, up to the block in work.
    """

    def __init__(
        self, run: Run, steps: Sequence[Technique], blocks: Sequence[topology.Block], journal: Journal | None
    ) -> None:
        self.run, self.steps, self.blocks, self.journal = run, steps, blocks, journal
        self.home = device_of(run.model)
        self.device = run.device or self.home
        self.batches: Sequence[Batch] = run.data.batches if run.data is not None and any_needs_data(steps) else ()
        self.outputs: dict[str, list[Any]] = {}
        self.teaching = any(step.needs_teacher() for step in steps)
        self.seconds: list[float] = []
        self.passes = 0
        self.taught: dict[str, list[Any]] = {}  # outputs of the blocks as they were, where a step works towards them

    def drive(self) -> None:
        model = self.run.model
        bar = tqdm(self.blocks, desc="calibrating", unit="block", disable=len(self.blocks) < 2)
        for index, block in enumerate(bar):
            started = time.perf_counter()
            with self._on_device(block.module):
                lesson = self._lesson(index) if self.teaching else ()
                scope = Scope(block.name, block.module, model, index, len(self.blocks), teacher=lesson)
                restored = bool(self.journal and self.journal.restore(self.run, self.steps[0], block.name))
                if not restored:
                    for step in self.steps:
                        bar.set_postfix_str(f"{block.name}: {step.name}")
                        run_calibration(self.run, step, scope, functools.partial(self._feed, index))
                    if self.journal:
                        self.journal.keep(self.run, self.steps[0], block.name)
                bar.set_postfix_str(f"{block.name}: outputs", refresh=False)
                self.passes += bool(self.batches) and not restored
                self.outputs[block.stack] = [
                    to_device(block.module(*args, **kwargs), self.home) for args, kwargs in self._arguments(index)
                ]
            if not restored:
                self.seconds.append(time.perf_counter() - started)
        self._outside(len(self.blocks))

    def _outside(self, count: int) -> None:
        # What lies outside the blocks (a pooler, the output head) is touched only where a target names it exactly.
        model = self.run.model
        inside = tuple(block.name for block in self.blocks)
        scope = Scope("", model, model, count, count + 1, outside=inside)
        steps = [step for step in self.steps if scope.select(exact_targets(step, scope)) and not step.needs_teacher()]

        def feed(step: Technique) -> None:
            for batch in batches_for(self.run, step):
                model(**to_device(batch, self.home))

        for step in steps:
            run_calibration(self.run, step, scope, feed)

    def _feed(self, index: int, step: Technique) -> None:
        if step.needs_data():
            self.passes += 1
            block = self.blocks[index].module
            for args, kwargs in self._arguments(index):
                block(*args, **kwargs)

    def _arguments(self, index: int) -> Iterator[tuple[Any, Any]]:
        """The arguments of block ``index``, batch by batch, on the accelerator."""
        for number, batch in enumerate(self.batches):
            args, kwargs = self._reach(index, number, batch, self.outputs)
            yield to_device(args, self.device), to_device(kwargs, self.device)

    def _lesson(self, index: int) -> list[Example]:
        """What block ``index``, still as it was, computes where all blocks before it are as they were."""
        block, lesson = self.blocks[index], []
        for number, batch in enumerate(self.batches):
            args, kwargs = self._reach(index, number, batch, self.taught)
            output = block.module(*to_device(args, self.device), **to_device(kwargs, self.device))
            lesson.append(Example(args, kwargs, to_device(output, self.home)))
        self.taught[block.stack] = [example.output for example in lesson]
        return lesson

    def _reach(self, index: int, number: int, batch: Batch, outputs: Mapping[str, list[Any]]) -> tuple[Any, Any]:
        """The arguments of block ``index`` for one batch, given the ``outputs`` of the blocks before it."""
        return capture_block_inputs(
            self.run.model, self.blocks, index, to_device(batch, self.home), lambda stack: outputs[stack][number]
        )

    @contextmanager
    def _on_device(self, module: nn.Module) -> Iterator[None]:
        module.to(self.device)
        try:
            yield
        finally:
            module.to(self.home)
