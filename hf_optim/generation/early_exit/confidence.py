"""How sure an exit is of its token: numbers of each row, before processors of logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ...errors import ModelError
from .settings import EarlyExit
from .stack import Stack


class Confidence:
    """The confidence of the exits of a stack.

    Args:
        settings: which.
        stack: with the heads.
        classifier: of ``"classifier"``: weights ``[exits, width]`` and biases ``[exits]``, float32.
    """

    def __init__(self, settings: EarlyExit, stack: Stack, classifier: tuple[Tensor, Tensor] | None) -> None:
        self.kind, self._stack = settings.confidence, stack
        self._classifier = classifier
        if self.kind == "classifier":
            if classifier is None:
                raise ModelError(
                    "the exits have no trained classifier: apply calm with confidence classifier, or load its "
                    "checkpoint from its folder"
                )
            if classifier[0].shape[0] != len(stack.layers):
                raise ModelError(
                    f"the classifier is for {classifier[0].shape[0]} exits, the settings have {len(stack.layers)}"
                )

    def of(self, layer: int, hidden: Tensor, before: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the confidence ``[rows]`` of the exit after a block, and logits ``[rows, V]`` where it reads them.

        Args:
            layer: index of the block.
            hidden, before: states after the block, and before it, ``[rows, width]``.
        """
        if self.kind == "state":
            return functional.cosine_similarity(hidden.float(), before.float(), dim=-1), None
        if self.kind == "classifier":
            assert self._classifier is not None
            index = self._stack.layers.index(layer)
            weight, bias = (each.to(hidden.device) for each in self._classifier)
            return torch.sigmoid(hidden.float() @ weight[index] + bias[index]), None
        logits = self._stack.logits(layer, hidden)
        return softmax_confidence(logits, self.kind), logits


def softmax_confidence(logits: Tensor, kind: str) -> Tensor:
    """Return the gap between the two largest probabilities of ``[..., V]``, or the largest."""
    if kind == "softmax_max":
        return logits.softmax(-1).amax(-1)
    top: Any = logits.softmax(-1).topk(2, dim=-1).values
    return top[..., 0] - top[..., 1]
