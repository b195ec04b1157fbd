"""The inputs of a block in a calibration pass, beside the outputs of the original one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from hf_optim import ModelError


class BlockInputs:
    """Keep the arguments of each call of a block for the length of a ``with`` block, on the device of its teacher's.

    The block is not computed meanwhile: nothing needs what it would make of its inputs, so it returns what its teacher
    made of that batch.

    Args:
        block: the module.
        teacher: what the block of the original model read and made, batch by batch (``Scope.teacher``).
    """

    def __init__(self, block: nn.Module, teacher: Sequence[Any]) -> None:
        self.block, self.teacher = block, teacher
        self.calls: list[tuple[Any, Any]] = []

    def __enter__(self) -> BlockInputs:
        # On the instance: a driver that only looks for the arguments of a block replaces its forward the same way.
        self._former = self.block.__dict__.get("forward")
        self._forward = self.block.forward
        self.block.forward = self._keep
        return self

    def __exit__(self, *error: object) -> None:
        del self.block.forward
        if self._former is not None:
            self.block.forward = self._former

    def _keep(self, *args: Any, **kwargs: Any) -> Any:
        self.calls.append(_to((args, kwargs), self._home()))
        number = len(self.calls) - 1
        return self.teacher[number].output if number < len(self.teacher) else self._forward(*args, **kwargs)

    def _home(self) -> torch.device:
        output = self.teacher[0].output if self.teacher else torch.empty(0)
        return (output[0] if isinstance(output, (tuple, list)) else output).device

    def examples(self, label: str, name: str) -> list[Any]:
        """Return the teacher's examples with these inputs. Raises ``ModelError`` if the calls are not its batches."""
        if len(self.calls) != len(self.teacher):
            raise ModelError(
                f"{label}: {name} was called {len(self.calls)} times for {len(self.teacher)} calibration batches, so "
                'its outputs cannot be matched with those of the original block; set inputs: "dense"'
            )
        pairs = zip(self.teacher, self.calls, strict=True)
        return [type(each)(args, kwargs, each.output, each.rows) for each, (args, kwargs) in pairs]


def _to(tree: Any, device: torch.device) -> Any:
    def moved(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        if not (leaf.is_cuda and device.type == "cpu"):
            return leaf.detach().to(device)
        # They go back to the GPU in every step: from pinned memory at the full speed of the bus.
        return torch.empty(leaf.shape, dtype=leaf.dtype, pin_memory=True).copy_(leaf.detach())

    return pytree.tree_map(moved, tree)
