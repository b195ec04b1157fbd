"""The threshold of early exits, calibrated by Learn-then-Test on prompts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ...errors import DataError, ModelError, RecipeError
from ...trust.bounds import shown
from .distances import DISTANCES
from .door import custom, described, weights_of
from .learn_then_test import Tested, fixed_sequence, least_examples, nearest_bound
from .settings import PROCESSORS, Certificate, EarlyExit, certified_settings, require_number
from .stack import Stack

GUARANTEES = ("consistency", "risk")
# Prompts that are generated together.
ROWS = 32


@dataclass(frozen=True)
class Bound:
    """What is to be guaranteed.

    Attributes:
        delta: the most that the expected loss may be.
        epsilon: the probability that the result is wrong.
        guarantee: ``"consistency"`` with the full model's output, or ``"risk"`` against references.
        distance: ``"rouge_l"`` or ``"edit_distance"``.
        candidates: thresholds to test, from the highest down.

    Raises ``RecipeError`` for other values.
    """

    delta: float
    epsilon: float
    guarantee: str = "consistency"
    distance: str = "rouge_l"
    candidates: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        for name in ("delta", "epsilon"):
            value = getattr(self, name)
            require_number(name, value, 0.0, 1.0)
            if not 0 < value < 1:
                raise RecipeError(f"{name} must be above 0 and below 1, not {value:g}")
        for name, known in (("guarantee", GUARANTEES), ("distance", tuple(DISTANCES))):
            if getattr(self, name) not in known:
                raise RecipeError(f"{name} must be one of {', '.join(known)}, not {shown(getattr(self, name))}")
        for each in self.candidates:
            require_number("each of candidates", each, -1.0, 1.0)
        if not self.candidates or any(a <= b for a, b in pairwise(self.candidates)):
            raise RecipeError("candidates must be thresholds from 1 to -1, falling, each once, and at least one")


@torch.no_grad()
def calibrate(
    model: Any, prompts: Sequence[Tensor], bound: Bound, settings: EarlyExit, references: Sequence[Tensor] = ()
) -> EarlyExit:
    """Return settings with the lowest threshold that the bound is proven for, and its certificate.

    Args:
        model: the decoder, with the weights that it will have.
        prompts: tokens ``[n]`` of each prompt, all equally long; independent draws from what the guarantee is for. One
            that occurs again, with the same reference, is left out: it is not a further draw.
        bound: what is to be guaranteed.
        settings: all but the threshold.
        references: tokens of each prompt's continuation, for ``"risk"``.

    Raises ``ModelError`` for a bound that cannot be proven, with the nearest that can be, and ``DataError`` for
    prompts that cannot be used.
    """
    _require(prompts, bound, references)
    prompts, references = distinct(prompts, references)
    _require_enough(len(prompts), bound)
    settings = replace(settings, layers=Stack(model, settings).layers, certificate=None)
    full = outputs(model, prompts, None, settings.length)
    distance = DISTANCES[bound.distance]
    before = [distance(found, list(each)) for found, each in zip(full, _lists(references), strict=False)]

    def losses() -> Iterator[tuple[float, list[float]]]:
        for threshold in bound.candidates:
            found = outputs(model, prompts, replace(settings, threshold=threshold), settings.length)
            yield threshold, loss_of_each(found, full, _lists(references), before, bound)

    chosen, tested = fixed_sequence(losses(), bound.delta, bound.epsilon)
    if chosen is None:
        raise ModelError(_why_unproven(tested[0], len(prompts), bound))
    settings = replace(settings, threshold=chosen.threshold)
    certificate = Certificate(
        bound.guarantee, bound.distance, bound.delta, bound.epsilon, len(prompts), chosen.mean, chosen.p_value,
        tuple((each.threshold, each.mean, each.p_value) for each in tested),
        certified_settings(settings) | {PROCESSORS: _processors(model, prompts[0], settings.length)},
        weights_of(model), len(prompts[0]),
    )  # fmt: skip
    return replace(settings, certificate=certificate)


def loss_of_each(
    found: Sequence[list[int]], full: Sequence[list[int]], references: Sequence[list[int]], before: Sequence[float],
    bound: Bound,
) -> list[float]:  # fmt: skip
    """Return the loss of each early output: its distance from the full one, or the distance that it adds."""
    distance = DISTANCES[bound.distance]
    if bound.guarantee == "consistency":
        return [distance(a, b) for a, b in zip(found, full, strict=True)]
    return [max(0.0, distance(a, b) - c) for a, b, c in zip(found, references, before, strict=True)]


@torch.no_grad()
def outputs(model: Any, prompts: Sequence[Tensor], settings: EarlyExit | None, length: int) -> list[list[int]]:
    """Return greedy continuations of prompts, up to their end, without padding; at full depth without settings."""
    found: list[list[int]] = []
    method = {} if settings is None else {"custom_generate": custom(settings)}
    for start in range(0, len(prompts), ROWS):
        ids = torch.stack(list(prompts[start : start + ROWS])).to(model.device)
        tokens = model.generate(input_ids=ids, **_greedy(model, ids, length), **method)
        found += [_until(row, _ends(model)) for row in tokens[:, ids.shape[1] :].tolist()]
    return found


def _processors(model: Any, prompt: Tensor, length: int) -> list[str]:
    """Return the processors of logits of a call, which the model's generation configuration makes."""
    found: list[str] = []

    def note(model: Any, input_ids: Tensor, logits_processor: Any, *args: Any, **kwargs: Any) -> Tensor:
        found.extend(described(logits_processor))
        return input_ids

    ids = prompt[None].to(model.device)
    model.generate(input_ids=ids, **_greedy(model, ids, length), custom_generate=note)
    return found


