"""Follow the rows of a batch through a model, so that observers can leave out padding (``topology.valid_rows``).

Most rows are found by the part of the model and by their shape. Two kinds need hooks: what a decoder reads from the
encoder, which is recognized as the same tensor, and tokens that a router gathers for the experts of a module list,
which are recognized by their content.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..topology import valid_rows
from ..topology.valid_rows import ValidRows
from .input_masks import stream_masks
from .streams import class_of, encoder_and_decoder, parameter_names, streams

ENCODER_STATES = ("encoder_hidden_states", "key_value_states")


class BatchRows:
    """The rows of each batch that count in the statistics of a model's modules.

    Args:
        model: the model; it may be changed between two batches.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    @contextlib.contextmanager
    def of(self, batch: Mapping[str, Any], labels: Tensor | None = None) -> Iterator[ValidRows]:
        """Make the rows of ``batch`` the current ones for the length of a ``with`` block around a forward.

        Args:
            batch: the inputs of the model, with their masks.
            labels: the labels that belong to the batch, if it has any.
        """
        rows = self.rows(batch, labels)
        with contextlib.ExitStack() as stack:
            if rows.has_padding:
                for handle in (*self._watch_encoder(rows), *self._watch_experts(rows)):
                    stack.callback(handle.remove)
            yield stack.enter_context(valid_rows.during(rows))

    def rows(self, batch: Mapping[str, Any], labels: Tensor | None = None) -> ValidRows:
        """Return the rows of a batch, for tensors that are recognized by module and shape alone."""
        masks = stream_masks(self.model, batch)
        return ValidRows(masks, lambda module: streams(self.model).get(id(module), "other"), labels)

    def output_mask(self, batch: Mapping[str, Any], module: nn.Module, output: Any) -> Tensor | None:
        """Return which rows of a module's first output count: bool, in its shape without features; None if all do."""
        first = output if isinstance(output, Tensor) else output[0]
        mask = self.rows(batch).mask_of(module, first)
        return None if mask is None or bool(mask.all()) else mask

    # -- what a decoder reads from the encoder --------------------------------------------------------------------
    def _watch_encoder(self, rows: ValidRows) -> list[Any]:
        pair = encoder_and_decoder(self.model)
        if pair is None:
            return []
        encoder, decoder = pair
        handles = [encoder.register_forward_hook(_keep_output(rows))]
        for module in (decoder or self.model).modules():
            if names := [name for name in ENCODER_STATES if name in parameter_names(class_of(module))]:
                handles.append(module.register_forward_pre_hook(_keep_argument(rows, names[0]), with_kwargs=True))
        return handles

    # -- what a router gathers for an expert ----------------------------------------------------------------------
    def _watch_experts(self, rows: ValidRows) -> list[Any]:
        handles = []
        for module in self.model.modules():
            for child_name, container in module.named_children():
                if "expert" not in child_name or not isinstance(container, (nn.ModuleList, nn.ModuleDict)):
                    continue
                tokens = _Tokens(rows)
                # The tokens are what the container reads, or the module around it if the container has no forward.
                reads = module if type(container).forward is nn.Module.forward else container
                handles.append(reads.register_forward_pre_hook(tokens.keep, with_kwargs=True))
                handles += [e.register_forward_pre_hook(tokens.match, with_kwargs=True) for e in container.children()]
        return handles


class _Tokens:
    """The tokens that a mixture of experts reads, to recognize them where an expert reads a part of them."""

    def __init__(self, rows: ValidRows) -> None:
        self.rows = rows
        self.known: Tensor | None = None
        self.real: Tensor | None = None

    def keep(self, module: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> None:
        tokens = _first_tensor(args, kwargs)
        self.known = self.real = None
        mask = None if tokens is None else self.rows.mask_of(module, tokens)
        if tokens is not None and mask is not None:
            self.known = hash_rows(tokens.reshape(-1, tokens.shape[-1]))
            self.real = self.known[mask.reshape(-1)]

    def match(self, expert: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> None:
        rows = _first_tensor(args, kwargs)
        mask = None
        if rows is not None and self.known is not None and self.real is not None and rows.dim() == 2:
            found = hash_rows(rows)
            # Tokens that were scaled on their way are not copies, and then all rows count.
            if bool(torch.isin(found, self.known).all()):
                mask = torch.isin(found, self.real)
        self.rows.gathered.update({id(module): mask for module in expert.modules()})


def hash_rows(rows: Tensor) -> Tensor:
    """Return int64 ``[n]``, a hash of the bits of each row ``[n, width]``; it does not depend on the other rows."""
    size = rows.element_size()
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[size]
    generator = torch.Generator().manual_seed(0)
    factors = torch.randint(-(2**62), 2**62, (rows.shape[-1],), generator=generator) * 2 + 1
    factors = factors.to(rows.device)
    parts = rows.detach().contiguous().view(integers).split(4096)
    return torch.cat([(part.long() * factors).sum(-1) for part in parts])


def _keep_output(rows: ValidRows) -> Any:
    def keep(module: nn.Module, args: Any, output: Any) -> None:
        first = output if isinstance(output, Tensor) else output[0]
        if isinstance(first, Tensor):
            rows.foreign[module] = first

    return keep


def _keep_argument(rows: ValidRows, name: str) -> Any:
    def keep(module: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> None:
        value = kwargs.get(name)
        if value is None:
            place = list(inspect.signature(type(module).forward).parameters).index(name) - 1
            value = args[place] if len(args) > place else None
        if isinstance(value, Tensor):
            rows.foreign[module] = value

    return keep


def _first_tensor(args: Any, kwargs: Mapping[str, Any]) -> Tensor | None:
    return next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
