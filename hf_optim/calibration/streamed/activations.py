"""The activations between blocks of a streamed model: the inputs of each block by batch, and its outputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...errors import ModelError
from ...runs.scope import Example
from ...toolkit import topology
from ...toolkit.statistics import BatchRows
from ..forward import Batch, capture_block_inputs, replace_forwards, run_block, to_device
from .activation_store import ActivationStore
from .block_arguments import RecordedArguments, infer_signature, record_calls
from .materialize import NonBlockWeights

CPU = torch.device("cpu")
Inputs = tuple[tuple[Any, ...], dict[str, Any]]


class ActivationCache:
    """The activations of one version of a model (modified or original), carried from block to block.

    Args:
        model: the model on the meta device, except for the current block and, during its forward, the weights outside
            the blocks.
        blocks: the blocks of the model.
        batches: the inputs of the model, on the CPU.
        non_block_weights: the weights outside the blocks.
        device: the device of the current block.
        directory: where activations are offloaded to; None keeps them in host memory.
        name: prefix of the file names, to distinguish two caches in one directory.
        keeps_inputs: keep the inputs of a block too, not only its outputs, until the next block starts.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: Sequence[topology.Block],
        batches: Sequence[Batch],
        non_block_weights: NonBlockWeights,
        device: torch.device,
        directory: Path | None = None,
        name: str = "hidden",
        keeps_inputs: bool = False,
    ) -> None:
        self.model, self.blocks, self.batches = model, blocks, batches
        self.non_block_weights, self.device = non_block_weights, device
        # Per block list: its recorded arguments, or None if the model's forward must run up to each of its blocks.
        self._arguments: dict[str, RecordedArguments | None] = {}
        # Per block list: one store, whose inputs the outputs overwrite, or two that swap their roles at each block.
        self._stores: dict[str, list[ActivationStore]] = {}
        self._make_store = lambda number: ActivationStore(device, directory, f"{name}{number}-{len(self._stores)}")
        self._copies = 2 if keeps_inputs else 1

    def start_block(self, index: int) -> None:
        """Make block ``index``, which has been materialized, the current one."""
        block = self.blocks[index]
        if block.list_name in self._stores:
            self._stores[block.list_name].reverse()
            return
        self._stores[block.list_name] = [self._make_store(number) for number in range(self._copies)]
        with self.non_block_weights.on_demand():
            self._arguments[block.list_name] = self._record_arguments(index)

    def block_inputs(self, index: int) -> Iterator[Inputs]:
        """Yield the ``(args, kwargs)`` of block ``index``, batch by batch, on the device of the current block."""
        if self._arguments[self.blocks[index].list_name] is not None:
            for number in range(len(self.batches)):
                yield self.batch_inputs(index, number, self.device)
            return
        with self.non_block_weights.on_demand():
            for number in range(len(self.batches)):
                yield self.batch_inputs(index, number, self.device)

    def batch_inputs(self, index: int, number: int, device: torch.device) -> Inputs:
        """Return the ``(args, kwargs)`` of block ``index`` for one batch."""
        block = self.blocks[index]
        arguments = self._arguments[block.list_name]
        if arguments is not None:
            hidden = self._stores[block.list_name][0].get(number, device)
            return arguments.block_inputs(self._position(index), number, hidden, device)
        args, kwargs = self._capture_inputs(index, number)
        return to_device(args, device), to_device(kwargs, device)

    def put_output(self, index: int, number: int, output: Any) -> None:
        """Store the output of block ``index`` for a batch.

        Raises ``ModelError`` if its structure differs from that of the first block of its list.
        """
        block = self.blocks[index]
        arguments, store = self._arguments[block.list_name], self._stores[block.list_name][-1]
        if arguments is None:
            store.put(number, output)
            return
        hidden = arguments.signature.extract_hidden(output)
        if hidden is None:
            raise ModelError(
                f"the output of {block.name} has another structure than that of the blocks before it: use driver: "
                "blockwise"
            )
        store.put(number, hidden)

    def output(self, index: int, number: int) -> Any:
        """Return the output of block ``index``, the latest of its list, for a batch, on the CPU."""
        return self._output_of(self.blocks[index].list_name, number, -1)

    def forward(self, number: int) -> Any:
        """Return the model's output for a batch, once every block is complete: only non-block modules run."""
        with replace_forwards(self._stubs(self.blocks, number)):
            return self.model(**self.batches[number])

    def close(self) -> None:
        """Remove the offloaded files."""
        for stores in self._stores.values():
            for store in stores:
                store.clear()

    def _stubs(self, blocks: Sequence[topology.Block], number: int) -> dict[nn.Module, Callable[..., Any]]:
        def stub(list_name: str) -> Callable[..., Any]:
            return lambda *args, **kwargs: self._output_of(list_name, number, -1)

        return {block.module: stub(block.list_name) for block in blocks}

    def _position(self, index: int) -> int:
        list_name = self.blocks[index].list_name
        return sum(block.list_name == list_name for block in self.blocks[:index])

    def _output_of(self, list_name: str, number: int, which: int) -> Any:
        kept = self._stores[list_name][which].get(number, CPU)
        arguments = self._arguments[list_name]
        return kept if arguments is None else arguments.signature.make_output(kept)

    def _capture_inputs(self, index: int, number: int) -> Inputs:
        # A completed block list has its outputs in the last store; the current one has its inputs in the first.
        current = self.blocks[index].list_name
        return capture_block_inputs(
            self.model,
            self.blocks,
            index,
            self.batches[number],
            lambda list_name: self._output_of(list_name, number, 0 if list_name == current else -1),
        )

    def _record_arguments(self, index: int) -> RecordedArguments | None:
        """Record how the blocks of the list that starts at ``index`` are called, and store their first hidden states.

        Returns None if the arguments of a block depend on what blocks compute.
        """
        block = self.blocks[index]
        block_list = [other for other in self.blocks if other.list_name == block.list_name]
        if block_list != list(self.blocks[index : index + len(block_list)]) or not self.batches:
            return None
        args, kwargs = self._capture_inputs(index, 0)
        inputs = to_device(args, self.device), to_device(kwargs, self.device)
        output = run_block(self.model, block.module, *inputs, self.batches[0])
        signature = infer_signature((args, kwargs), output)
        if signature is None:
            return None
        arguments = RecordedArguments(signature)
        for number, batch in enumerate(self.batches):
            recorded = record_calls(self.model, block_list, batch, signature, self._stubs(self.blocks[:index], number))
            if recorded is None:
                return None
            hidden, calls, tensors = recorded
            self._stores[block.list_name][0].put(number, hidden)
            arguments.add(number, calls, tensors)
        return arguments


class ReferenceOutputs(Sequence[Example]):
    """Inputs and outputs of a block in the unmodified model, batch by batch; read from the cache on access."""

    def __init__(self, cache: ActivationCache, index: int) -> None:
        self.cache, self.block = cache, index
        self.rows = BatchRows(cache.model)

    def __len__(self) -> int:
        return len(self.cache.batches)

    def __getitem__(self, number: Any) -> Any:
        if isinstance(number, slice):
            return [self[each] for each in range(*number.indices(len(self)))]
        if not -len(self) <= number < len(self):
            raise IndexError(number)
        number %= len(self)
        with self.cache.non_block_weights.on_demand():
            args, kwargs = self.cache.batch_inputs(self.block, number, CPU)
        output = self.cache.output(self.block, number)
        block = self.cache.blocks[self.block].module
        return Example(args, kwargs, output, self.rows.output_mask(self.cache.batches[number], block, output))