def _greedy(model: Any, ids: Tensor, length: int) -> dict[str, Any]:
    """Return the arguments of ``generate`` for greedy tokens of whole prompts, whatever the model's configuration."""
    pad, ends = model.generation_config.pad_token_id, _ends(model)
    return {
        "attention_mask": torch.ones_like(ids), "max_new_tokens": length, "do_sample": False, "num_beams": 1,
        "num_return_sequences": 1, "return_dict_in_generate": False,
        "pad_token_id": pad if pad is not None else next(iter(sorted(ends)), 0),
    }  # fmt: skip


def _ends(model: Any) -> set[int]:
    ends = model.generation_config.eos_token_id
    return set() if ends is None else {ends} if isinstance(ends, int) else set(ends)


def _until(row: list[int], ends: set[int]) -> list[int]:
    place = next((place for place, token in enumerate(row) if token in ends), len(row))
    return row[: place + 1]


def _lists(references: Sequence[Tensor]) -> list[list[int]]:
    return [each.tolist() for each in references]


def _require(prompts: Sequence[Tensor], bound: Bound, references: Sequence[Tensor]) -> None:
    if not prompts:
        raise DataError("there are no prompts to calibrate on")
    if len({len(each) for each in prompts}) > 1 or not len(prompts[0]):
        raise DataError("the prompts to calibrate on must be equally long, with at least one token")
    if bound.guarantee == "risk" and len(references) != len(prompts):
        raise DataError("a bound on the risk needs the reference of each prompt")


def distinct(prompts: Sequence[Tensor], references: Sequence[Tensor] = ()) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """Return prompts and references without those that occurred before."""
    keys = [tuple(map(int, each)) for each in prompts]
    if references:
        keys = [(*key, -1, *map(int, each)) for key, each in zip(keys, references, strict=True)]
    first = sorted({key: place for place, key in reversed(list(enumerate(keys)))}.values())
    return [prompts[place] for place in first], [references[place] for place in first] if references else ()


def _require_enough(count: int, bound: Bound) -> None:
    least = least_examples(bound.delta, bound.epsilon)
    if count < least:
        nearest = nearest_bound(0.0, count, bound.epsilon)
        raise ModelError(
            f"{count} different prompts prove no bound of {bound.delta:g} at epsilon {bound.epsilon:g}, even without "
            f"any loss: that takes {least}"
            + ("" if nearest is None else f"; the lowest bound that {count} can prove is {nearest:.3g}")
        )


def _why_unproven(first: Tested, count: int, bound: Bound) -> str:
    nearest = nearest_bound(first.mean, count, bound.epsilon)
    could = (
        "no bound below 1 can be proven"
        if nearest is None
        else f"the nearest bound that can be proven is {nearest:.3g}"
    )
    return (
        f"the bound of {bound.delta:g} on {bound.guarantee} ({bound.distance}) cannot be proven at epsilon "
        f"{bound.epsilon:g}: at the highest threshold, {first.threshold:g}, the mean loss of {count} prompts is "
        f"{first.mean:.3g} (p-value {first.p_value:.2g}); {could}. Raise delta or the threshold, train the exits, or "
        "use lossless decoding"
    )
