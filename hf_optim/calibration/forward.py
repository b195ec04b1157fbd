"""Building blocks of the calibration drivers: replace the forwards of blocks, and capture the inputs of one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from ..errors import DataError, ModelError, OptimError
from ..toolkit import topology
from ..trust.bounds import first_line

Batch = dict[str, torch.Tensor]


class BlockInputsCaptured(Exception):
    """Stops a forward at the current block, and carries the arguments of that block.

    An exception is the only way to leave the model's own forward early. It is raised in place of the block's forward
    and caught in this package; model code between the two must not swallow it.
    """

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super().__init__()
        self.args_, self.kwargs = args, kwargs


def capture_block_inputs(
    model: nn.Module,
    blocks: Sequence[topology.Block],
    index: int,
    batch: Batch,
    output_of: Callable[[str], Any],
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the ``(args, kwargs)`` that the model's own forward passes to block ``index`` for one batch.

    The blocks before it are replaced by stubs, and the block itself by one that raises ``BlockInputsCaptured``, which
    stops the forward there. ``output_of(list_name)`` returns the stored output of the latest completed block in the
    block list of that name.

    Raises ``ModelError`` if the forward does not call the block.
    """

    def stub(list_name: str) -> Callable[..., Any]:
        return lambda *args, **kwargs: output_of(list_name)

    def stop(*args: Any, **kwargs: Any) -> Any:
        raise BlockInputsCaptured(args, kwargs)

    forwards = {block.module: stub(block.list_name) for block in blocks[:index]}
    forwards[blocks[index].module] = stop
    with replace_forwards(forwards):
        try:
            with forward_errors(model, batch):
                model(**batch)
        except BlockInputsCaptured as captured:
            return captured.args_, captured.kwargs
    raise ModelError(f"{blocks[index].name} did not run; calibrate with driver: whole_model")


@contextmanager
def forward_errors(model: nn.Module, batch: Batch) -> Iterator[None]:
    """Raise ``DataError`` in place of the errors of a model for a batch that it cannot run on."""
    try:
        yield
    except (OptimError, BlockInputsCaptured, MemoryError, torch.OutOfMemoryError):
        raise
    except (RuntimeError, TypeError, ValueError, IndexError, KeyError, AttributeError, ZeroDivisionError) as error:
        shapes = ", ".join(f"{key} {list(getattr(value, 'shape', ()))}" for key, value in batch.items())
        raise DataError(
            f"{type(model).__name__} cannot run on a batch of {shapes}: {first_line(error, typed=True)}"
        ) from error


def run_block(model: nn.Module, block: nn.Module, args: Any, kwargs: Mapping[str, Any], batch: Batch) -> Any:
    """Return the output of one block of a model for ``batch``. Raises ``DataError`` as ``forward_errors`` does."""
    with forward_errors(model, batch):
        return block(*args, **kwargs)


@contextmanager
def replace_forwards(forwards: dict[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Replace the forwards of these modules, on the instances only; restored even if the body raises."""
    former: dict[nn.Module, Any] = {module: module.__dict__.get("forward") for module in forwards}
    try:
        for module, forward in forwards.items():
            module.forward = forward  # type: ignore[method-assign]
        yield
    finally:
        for module, own in former.items():
            del module.forward
            if own is not None:
                module.forward = own


@contextmanager
def without_cache(model: nn.Module) -> Iterator[None]:
    """Disable the KV cache during calibration: nothing is decoded, and a cache would keep every activation alive.

    A part of a model may have a configuration of its own (the decoder of T5); a block that is called again with the
    cache of its first call would attend to every token twice.
    """
    configs: dict[int, Any] = {}
    for module in model.modules():
        config = getattr(module, "config", None)
        for each in (config, getattr(config, "text_config", None), getattr(config, "decoder", None)):
            if getattr(each, "use_cache", None) is True:
                configs[id(each)] = each
    for config in configs.values():
        config.use_cache = False
    try:
        yield
    finally:
        for config in configs.values():
            config.use_cache = True


def to_device(tree: Any, device: torch.device) -> Any:
    """Return a copy of a pytree with its tensors on ``device``."""
    return pytree.tree_map(lambda leaf: leaf.to(device) if isinstance(leaf, torch.Tensor) else leaf, tree)
