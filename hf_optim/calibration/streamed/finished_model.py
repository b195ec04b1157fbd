"""A read-only view of the whole model, backed by its completed shards, for steps that read weights at the end."""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from ...errors import ModelError
from ...runs.run import Run
from .output import StreamedOutput


class _CompletedMasks(MutableMapping[str, Tensor]):
    """``run.masks`` of a completed run, read from the state files of the blocks one at a time."""

    def __init__(self, output: StreamedOutput, live: MutableMapping[str, Tensor]) -> None:
        self.output, self.live, self.stored = output, dict(live), output.mask_locations()

    def __getitem__(self, name: str) -> Tensor:
        return self.live[name] if name in self.live else self.output.read_mask(self.stored[name], name)

    def __setitem__(self, name: str, mask: Tensor) -> None:
        raise ModelError(f"the mask of {name} cannot change: its weights are already written; use driver: blockwise")

    def __delitem__(self, name: str) -> None:
        self.live.pop(name, None)
        self.stored.pop(name, None)

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys([*self.live, *self.stored]))

    def __len__(self) -> int:
        return len(set(self.live) | set(self.stored))


@contextmanager
def finished_weights(run: Run, output: StreamedOutput) -> Iterator[None]:
    """In the body, ``run.model.get_parameter`` returns the written weights, and ``run.masks`` has every mask.

    Both read from the completed files on access. A write into such a weight is lost. That is correct here, since
    ``finalize_model`` may only rewrite the same values at this point.
    """
    model: Any = run.model
    stock, live = model.get_parameter, run.masks

    def get_parameter(target: str) -> nn.Parameter:
        found = stock(target)
        if not found.is_meta:
            return found
        for number, name in enumerate(output.names):
            if target.startswith(f"{name}."):
                key = target.removeprefix(f"{name}.")
                return nn.Parameter(output.dense_tensors(number, [key])[key], requires_grad=False)
        return found

    model.get_parameter = get_parameter
    run.masks = _CompletedMasks(output, live)  # type: ignore[assignment]
    try:
        yield
    finally:
        del model.get_parameter
        run.masks = live
