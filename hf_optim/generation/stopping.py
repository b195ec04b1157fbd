"""Where sequences end: read on the host some steps after the device has computed them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from transformers.generation import stopping_criteria as stock

READ_LATE = (stock.MaxLengthCriteria, stock.EosTokenCriteria, stock.MaxTimeCriteria, stock.StopStringCriteria)


def unsupported_criterion(criteria: Iterable[Any]) -> str | None:
    """Return why a list of stopping criteria cannot be read some steps late; None if it can be."""
    for each in criteria:
        if type(each) not in READ_LATE:
            return f"the stopping criterion {type(each).__name__} may look at Python state"
    return None


class Sequences:
    """The tokens of a batch as they arrive on the host, and where each row ends.

    Args:
        prompt: tokens ``[rows, P]``, int64, on the CPU.
        criteria: transformers' stopping criteria, of the classes in ``READ_LATE``.
        pad: the token after the end of a row; None if rows have no end (then they continue until all rows have met a
            criterion, as in transformers).
        new_tokens: the most tokens to generate.
    """

    def __init__(self, prompt: Tensor, criteria: Iterable[Any], pad: int | None, new_tokens: int) -> None:
        self.prompt = prompt
        self.pad = pad
        self.tokens = torch.zeros((prompt.shape[0], new_tokens), dtype=prompt.dtype)
        self.count = 0
        self.ended = torch.zeros(prompt.shape[0], dtype=torch.bool)
        criteria = list(criteria)
        self._ends = [each.eos_token_id.cpu() for each in criteria if isinstance(each, stock.EosTokenCriteria)]
        self._strings = [each for each in criteria if isinstance(each, stock.StopStringCriteria)]
        self._times = [each for each in criteria if isinstance(each, stock.MaxTimeCriteria)]

    @property
    def complete(self) -> bool:
        """True if no further token is wanted."""
        return self.count == self.tokens.shape[1] or bool(self.ended.all())

    def add(self, tokens: Tensor) -> Tensor:
        """Add tokens ``[rows, n]`` of the next ``n`` steps; return those that belong to the result, ``[rows, m]``.

        ``m`` is less than ``n`` if all rows end before the last of these steps.
        """
        first = self.count
        for step in tokens.unbind(dim=1):
            if self.complete:
                break
            if self.pad is not None:
                step = step.masked_fill(self.ended, self.pad)
            self.tokens[:, self.count] = step
            self.count += 1
            for ends in self._ends:
                self.ended |= torch.isin(step, ends)
            for criterion in self._strings:
                self.ended |= criterion(self.sequences(), None)
        # The clock is read once a window: the device is some steps ahead of it.
        for clock in self._times:
            self.ended |= clock(self.prompt, None)
        return self.tokens[:, first : self.count]

    def sequences(self) -> Tensor:
        """Return prompt and tokens, int64 ``[rows, P + count]``."""
        return torch.cat([self.prompt, self.tokens[:, : self.count]], dim=1)
