"""The streamed driver: read, calibrate, pack and write one block after another."""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...checkpoints.reader import Checkpoint
from ...compressed.quantizer import PackingFallback
from ...errors import ModelError
from ...recipes.technique import Technique
from ...runs.acceptance import refuse_nonfinite, require_finite
from ...runs.masking import stray_weights
from ...runs.memory import map_large_blocks, release_freed_pages
from ...runs.progress import Items, progress
from ...runs.run import Run
from ...runs.scope import Example, Scope
from ...runs.stored_zeros import find_pending
from ...toolkit import topology
from ...toolkit.modules.finite import nonfinite
from ...toolkit.modules.modes import eval_mode
from ...toolkit.statistics import BatchRows
from ..forward import run_block, without_cache
from ..steps import any_needs_data, labels_for, name_of_work, require_covered, run_calibration, selects_in
from ..throughput import summarize_throughput
from .activations import CPU, ActivationCache, ReferenceOutputs
from .materialize import NonBlockWeights, materialize, offload_to_meta, state_names
from .output import StreamedOutput


class StreamedDriver:
    """Calibrates the blocks of a model on the meta device in execution order, and writes each once it is complete.

    Args:
        run: the run of a meta model; ``run.device`` is where blocks are calibrated (default: the CPU).
        steps: the calibrating steps.
        checkpoint: where the weights are read from.
        output: where completed blocks are written to.
        spill: the directory activations are offloaded to; None keeps them in host memory.

    Attributes:
        off_grid: names of quantized modules whose weights no longer fit their grid and are written dense.
    """

    def __init__(
        self,
        run: Run,
        steps: Sequence[Technique],
        checkpoint: Checkpoint,
        output: StreamedOutput,
        spill: Path | None = None,
    ) -> None:
        self.run, self.steps, self.checkpoint, self.output = run, steps, checkpoint, output
        self.model = run.model
        self.blocks = topology.require_blocks(self.model, "streamed")
        self.device = run.device or CPU
        self.rows = BatchRows(self.model)
        self.non_block_weights = NonBlockWeights(
            self.model, [block.name for block in self.blocks], self.checkpoint.read
        )
        batches = run.data.batches if run.data is not None and any_needs_data(steps) else ()
        make_cache = functools.partial(
            ActivationCache, self.model, self.blocks, batches, self.non_block_weights, self.device, spill
        )
        self.cache = make_cache() if batches else None
        needs_references = bool(batches) and any(step.needs_teacher() for step in steps)
        self.reference_cache = make_cache(name="reference", keeps_inputs=True) if needs_references else None
        self.packing_fallback = PackingFallback()
        self.off_grid: list[str] = []
        self.seconds: list[float] = []
        self.passes = 0

    def calibrate(self) -> None:
        """Calibrate and write all blocks, then what lies outside them.

        Raises ``ModelError`` if a step has no layer to change, or modifies a weight outside the current block.
        """
        map_large_blocks()
        self._require_finite_non_blocks()
        with eval_mode(self.model), without_cache(self.model), ThreadPoolExecutor(1) as reader:
            try:
                self._calibrate_blocks(reader)
                self._calibrate_non_blocks()
            finally:
                for cache in (self.cache, self.reference_cache):
                    if cache is not None:
                        cache.close()
        for step in self.steps:
            require_covered(self.run, step)

    def metrics(self) -> dict[str, Any]:
        """Return the throughput metrics for the record."""
        return summarize_throughput(self.run, self.seconds, self.passes, self.device)

    # -- blocks ---------------------------------------------------------------------------------------------------
    def _calibrate_blocks(self, reader: ThreadPoolExecutor) -> None:
        with progress(self.blocks, name_of_work(self.steps), unit="blocks") as shown:
            self._calibrate_each(reader, shown)

    def _calibrate_each(self, reader: ThreadPoolExecutor, shown: Items[topology.Block]) -> None:
        prefetched = self._prefetch(reader, 0)
        for index, block in enumerate(shown):
            started = time.perf_counter()
            completed = self.output.is_completed(index)
            if completed:
                self.off_grid += self.output.restore(self.run, index)
                if self.cache is None:
                    self.output.attach_schemes(block.module, index)
                    prefetched = self._prefetch(reader, index + 1)
                    continue
            tensors, prefetched = self._read_block(index, prefetched), self._prefetch(reader, index + 1)
            with self._materialized(index, tensors):
                del tensors
                self._process_block(index, completed, shown)
            if not completed:
                self.seconds.append(time.perf_counter() - started)

    def _process_block(self, index: int, completed: bool, shown: Items[topology.Block]) -> None:
        """Calibrate and write a materialized block, or load its completed state; then compute its outputs."""
        block = self.blocks[index]
        references: Sequence[Example] = ()
        if self.reference_cache is not None:
            shown.note(f"{block.name}: reference outputs")
            self.reference_cache.start_block(index)
            self._compute_outputs(self.reference_cache, index)
            references = ReferenceOutputs(self.reference_cache, index)
        if self.cache is not None:
            self.cache.start_block(index)
        if completed:
            self.output.load_block(block.module, index)
        else:
            self._calibrate_block(index, references, shown)
            shown.note(f"{block.name}: writing")
            self._write_block(index)
        if self.cache is not None and index + 1 < len(self.blocks):
            shown.note(f"{block.name}: outputs")
            self._compute_outputs(self.cache, index)
        elif self.cache is not None and self._non_block_steps():
            self._compute_outputs(self.cache, index)

    def _calibrate_block(self, index: int, references: Sequence[Example], shown: Items[topology.Block]) -> None:
        block = self.blocks[index]
        scope = Scope(block.name, block.module, self.model, index, len(self.blocks), teacher=references)
        require_finite(block.module, block.name, "")
        find_pending(self.run, f"{block.name}.")
        with self._refuse_changes_outside(block):
            for step in self.steps:
                shown.note(f"{block.name}: {step.name}")
                run_calibration(self.run, step, scope, functools.partial(self._run_batches, index))

    def _run_batches(self, index: int, step: Technique) -> None:
        if step.needs_data() and self.cache is not None:
            self.passes += 1
            block = self.blocks[index].module
            for number, (args, kwargs) in enumerate(self.cache.block_inputs(index)):
                with self.rows.of(self.cache.batches[number], labels_for(self.run, number)):
                    run_block(self.model, block, args, kwargs, self.cache.batches[number])

    def _compute_outputs(self, cache: ActivationCache, index: int) -> None:
        self.passes += 1
        block = self.blocks[index].module
        for number, (args, kwargs) in enumerate(cache.block_inputs(index)):
            cache.put_output(index, number, run_block(self.model, block, args, kwargs, cache.batches[number]))
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _write_block(self, index: int) -> None:
        if stray := stray_weights(self.run):
            raise ModelError(f"{stray[0]} has non-zero weights where an earlier step pruned them")
        self.packing_fallback.apply(self.run, self.blocks[index].name)
        self.off_grid += self.output.write_block(self.run, index)
        # They are in the state file of the block and are read back at the end; here they would grow with the model.
        self.run.masks.clear()

    def _require_finite_non_blocks(self) -> None:
        """Raise ``NumericalError`` if weights outside the blocks are not finite; one tensor is read at a time."""
        names = self.non_block_weights.names
        absent = set(self.checkpoint.missing(names))  # tied to one that is stored
        for name in names:
            if name not in absent and nonfinite(self.checkpoint.read([name])[name]):
                refuse_nonfinite([name])

    # -- outside the blocks ---------------------------------------------------------------------------------------
    def _non_block_steps(self) -> list[Technique]:
        scope = self._non_block_scope()
        return [step for step in self.steps if not step.needs_teacher() and selects_in(step, scope)]

    def _non_block_scope(self) -> Scope:
        count = len(self.blocks)
        inside = tuple(block.name for block in self.blocks)
        return Scope("", self.model, self.model, count, count + 1, outside=inside)

    def _calibrate_non_blocks(self) -> None:
        """Run the steps that select layers outside the blocks; then write the shard of all non-block weights."""
        steps = self._non_block_steps()
        try:
            if steps:
                self.non_block_weights.materialize()
                find_pending(self.run)
            for step in steps:
                run_calibration(self.run, step, self._non_block_scope(), self._run_model)
            self.output.write_non_blocks(
                self.run, self.non_block_weights.names, self.checkpoint, self.packing_fallback, self.off_grid
            )
        finally:
            self.non_block_weights.offload()
            for name in topology.linears(self.model):
                if not any(block.holds(name) for block in self.blocks):
                    offload_to_meta(self.model.get_submodule(name))

    def _run_model(self, step: Technique) -> None:
        if step.needs_data() and self.cache is not None:
            for number, batch in enumerate(self.cache.batches):
                with self.rows.of(batch, labels_for(self.run, number)):
                    self.cache.forward(number)

    # -- reading and offloading -----------------------------------------------------------------------------------
    def _block_names(self, index: int) -> list[str]:
        return state_names(self.blocks[index].module, self.blocks[index].name)

    def _prefetch(self, reader: ThreadPoolExecutor, index: int) -> Future[dict[str, Tensor]] | None:
        """Start reading a block while another one is calibrated; None if it will not be needed."""
        if index >= len(self.blocks) or (self.output.is_completed(index) and self.cache is None):
            return None
        return reader.submit(self.checkpoint.read, self._block_names(index), self.device.type == "cuda")

    def _read_block(self, index: int, prefetched: Future[dict[str, Tensor]] | None) -> dict[str, Tensor]:
        """Return the tensors of a block, by their names in the block."""
        tensors = prefetched.result() if prefetched is not None else self.checkpoint.read(self._block_names(index))
        prefix = f"{self.blocks[index].name}."
        return {name.removeprefix(prefix): value for name, value in tensors.items()}

    @contextmanager
    def _materialized(self, index: int, tensors: dict[str, Tensor]) -> Iterator[None]:
        module = self.blocks[index].module
        materialize(module, tensors, self.device)
        tensors.clear()
        try:
            yield
        finally:
            offload_to_meta(module)
            release_freed_pages()  # or the resident memory grows by most of each block

    @contextmanager
    def _refuse_changes_outside(self, block: topology.Block) -> Iterator[None]:
        """Raise ``ModelError`` if the body writes into a meta tensor: the change would be lost silently."""

        def versions() -> dict[str, int]:
            named = [*self.model.named_parameters(), *self.model.named_buffers()]
            return {name: tensor._version for name, tensor in named if not block.holds(name)}

        before = versions()
        yield
        for name, version in versions().items():
            if version != before.get(name, version):
                raise ModelError(
                    f"a step changed {name} while {block.name} was the current block; the streamed driver has one "
                    "block in memory at a time: use driver: blockwise"
                )
