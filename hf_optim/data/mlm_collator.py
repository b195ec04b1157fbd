"""Masked language modelling whose masks do not depend on the batches before: a resumed training finds the same."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from transformers import DataCollatorForLanguageModeling, TrainerCallback


class MlmCollator(DataCollatorForLanguageModeling):
    """The stock collator; once ``epoch`` is set, the masks of a batch are a function of seed, epoch and tokens.

    The stock generator goes on from batch to batch. A resumed training skips the batches that are behind it, and would
    find that generator at its beginning.

    Attributes:
        epoch: set by ``MaskingEpochCallback``; None leaves the masks to the stock generator.
    """

    epoch: int | None = None

    def torch_call(self, examples: list[Any]) -> dict[str, Any]:
        if self.epoch is not None:
            digest = hashlib.sha256(f"{self.seed} {self.epoch}".encode())
            for row in examples:
                digest.update(torch.as_tensor(row["input_ids"]).numpy().tobytes())
            self.generator = torch.Generator().manual_seed(int.from_bytes(digest.digest()[:7], "big"))
        return super().torch_call(examples)


class MaskingEpochCallback(TrainerCallback):
    """Tells a ``MlmCollator`` the epoch, before its first batch is made."""

    def __init__(self, collator: MlmCollator) -> None:
        self.collator = collator

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.collator.epoch = int(state.epoch or 0)
