"""Masked language modelling with masks that a resumed training reproduces."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from transformers import DataCollatorForLanguageModeling, TrainerCallback

from ..toolkit import compat


class MlmCollator(DataCollatorForLanguageModeling):
    """The stock MLM collator, except that the masks of a batch depend only on seed, epoch and tokens.

    The stock collator draws from one generator, batch after batch. A resumed training skips the batches it has already
    seen, so that generator would start again from its initial state.

    Attributes:
        epoch: set by ``MaskingEpochCallback``; None uses the stock generator.
    """

    epoch: int | None = None

    def torch_call(self, examples: list[Any]) -> dict[str, Any]:
        if self.epoch is not None:
            digest = hashlib.sha256(f"{self.seed} {self.epoch}".encode())
            for example in examples:
                digest.update(torch.as_tensor(example["input_ids"]).numpy().tobytes())
            compat.set_generator(self, torch.Generator().manual_seed(int.from_bytes(digest.digest()[:7], "big")))
        return super().torch_call(examples)


class MaskingEpochCallback(TrainerCallback):
    """Sets ``MlmCollator.epoch`` before the first batch of each epoch."""

    def __init__(self, collator: MlmCollator) -> None:
        self.collator = collator

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.collator.epoch = int(state.epoch or 0)
