"""The whole model seen through what is finished: for steps that look at weights and masks once more at the end."""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from ...errors import ModelError
from ...runs.run import Run
from .output import StreamedOutput


class _Masks(MutableMapping[str, Tensor]):
    """``run.masks`` of a finished run: read from beside the finished blocks, one at a time."""

    def __init__(self, output: StreamedOutput, live: MutableMapping[str, Tensor]) -> None:
        self.output, self.live, self.kept = output, dict(live), output.masks()

    def __getitem__(self, name: str) -> Tensor:
        return self.live[name] if name in self.live else self.output.mask(self.kept[name], name)

    def __setitem__(self, name: str, mask: Tensor) -> None:
        raise ModelError(f"the mask of {name} cannot change: its weights are written; use driver: blockwise")

    def __delitem__(self, name: str) -> None:
        self.live.pop(name, None)
        self.kept.pop(name, None)

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys([*self.live, *self.kept]))

    def __len__(self) -> int:
        return len(set(self.live) | set(self.kept))


@contextmanager
def finished_weights(run: Run, output: StreamedOutput) -> Iterator[None]:
    """In the body, ``run.model.get_parameter`` gives the finished weights, and ``run.masks`` has every mask.

    Both read what is asked for from the finished files. What is written into such a weight is lost, which is right for
    what ``finalize_model`` may do at this point: write again what is there.
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
                return nn.Parameter(output.dense(number, [key])[key], requires_grad=False)
        return found

    model.get_parameter = get_parameter
    run.masks = _Masks(output, live)  # type: ignore[assignment]
    try:
        yield
    finally:
        del model.get_parameter
        run.masks = live
