"""Calibration drivers: how batches reach the observers that the steps of a stage attach.

``whole_model`` runs the model as it is. ``blockwise`` works on one transformer block at a time: that block alone is on
the accelerator, activations wait on the CPU, and what a block computes after it was changed is what the next block
is calibrated on. A driver decides how batches flow and nothing else; the steps are the same under each.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import Any, Protocol

import torch
from torch import nn
from torch.utils import _pytree as pytree
from tqdm.auto import tqdm

from .compose import Stage
from .errors import ModelError, NumericalError
from .run import Run, evaluating
from .scope import Example, Scope
from .techniques import Technique
from .toolkit import topology

Batch = dict[str, torch.Tensor]


class Journal(Protocol):
    """Where the blockwise driver keeps finished blocks, so that a killed run can go on (``resume.BlockJournal``)."""

    def restore(self, run: Run, first: Technique, name: str) -> bool: ...

    def keep(self, run: Run, first: Technique, name: str) -> None: ...


def calibrate(run: Run, stage: Stage, journal: Journal | None = None) -> str:
    """Run the calibrating steps of a stage. Returns the name of the driver that was used.

    Raises ``ModelError`` when a step finds nothing to work on and ``NumericalError`` for non-finite activations, both
    naming the step. Every observer is detached and every module restored when anything raises.
    """
    steps = [step for step in stage.steps if step.implements("calibrate")]
    blocks = topology.blocks(run.model) if run.recipe.driver != "whole_model" else []
    if run.recipe.driver == "blockwise" and not blocks:
        raise ModelError(f"driver blockwise: no sequence of blocks was found in {type(run.model).__name__}")
    with evaluating(run.model), _without_cache(run.model):
        for whole, group in groupby(steps, key=lambda step: not blocks or step.needs_whole_model()):
            if whole:
                _whole_model(run, list(group))
            else:
                _Blockwise(run, list(group), blocks, journal).drive()
    for step in steps:
        _refuse_idle(run, step)
    return "blockwise" if blocks else "whole_model"


def _whole_model(run: Run, steps: Sequence[Technique]) -> None:
    for step in steps:
        if step.needs_teacher():
            raise ModelError(
                f"{run.label(step)} works block by block, towards what each block computed before: use driver: "
                f"blockwise, with a model that has a sequence of blocks ({type(run.model).__name__})"
            )
    scope = Scope("", run.model, run.model)
    device = _device_of(run.model)

    def feed(step: Technique) -> None:
        batches = _batches(run, step)
        for batch in tqdm(batches, desc=step.name, unit="batch", leave=False, disable=not batches):
            run.model(**_to(batch, device))

    for step in steps:
        _drive(run, step, scope, feed)


class _Blockwise:
    """Calibrates blocks in execution order, each on the outputs of the blocks before it as they are by then.

    A block's arguments (masks, rotary embeddings, position biases) are made by the model's own forward: it is run with
    the blocks that are done replaced by stubs that return their stored outputs, up to the block in work.
    """

    def __init__(
        self, run: Run, steps: Sequence[Technique], blocks: Sequence[topology.Block], journal: Journal | None
    ) -> None:
        self.run, self.steps, self.blocks, self.journal = run, steps, blocks, journal
        self.home = _device_of(run.model)
        self.device = run.device or self.home
        self.batches: Sequence[Batch] = run.data.batches if run.data is not None and _any_needs_data(steps) else ()
        self.outputs: dict[str, list[Any]] = {}
        self.teaching = any(step.needs_teacher() for step in steps)
        self.taught: dict[str, list[Any]] = {}  # outputs of the blocks as they were, where a step works towards them

    def drive(self) -> None:
        model = self.run.model
        bar = tqdm(self.blocks, desc="calibrating", unit="block", disable=len(self.blocks) < 2)
        for index, block in enumerate(bar):
            bar.set_postfix_str(block.name, refresh=False)
            with self._on_device(block.module):
                lesson = self._lesson(index) if self.teaching else ()
                scope = Scope(block.name, block.module, model, index, len(self.blocks), teacher=lesson)
                if not (self.journal and self.journal.restore(self.run, self.steps[0], block.name)):
                    for step in self.steps:
                        _drive(self.run, step, scope, functools.partial(self._feed, index))
                    if self.journal:
                        self.journal.keep(self.run, self.steps[0], block.name)
                self.outputs[block.stack] = [
                    _to(block.module(*args, **kwargs), self.home) for args, kwargs in self._arguments(index)
                ]
        self._outside(len(self.blocks))

    def _outside(self, count: int) -> None:
        # What lies outside the blocks (a pooler, the output head) is touched only where a target names it exactly.
        model = self.run.model
        inside = tuple(block.name for block in self.blocks)
        scope = Scope("", model, model, count, count + 1, outside=inside)
        steps = [step for step in self.steps if scope.select(_named(step, scope)) and not step.needs_teacher()]

        def feed(step: Technique) -> None:
            for batch in _batches(self.run, step):
                model(**_to(batch, self.home))

        for step in steps:
            _drive(self.run, step, scope, feed)

    def _feed(self, index: int, step: Technique) -> None:
        if step.needs_data():
            block = self.blocks[index].module
            for args, kwargs in self._arguments(index):
                block(*args, **kwargs)

    def _arguments(self, index: int) -> Iterator[tuple[Any, Any]]:
        """The arguments of block ``index``, batch by batch, on the accelerator."""
        for number, batch in enumerate(self.batches):
            args, kwargs = self._reach(index, number, batch, self.outputs)
            yield _to(args, self.device), _to(kwargs, self.device)

    def _lesson(self, index: int) -> list[Example]:
        """What block ``index``, still as it was, computes where all blocks before it are as they were."""
        block, lesson = self.blocks[index], []
        for number, batch in enumerate(self.batches):
            args, kwargs = self._reach(index, number, batch, self.taught)
            output = block.module(*_to(args, self.device), **_to(kwargs, self.device))
            lesson.append(Example(args, kwargs, _to(output, self.home)))
        self.taught[block.stack] = [example.output for example in lesson]
        return lesson

    def _reach(self, index: int, number: int, batch: Batch, outputs: Mapping[str, list[Any]]) -> tuple[Any, Any]:
        """The arguments of block ``index`` for one batch, given the ``outputs`` of the blocks before it."""

        def stub(stack: str) -> Callable[..., Any]:
            return lambda *args, **kwargs: outputs[stack][number]

        def stop(*args: Any, **kwargs: Any) -> Any:
            raise _Reached(args, kwargs)

        forwards = {block.module: stub(block.stack) for block in self.blocks[:index]}
        forwards[self.blocks[index].module] = stop
        with _replaced(forwards):
            try:
                self.run.model(**_to(batch, self.home))
            except _Reached as reached:
                return reached.args_, reached.kwargs
        raise ModelError(f"{self.blocks[index].name} did not run; calibrate with driver: whole_model")

    @contextmanager
    def _on_device(self, module: nn.Module) -> Iterator[None]:
        module.to(self.device)
        try:
            yield
        finally:
            module.to(self.home)


class _Reached(Exception):
    """Ends a forward at the block in work, and carries that block's arguments."""

    def __init__(self, args: Any, kwargs: Any) -> None:
        super().__init__()
        self.args_, self.kwargs = args, kwargs


