"""What the calibration drivers have in common: running a step's generator, and reaching into a forward."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from .errors import ModelError, NumericalError
from .run import Run
from .scope import Scope
from .techniques import Technique
from .toolkit import topology

Batch = dict[str, torch.Tensor]


class Reached(Exception):
    """Ends a forward at the block in work, and carries that block's arguments."""

    def __init__(self, args: Any, kwargs: Any) -> None:
        super().__init__()
        self.args_, self.kwargs = args, kwargs


def reach(
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
        raise Reached(args, kwargs)

    forwards = {block.module: stub(block.stack) for block in blocks[:index]}
    forwards[blocks[index].module] = stop
    with replaced(forwards):
        try:
            model(**batch)
        except Reached as reached:
            return reached.args_, reached.kwargs
    raise ModelError(f"{blocks[index].name} did not run; calibrate with driver: whole_model")


def drive(run: Run, step: Technique, scope: Scope, feed: Callable[[Technique], None]) -> None:
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


def batches_for(run: Run, step: Technique) -> Sequence[Batch]:
    return run.data.batches if run.data is not None and step.needs_data() else ()


def any_needs_data(steps: Sequence[Technique]) -> bool:
    return any(step.needs_data() for step in steps)


def named_exactly(step: Technique, scope: Scope) -> tuple[str, ...]:
    """The targets of a step that are exact names of linears in the scope."""
    return tuple(target for target in getattr(step, "targets", ()) if target in scope.linears)


def refuse_idle(run: Run, step: Technique) -> None:
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
def replaced(forwards: dict[nn.Module, Callable[..., Any]]) -> Iterator[None]:
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
