"""The streamed driver: blocks are read, calibrated, packed and written one after another."""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ...checkpoints.reader import Checkpoint
from ...compressed.quantizer import PackingFallback
from ...errors import ModelError
from ...recipes.technique import Technique
from ...runs.masking import stray_weights
from ...runs.run import Run
from ...runs.scope import Scope
from ...toolkit import topology
from ...toolkit.modules.modes import eval_mode
from ..forward import without_cache
from ..steps import any_needs_data, exact_targets, require_covered, run_calibration
from ..throughput import summarize_throughput
from .activations import CPU, ActivationCache, ReferenceOutputs
from .materialize import NonBlockWeights, materialize, offload_to_meta, state_names
from .output import StreamedOutput

log = logging.getLogger(__name__)


class StreamedDriver:
    """Calibrates the blocks of a weightless model in execution order, and writes each when it is done.

    Args:
        run: its model is a skeleton; ``run.device`` is where blocks are calibrated.
        steps: the calibrating steps.
        checkpoint: where the weights are.
        output: where finished blocks go.
        spill: where activations go; None keeps them in host memory.
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
        self.blocks = topology.blocks(self.model)
        self.device = run.device or CPU
        inside = [block.name for block in self.blocks]
        self.outskirts = NonBlockWeights(self.model, inside, self.checkpoint.read)
        batches = run.data.batches if run.data is not None and any_needs_data(steps) else ()
        flow = functools.partial(ActivationCache, self.model, self.blocks, batches, self.outskirts, self.device, spill)
        self.flow = flow() if batches else None
        teaching = bool(batches) and any(step.needs_teacher() for step in steps)
        self.taught = flow(name="taught", keeps_inputs=True) if teaching else None
        self.packing_fallback = PackingFallback()
        self.loose: list[str] = []
        self.seconds: list[float] = []
        self.passes = 0

    def calibrate(self) -> None:
        """Do all blocks, then what lies outside them."""
        with eval_mode(self.model), without_cache(self.model), ThreadPoolExecutor(1) as reader:
            try:
                self._drive(reader)
                self._outside()
            finally:
                for flow in (self.flow, self.taught):
                    if flow is not None:
                        flow.close()
        for step in self.steps:
            require_covered(self.run, step)

    def _drive(self, reader: ThreadPoolExecutor) -> None:
        bar = tqdm(self.blocks, desc="compressing", unit="block", disable=len(self.blocks) < 2)
        ahead = self._ahead(reader, 0)
        for index, block in enumerate(bar):
            started = time.perf_counter()
            finished = self.output.finished(index)
            if finished:
                self.loose += self.output.restore(self.run, index)
                if self.flow is None:
                    self.output.mark(block.module, index)
                    ahead = self._ahead(reader, index + 1)
                    continue
            tensors, ahead = self._read(index, ahead), self._ahead(reader, index + 1)
            with self._real(index, tensors):
                del tensors
                self._one(index, finished, bar)
            if not finished:
                self.seconds.append(time.perf_counter() - started)

    def _one(self, index: int, finished: bool, bar: Any) -> None:
        block = self.blocks[index]
        lesson: Sequence[Any] = ()
        if self.taught is not None:
            bar.set_postfix_str(f"{block.name}: as it was")
            self._pass(self.taught, index)
            lesson = ReferenceOutputs(self.taught, index)
        if self.flow is not None:
            self.flow.enter(index)
        if finished:
            self.output.load(block.module, index)
        else:
            self._calibrate(index, lesson, bar)
            bar.set_postfix_str(f"{block.name}: writing")
            self._write(index)
        if self.flow is not None and index + 1 < len(self.blocks):
            bar.set_postfix_str(f"{block.name}: outputs")
            self._outputs(self.flow, index)
        elif self.flow is not None and self._outer_steps():
            self._outputs(self.flow, index)

    def _calibrate(self, index: int, lesson: Sequence[Any], bar: Any) -> None:
        block = self.blocks[index]
        scope = Scope(block.name, block.module, self.model, index, len(self.blocks), teacher=lesson)
        with self._nothing_else_changes(block):
            for step in self.steps:
                bar.set_postfix_str(f"{block.name}: {step.name}")
                run_calibration(self.run, step, scope, functools.partial(self._feed, index))

    def _feed(self, index: int, step: Technique) -> None:
        if step.needs_data() and self.flow is not None:
            self.passes += 1
            block = self.blocks[index].module
            for args, kwargs in self.flow.arguments(index):
                block(*args, **kwargs)

    def _pass(self, flow: ActivationCache, index: int) -> None:
        flow.enter(index)
        self._outputs(flow, index)

    def _outputs(self, flow: ActivationCache, index: int) -> None:
        self.passes += 1
        block = self.blocks[index].module
        for number, (args, kwargs) in enumerate(flow.arguments(index)):
            flow.put(index, number, block(*args, **kwargs))
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _write(self, index: int) -> None:
        if stray := stray_weights(self.run):
            raise ModelError(f"{stray[0]} has weights where it was pruned by an earlier step")
        block = self.blocks[index]
        self.packing_fallback.apply(self.run, block.name)
        self.loose += self.output.write_block(self.run, index)
        # Kept beside the block; they would grow with the model, and are read back when the run is finished.
        self.run.masks.clear()

    def metrics(self) -> dict[str, Any]:
        """Figures for the record: seconds a block, and tokens of calibration a second."""
        return summarize_throughput(self.run, self.seconds, self.passes, self.device)

    # -- what lies outside the blocks -----------------------------------------------------------------------------
    def _outer_steps(self) -> list[Technique]:
        scope = self._outer_scope()
        return [step for step in self.steps if scope.select(exact_targets(step, scope)) and not step.needs_teacher()]

    def _outer_scope(self) -> Scope:
        count = len(self.blocks)
        inside = tuple(block.name for block in self.blocks)
        return Scope("", self.model, self.model, count, count + 1, outside=inside)

    def _outside(self) -> None:
        """Steps that name a layer outside the blocks exactly; then the shard of all that lies there."""
        steps = self._outer_steps()
        try:
            if steps:
                self.outskirts.make_real()
            for step in steps:
                run_calibration(self.run, step, self._outer_scope(), self._feed_outside)
            self.output.write_rest(self.run, self.outskirts.names, self.checkpoint, self.packing_fallback, self.loose)
        finally:
            self.outskirts.make_weightless()
            for name in topology.linears(self.model):
                if not any(block.holds(name) for block in self.blocks):
                    offload_to_meta(self.model.get_submodule(name))

    def _feed_outside(self, step: Technique) -> None:
        if step.needs_data() and self.flow is not None:
            for number in range(len(self.flow.batches)):
                self.flow.forward(number)

    # -- blocks in and out ----------------------------------------------------------------------------------------
    def _names(self, index: int) -> list[str]:
        return state_names(self.blocks[index].module, self.blocks[index].name)

    def _ahead(self, reader: ThreadPoolExecutor, index: int) -> Future[dict[str, Tensor]] | None:
        """Begin to read a block while another is in work; None where it will not be needed."""
        if index >= len(self.blocks) or (self.output.finished(index) and self.flow is None):
            return None
        return reader.submit(self.checkpoint.read, self._names(index), self.device.type == "cuda")

    def _read(self, index: int, ahead: Future[dict[str, Tensor]] | None) -> dict[str, Tensor]:
        tensors = ahead.result() if ahead is not None else self.checkpoint.read(self._names(index))
        prefix = f"{self.blocks[index].name}."
        return {name.removeprefix(prefix): value for name, value in tensors.items()}

    @contextmanager
    def _real(self, index: int, tensors: dict[str, Tensor]) -> Iterator[None]:
        module = self.blocks[index].module
        materialize(module, tensors, self.device)
        tensors.clear()
        try:
            yield
        finally:
            offload_to_meta(module)

    @contextmanager
    def _nothing_else_changes(self, block: topology.Block) -> Iterator[None]:
        """Refuse a step that writes into a weightless tensor: the change would be lost without a word."""

        def versions() -> dict[str, int]:
            named = [*self.model.named_parameters(), *self.model.named_buffers()]
            return {name: tensor._version for name, tensor in named if not block.holds(name)}

        before = versions()
        yield
        for name, version in versions().items():
            if version != before.get(name, version):
                raise ModelError(
                    f"a step changed {name} while {block.name} was in work; the streamed driver has one block in "
                    "memory at a time: use driver: blockwise"
                )