def _drive(run: Run, step: Technique, scope: Scope, feed: Callable[[Technique], None]) -> None:
    """Run one step's generator over one scope, feeding batches at each yield; close it whatever happens."""
    for generator in run.call_on([step], "calibrate", scope=scope):
        try:
            for _ in generator:
                feed(step)
        except NumericalError as error:
            if run.label(step) in str(error):
                raise
            raise NumericalError(f"{run.label(step)}: {error}") from error
        finally:
            generator.close()


def _batches(run: Run, step: Technique) -> Sequence[Batch]:
    return run.data.batches if run.data is not None and step.needs_data() else ()


def _any_needs_data(steps: Sequence[Technique]) -> bool:
    return any(step.needs_data() for step in steps)


def _named(step: Technique, scope: Scope) -> tuple[str, ...]:
    """The targets of a step that are exact names of linears in the scope."""
    return tuple(target for target in getattr(step, "targets", ()) if target in scope.linears)


def _refuse_idle(run: Run, step: Technique) -> None:
    touched = run.touched(step)
    if touched is None or touched[0]:
        return
    why = "; ".join(f"{reason}: {_few(names)}" for reason, names in sorted(touched[1].items()))
    raise ModelError(
        f"{run.label(step)} found nothing to work on in {type(run.model).__name__}. {why or 'No module matched'}"
    )


def _few(names: set[str]) -> str:
    ordered = sorted(names)
    return ", ".join(ordered[:4]) + (f" and {len(ordered) - 4} more" if len(ordered) > 4 else "")


@contextmanager
def _replaced(forwards: dict[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """The modules with other forwards, on the instances alone; undone also when the body raises."""
    before: dict[nn.Module, Any] = {module: module.__dict__.get("forward") for module in forwards}
    try:
        for module, forward in forwards.items():
            module.forward = forward  # type: ignore[method-assign]
        yield
    finally:
        for module, own in before.items():
            del module.forward
            if own is not None:
                module.forward = own


@contextmanager
def _without_cache(model: nn.Module) -> Iterator[None]:
    """No KV cache while calibrating: nothing is decoded, and a cache would pin every activation."""
    config: Any = getattr(model, "config", None)
    before = getattr(config, "use_cache", None)
    if not before:
        yield
        return
    config.use_cache = False
    try:
        yield
    finally:
        config.use_cache = before


def _to(tree: Any, device: torch.device) -> Any:
    return pytree.tree_map(lambda leaf: leaf.to(device) if isinstance(leaf, torch.Tensor) else leaf, tree)


def _device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
