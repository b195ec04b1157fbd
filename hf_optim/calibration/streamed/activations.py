"""Activations on their way through the blocks: the arguments of a block, batch by batch, and what became of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...errors import ModelError
from ...runs.scope import Example
from ...toolkit import topology
from ..forward import Batch, capture_block_inputs, replace_forwards, to_device
from .activation_store import ActivationStore
from .block_arguments import RecordedArguments, infer_signature, record_calls
from .materialize import NonBlockWeights

CPU = torch.device("cpu")


class ActivationCache:
    """The activations of one state of a model, from block to block.

    Args:
        model: without weights but for the block in work and, in a forward, what lies outside the blocks.
        blocks: of the model.
        batches: what the model is fed, on the CPU.
        outskirts: what lies outside the blocks.
        device: of the block in work.
        directory: where activations are spilled; None keeps them in host memory.
        name: tells the files of two flows apart.
        keeps_inputs: keep what a block was given until the next block is in work, beside what it made of it.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: Sequence[topology.Block],
        batches: Sequence[Batch],
        outskirts: NonBlockWeights,
        device: torch.device,
        directory: Path | None = None,
        name: str = "hidden",
        keeps_inputs: bool = False,
    ) -> None:
        self.model, self.blocks, self.batches, self.outskirts = model, blocks, batches, outskirts
        self.device = device
        self._arguments: dict[str, RecordedArguments | None] = {}
        self._make = lambda number: ActivationStore(device, directory, f"{name}{number}-{len(self._streams)}")
        self._streams: dict[str, list[ActivationStore]] = {}
        self._copies = 2 if keeps_inputs else 1

    def enter(self, index: int) -> None:
        """Block ``index`` is real now and comes next."""
        block = self.blocks[index]
        if block.stack in self._streams:
            self._streams[block.stack].reverse()
            return
        self._streams[block.stack] = [self._make(number) for number in range(self._copies)]
        with self.outskirts.on_demand():
            self._arguments[block.stack] = self._survey(index)

    def arguments(self, index: int) -> Iterator[tuple[Any, Any]]:
        """``(args, kwargs)`` of block ``index``, batch by batch, on the device of the block in work."""
        if self._arguments[self.blocks[index].stack] is not None:
            for number in range(len(self.batches)):
                yield self.call(index, number, self.device)
            return
        with self.outskirts.on_demand():
            for number in range(len(self.batches)):
                yield self.call(index, number, self.device)

    def call(self, index: int, number: int, device: torch.device) -> tuple[Any, Any]:
        """``(args, kwargs)`` of block ``index`` for one batch."""
        block = self.blocks[index]
        known = self._arguments[block.stack]
        if known is not None:
            hidden = self._streams[block.stack][0].get(number, device)
            return known.of(self._position(index), number, hidden, device)
        args, kwargs = self._reached(index, number)
        return to_device(args, device), to_device(kwargs, device)

    def put(self, index: int, number: int, output: Any) -> None:
        """What block ``index`` returned for a batch."""
        block = self.blocks[index]
        known, stream = self._arguments[block.stack], self._streams[block.stack][-1]
        if known is None:
            stream.put(number, output)
            return
        hidden = known.shape.hidden_of(output)
        if hidden is None:
            raise ModelError(f"{block.name} returns something else than the blocks before it: use driver: blockwise")
        stream.put(number, hidden)

    def output(self, index: int, number: int) -> Any:
        """What block ``index``, the last of its stack so far, returned for a batch, on the CPU."""
        return self._output_of(self.blocks[index].stack, number, -1)

    def forward(self, number: int) -> Any:
        """The model's output for a batch, when every block is done: what lies outside runs on what they returned."""
        with replace_forwards(self._stubs(self.blocks, number)):
            return self.model(**self.batches[number])

    def close(self) -> None:
        """Remove what was spilled."""
        for streams in self._streams.values():
            for stream in streams:
                stream.clear()

    def _stubs(self, blocks: Sequence[topology.Block], number: int) -> dict[nn.Module, Callable[..., Any]]:
        def stub(stack: str) -> Callable[..., Any]:
            return lambda *args, **kwargs: self._output_of(stack, number, -1)

        return {block.module: stub(block.stack) for block in blocks}

    def _position(self, index: int) -> int:
        stack = self.blocks[index].stack
        return sum(block.stack == stack for block in self.blocks[:index])

    def _output_of(self, stack: str, number: int, which: int) -> Any:
        kept = self._streams[stack][which].get(number, CPU)
        known = self._arguments[stack]
        return kept if known is None else known.shape.returned(kept)

    def _reached(self, index: int, number: int) -> tuple[Any, Any]:
        # A stack that is behind has what it returned in the last stream; the stack in work, in the first.
        own = self.blocks[index].stack
        return capture_block_inputs(
            self.model,
            self.blocks,
            index,
            self.batches[number],
            lambda stack: self._output_of(stack, number, 0 if stack == own else -1),
        )

    def _survey(self, index: int) -> RecordedArguments | None:
        """Record how the blocks of the stack that begins at ``index`` are called, and keep the first hidden states."""
        block = self.blocks[index]
        stack = [other for other in self.blocks if other.stack == block.stack]
        if stack != list(self.blocks[index : index + len(stack)]) or not self.batches:
            return None
        args, kwargs = self._reached(index, 0)
        output = block.module(*to_device(args, self.device), **to_device(kwargs, self.device))
        shape = infer_signature((args, kwargs), output)
        if shape is None:
            return None
        found = RecordedArguments(shape)
        for number, batch in enumerate(self.batches):
            surveyed = record_calls(self.model, stack, batch, shape, self._stubs(self.blocks[:index], number))
            if surveyed is None:
                return None
            hidden, calls, slots = surveyed
            self._streams[block.stack][0].put(number, hidden)
            found.add(number, calls, slots)
        return found


class ReferenceOutputs(Sequence[Example]):
    """What a block computed as it was, batch by batch; fetched from the flow when asked for."""

    def __init__(self, flow: ActivationCache, index: int) -> None:
        self.flow, self.block = flow, index

    def __len__(self) -> int:
        return len(self.flow.batches)

    def __getitem__(self, number: Any) -> Any:
        if isinstance(number, slice):
            return [self[each] for each in range(*number.indices(len(self)))]
        if not -len(self) <= number < len(self):
            raise IndexError(number)
        number %= len(self)
        with self.flow.outskirts.on_demand():
            args, kwargs = self.flow.call(self.block, number, CPU)
        return Example(args, kwargs, self.flow.output(self.block, number))
