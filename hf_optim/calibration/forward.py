"""What the calibration drivers have in common: running a step's generator, and reaching into a forward."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from ..errors import ModelError
from ..toolkit import topology

Batch = dict[str, torch.Tensor]


class BlockInputsCaptured(Exception):
    """Ends a forward at the block in work, and carries that block's arguments."""

    def __init__(self, args: Any, kwargs: Any) -> None:
        super().__init__()
        self.args_, self.kwargs = args, kwargs


def capture_block_inputs(
    model: nn.Module,
    blocks: Sequence[topology.Block],
    index: int,
    batch: Batch,
    output_of: Callable[[str], Any],
) -> tuple[Any, Any]:
    """The arguments of block ``index`` for one batch, by the model's own forward up to that block.

    The blocks before it are replaced by stubs; ``output_of(stack)`` is what the last of them in that stack returned.
    """

    def stub(stack: str) -> Callable[..., Any]:
        return lambda *args, **kwargs: output_of(stack)

    def stop(*args: Any, **kwargs: Any) -> Any:
        raise BlockInputsCaptured(args, kwargs)

    forwards = {block.module: stub(block.stack) for block in blocks[:index]}
    forwards[blocks[index].module] = stop
    with replace_forwards(forwards):
        try:
            model(**batch)
        except BlockInputsCaptured as reached:
            return reached.args_, reached.kwargs
    raise ModelError(f"{blocks[index].name} did not run; calibrate with driver: whole_model")


@contextmanager
def replace_forwards(forwards: dict[nn.Module, Callable[..., Any]]) -> Iterator[None]:
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
def without_cache(model: nn.Module) -> Iterator[None]:
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


def to_device(tree: Any, device: torch.device) -> Any:
    return pytree.tree_map(lambda leaf: leaf.to(device) if isinstance(leaf, torch.Tensor) else leaf, tree)


def device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
