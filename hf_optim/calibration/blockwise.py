"""The blockwise driver: calibrate one block after another in a model that is entirely in memory."""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from torch import nn

from ..recipes.technique import Technique
from ..runs.progress import Items, progress
from ..runs.run import Run
from ..runs.scope import Example, Scope
from ..toolkit import topology
from ..toolkit.modules.modes import device_of
from ..toolkit.statistics import BatchRows
from ..toolkit.topology.towers import media_parts
from .forward import Batch, capture_block_inputs, forward_errors, run_block, to_device
from .steps import any_needs_data, batches_for, labels_for, name_of_work, run_calibration, selects_in


class Journal(Protocol):
    """Where the blockwise driver keeps completed blocks, so that a killed run can resume (``BlockJournal``)."""

    def restore(self, run: Run, first: Technique, name: str) -> bool: ...

    def save(self, run: Run, first: Technique, name: str) -> None: ...


class BlockwiseDriver:
    """Calibrates blocks in execution order, each on the outputs of the preceding, already modified blocks.

    The arguments of a block (masks, rotary embeddings, position biases) come from the model's own forward, so the
    driver depends on no architecture. For each batch, that forward runs with the completed blocks replaced by stubs
    that return their stored outputs, up to the current block, where ``BlockInputsCaptured`` stops it (see
    ``forward.capture_block_inputs``).

    Args:
        run: the run; ``run.device`` is where blocks are calibrated (default: where the model is).
        steps: the calibrating steps.
        blocks: the blocks of the model.
        journal: where completed blocks are kept; None keeps none.
    """

    def __init__(
        self, run: Run, steps: Sequence[Technique], blocks: Sequence[topology.Block], journal: Journal | None
    ) -> None:
        self.run, self.steps, self.blocks, self.journal = run, steps, blocks, journal
        self.home = device_of(run.model)
        self.device = run.device or self.home
        self.batches: Sequence[Batch] = run.data.batches if run.data is not None and any_needs_data(steps) else ()
        self.rows = BatchRows(run.model)
        self.seconds: list[float] = []
        self.passes = 0
        # Per block list, the outputs of its latest block by batch: of the modified model, and of the unmodified one.
        self.outputs: dict[str, list[Any]] = {}
        self.reference_outputs: dict[str, list[Any]] = {}

    def calibrate(self) -> None:
        """Run the steps over the towers, over every block, and then over what else lies outside the blocks."""
        self._calibrate_before_blocks()
        with progress(self.blocks, name_of_work(self.steps), unit="blocks") as shown:
            for index, block in enumerate(shown):
                started = time.perf_counter()
                with self._on_device(block.module):
                    restored = self._calibrate_block(index, shown)
                    if self.batches:
                        shown.note(f"{block.name}: outputs")
                    self.passes += bool(self.batches) and not restored
                    self.outputs[block.list_name] = [
                        to_device(run_block(self.run.model, block.module, *inputs, batch), self.home)
                        for batch, inputs in zip(self.batches, self._block_inputs(index), strict=True)
                    ]
                if not restored:
                    self.seconds.append(time.perf_counter() - started)
            shown.note("layers outside the blocks")
            self._calibrate_non_blocks()

    def _calibrate_block(self, index: int, shown: Items[topology.Block]) -> bool:
        """Run the steps over one block, or restore it from the journal. Returns True if it was restored."""
        block = self.blocks[index]
        needs_references = any(step.needs_teacher() for step in self.steps)
        references = self._compute_references(index) if needs_references else ()
        scope = Scope(block.name, block.module, self.run.model, index, len(self.blocks), teacher=references)
        if self.journal and self.journal.restore(self.run, self.steps[0], block.name):
            return True
        for step in self.steps:
            shown.note(f"{block.name}: {step.name}")
            run_calibration(self.run, step, scope, functools.partial(self._run_batches, index))
        if self.journal:
            self.journal.save(self.run, self.steps[0], block.name)
        return False

    def _calibrate_before_blocks(self) -> None:
        """Run the steps over the parts of vision and audio towers, and over projectors, that their targets select.

        The blocks are calibrated on what these parts make of the images and the sound, so they come first, in the order
        of their registration. A forward ends at the first block.
        """
        for scope in self._parts_before_blocks():
            for step in self._steps_outside(scope):
                run_calibration(self.run, step, scope, self._run_to_first_block)

    def _parts_before_blocks(self) -> list[Scope]:
        """Return what lies before the blocks as scopes: the members of the lists in each tower, then its rest."""
        model, found = self.run.model, media_parts(self.run.model, [block.name for block in self.blocks])
        return [
            Scope(name, model.get_submodule(name), model, index, len(found), outside=tuple(outside))
            for index, (name, outside) in enumerate(found.items())
        ]

    def _run_to_first_block(self, step: Technique) -> None:
        for number, batch in enumerate(batches_for(self.run, step)):
            with self.rows.of(batch, labels_for(self.run, number)):
                capture_block_inputs(self.run.model, self.blocks, 0, to_device(batch, self.home), lambda name: None)

    def _calibrate_non_blocks(self) -> None:
        # A pooler, the output head, embeddings: modified only where a target names them.
        model, count = self.run.model, len(self.blocks)
        done = media_parts(model, [block.name for block in self.blocks])
        scope = Scope("", model, model, count, count + 1, outside=(*(block.name for block in self.blocks), *done))

        def run_batches(step: Technique) -> None:
            for number, batch in enumerate(batches_for(self.run, step)):
                with self.rows.of(batch, labels_for(self.run, number)), forward_errors(model, batch):
                    model(**to_device(batch, self.home))

        for step in self._steps_outside(scope):
            run_calibration(self.run, step, scope, run_batches)

    def _steps_outside(self, scope: Scope) -> list[Technique]:
        return [step for step in self.steps if not step.needs_teacher() and selects_in(step, scope)]

    def _run_batches(self, index: int, step: Technique) -> None:
        if step.needs_data():
            self.passes += 1
            block = self.blocks[index].module
            for number, (args, kwargs) in enumerate(self._block_inputs(index)):
                with self.rows.of(self.batches[number], labels_for(self.run, number)):
                    run_block(self.run.model, block, args, kwargs, self.batches[number])

    def _block_inputs(self, index: int) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
        """Yield the ``(args, kwargs)`` of block ``index``, batch by batch, on the accelerator."""
        for number, batch in enumerate(self.batches):
            args, kwargs = self._capture_inputs(index, number, batch, self.outputs)
            yield to_device(args, self.device), to_device(kwargs, self.device)

    def _compute_references(self, index: int) -> list[Example]:
        """Compute the reference outputs of block ``index`` in the unmodified model, with the inputs they belong to.

        The block itself must not have been modified yet.
        """
        block, references = self.blocks[index], []
        for number, batch in enumerate(self.batches):
            args, kwargs = self._capture_inputs(index, number, batch, self.reference_outputs)
            inputs = to_device(args, self.device), to_device(kwargs, self.device)
            output = run_block(self.run.model, block.module, *inputs, batch)
            kept = to_device(output, self.home)
            references.append(Example(args, kwargs, kept, self.rows.output_mask(batch, block.module, kept)))
        self.reference_outputs[block.list_name] = [example.output for example in references]
        return references

    def _capture_inputs(
        self, index: int, number: int, batch: Batch, outputs: Mapping[str, list[Any]]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the ``(args, kwargs)`` of block ``index`` for one batch, given the ``outputs`` of preceding blocks."""

        def output_of(list_name: str) -> Any:
            return outputs[list_name][number]

        return capture_block_inputs(self.run.model, self.blocks, index, to_device(batch, self.home), output_of)

    @contextmanager
    def _on_device(self, module: nn.Module) -> Iterator[None]:
        module.to(self.device)
        try:
            yield
        finally:
            module.to(self.home)
