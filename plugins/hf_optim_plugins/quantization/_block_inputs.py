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

    Args:
        block: the module.
        teacher: what the block of the original model read and made, batch by batch (``Scope.teacher``).
    """

    def __init__(self, block: nn.Module, teacher: Sequence[Any]) -> None:
        self.block, self.teacher = block, teacher
        self.calls: list[tuple[Any, Any]] = []

    def __enter__(self) -> BlockInputs:
        # After the forward: a driver that only looks for the arguments of the block stops it before.
        self._handle = self.block.register_forward_hook(self._keep, with_kwargs=True)
        return self

    def __exit__(self, *error: object) -> None:
        self._handle.remove()

    def _keep(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        self.calls.append(_to((args, kwargs), self._home()))

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
    return pytree.tree_map(lambda leaf: leaf.detach().to(device) if isinstance(leaf, torch.Tensor) else leaf, tree)
