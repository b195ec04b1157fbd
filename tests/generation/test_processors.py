"""Processors of logits on the device: the scores of transformers at every length."""

from __future__ import annotations

import pytest
import torch
from transformers.generation import logits_process as stock

from hf_optim.generation.sampling import on_device, signature, unsupported_processor

ENDS = torch.tensor([3, 5])
PROCESSORS = {
    "min-length": lambda: stock.MinLengthLogitsProcessor(9, ENDS),
    "min-new": lambda: stock.MinNewTokensLengthLogitsProcessor(4, 3, ENDS),
    "penalty": lambda: stock.RepetitionPenaltyLogitsProcessor(1.3),
    "penalty-without-prompt": lambda: stock.RepetitionPenaltyLogitsProcessor(1.3, prompt_ignore_length=4),
    "first": lambda: stock.ForcedBOSTokenLogitsProcessor(7),
    "min-length-unknown": lambda: stock.MinLengthLogitsProcessor(9, torch.tensor([3, 500])),
    "not-first-unknown": lambda: stock.SuppressTokensAtBeginLogitsProcessor([2, 500], 4),
    "last": lambda: stock.ForcedEOSTokenLogitsProcessor(10, ENDS),
    "not-first": lambda: stock.SuppressTokensAtBeginLogitsProcessor([2, 6], 4),
    **{f"{size}-grams": lambda size=size: stock.NoRepeatNGramLogitsProcessor(size) for size in (1, 2, 3)},
}


@pytest.mark.parametrize("name", PROCESSORS)
def test_scores_are_those_of_transformers(name):
    torch.manual_seed(0)
    theirs = PROCESSORS[name]()
    assert unsupported_processor([theirs]) is None
    buffer = torch.randint(0, 4, (3, 24))  # few tokens, so that n-grams repeat; what is behind ``count`` does not count
    count = torch.zeros(1, dtype=torch.int64)
    (ours,) = on_device([theirs], count, 3)
    changed = 0
    for length in range(1, 20):
        count.fill_(length)
        scores = torch.randn(3, 30)
        expected = theirs(buffer[:, :length], scores.clone())
        assert torch.equal(ours(buffer, scores), expected), length
        changed += not torch.equal(expected, scores)
    assert changed


def test_what_changes_between_calls_is_taken_from_the_processor_of_the_call():
    count = torch.tensor([11])
    first, second = (stock.ForcedEOSTokenLogitsProcessor(length, ENDS) for length in (20, 12))
    assert signature([first], False) == signature([second], False)
    (ours,) = on_device([first], count, 1)
    scores = torch.zeros(1, 30)
    assert torch.equal(ours(torch.zeros(1, 24, dtype=torch.int64), scores), scores)
    ours.set(second)
    assert ours(torch.zeros(1, 24, dtype=torch.int64), scores).isneginf().sum() == 28


def test_a_token_that_the_head_does_not_have():
    """An embedding may be larger than the head: such a token cannot be generated, and nothing else is kept out."""
    count = torch.tensor([6])
    tokens = torch.tensor([[1, 40, 1, 40, 2, 1]])
    for theirs in (stock.NoRepeatNGramLogitsProcessor(2), stock.RepetitionPenaltyLogitsProcessor(1.5)):
        (ours,) = on_device([theirs], count, 1)
        found = ours(tokens, torch.ones(1, 30))
        assert (found == 1.0).sum() == (30 if "NGram" in type(theirs).__name__ else 28)
