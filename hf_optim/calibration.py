"""Calibration drivers: how batches reach the observers that the steps of a stage attach.

``whole_model`` runs the model as it is. ``blockwise`` works on one transformer block at a time: that block alone is on
the accelerator, activations wait on the CPU, and what a block computes after it was changed is what the next block
is calibrated on. A driver decides how batches flow and nothing else; the steps are the same under each.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import Any, Protocol

from torch import nn
from tqdm.auto import tqdm

from .compose import Stage
from .driving import (
    Batch,
    any_needs_data,
    batches_for,
    device_of,
    drive,
    named_exactly,
    reach,
    refuse_idle,
    to_device,
    without_cache,
)
from .errors import ModelError
from .run import Run, evaluating
from .scope import Example, Scope
from .speed import speed
from .techniques import Technique
from .toolkit import topology


class Journal(Protocol):
    """Where the blockwise driver keeps finished blocks, so that a killed run can go on (``resume.BlockJournal``)."""

    def restore(self, run: Run, first: Technique, name: str) -> bool: ...

    def keep(self, run: Run, first: Technique, name: str) -> None: ...


def calibrate(run: Run, stage: Stage, journal: Journal | None = None) -> dict[str, Any]:
    """Run the calibrating steps of a stage. Returns the ``driver`` that was used and its figures (see ``speed``).

    Raises ``ModelError`` when a step finds nothing to work on and ``NumericalError`` for non-finite activations, both
    naming the step. Every observer is detached and every module restored when anything raises.
    """
    steps = [step for step in stage.steps if step.implements("calibrate")]
    blocks = topology.blocks(run.model) if run.recipe.driver != "whole_model" else []
    figures: dict[str, Any] = {}
    if run.recipe.driver == "blockwise" and not blocks:
        raise ModelError(f"driver blockwise: no sequence of blocks was found in {type(run.model).__name__}")
    with evaluating(run.model), without_cache(run.model):
        for whole, group in groupby(steps, key=lambda step: not blocks or step.needs_whole_model()):
            if whole:
                _whole_model(run, list(group))
            else:
                # Asked again: a step before may have taken blocks out.
                driver = _Blockwise(run, list(group), topology.blocks(run.model), journal)
                driver.drive()
                figures |= speed(run, driver.seconds, driver.passes, driver.device)
    for step in steps:
        refuse_idle(run, step)
    return {"driver": "blockwise" if blocks else "whole_model", **figures}


def _whole_model(run: Run, steps: Sequence[Technique]) -> None:
    for step in steps:
        if step.needs_teacher():
            raise ModelError(
                f"{run.label(step)} works block by block, towards what each block computed before: use driver: "
                f"blockwise, with a model that has a sequence of blocks ({type(run.model).__name__})"
            )
    device = device_of(run.model)

    def feed(step: Technique) -> None:
        batches = batches_for(run, step)
        for batch in tqdm(batches, desc=f"calibrating: {step.name}", unit="batch", leave=False, disable=not batches):
            run.model(**to_device(batch, device))

    for step in steps:  # a scope for each: a step may take layers out
        drive(run, step, Scope("", run.model, run.model), feed)


class _Blockwise:
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
                        drive(self.run, step, scope, functools.partial(self._feed, index))
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
        steps = [step for step in self.steps if scope.select(named_exactly(step, scope)) and not step.needs_teacher()]

        def feed(step: Technique) -> None:
            for batch in batches_for(self.run, step):
                model(**to_device(batch, self.home))

        for step in steps:
            drive(self.run, step, scope, feed)

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
        return reach(
            self.run.model, self.blocks, index, to_device(batch, self.home), lambda stack: outputs[stack][number]
        )

    @contextmanager
    def _on_device(self, module: nn.Module) -> Iterator[None]:
        module.to(self.device)
        try:
            yield
        finally:
            module.to(self.home)
