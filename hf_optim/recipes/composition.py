"""Composition of the steps of a recipe: check their contracts, and split them into stages. No model is loaded."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from ..errors import RecipeError
from .catalogue import catalogue
from .contract import Phase
from .technique import Technique
from .traits import Trait


@dataclass(frozen=True)
class Stage:
    """Steps that go through the lifecycle together: load, transform, calibrate, train, finalize.

    ``first`` is the place of the first of them in the recipe, from 0.
    """

    steps: tuple[Technique, ...]
    first: int = 0

    @property
    def trains(self) -> bool:
        """True if a step of the stage has no effect without training."""
        return any(step.spec.trains for step in self.steps)

    @property
    def calibrates(self) -> bool:
        """True if a step of the stage takes part in calibration."""
        return any(Phase.CALIBRATE in step.phases() for step in self.steps)

    @property
    def needs_data(self) -> bool:
        """True if a step of the stage needs calibration batches."""
        return any(Phase.CALIBRATE in step.phases() and step.needs_data() for step in self.steps)

    @property
    def label(self) -> str:
        """What errors call it: ``"step 1 (magnitude), step 2 (logit_kd)"``."""
        return ", ".join(step_label(number, step) for number, step in enumerate(self.steps, self.first))

    def __str__(self) -> str:
        return "[" + ", ".join(step.name for step in self.steps) + "]"


def split_stages(steps: Sequence[Technique]) -> list[Stage]:
    """Split a recipe into stages. A stage ends before a step whose phases come earlier than those already reached.

    The phases of a stage run in a fixed order (load, transform, calibrate, train). So a step that calibrates cannot
    join a stage whose earlier steps train, nor a step that transforms one whose earlier steps calibrate.
    """
    stages: list[list[Technique]] = []
    reached = Phase.LOAD
    for step in steps:
        phases = _ordering_phases(step)
        if not stages or min(phases) < reached:
            stages.append([])
            reached = Phase.LOAD
        stages[-1].append(step)
        reached = max(reached, *phases)
    firsts = itertools.accumulate(map(len, stages), initial=0)
    return [Stage(tuple(members), first) for members, first in zip(stages, firsts, strict=False)]


def _ordering_phases(step: Technique) -> frozenset[Phase]:
    # A step that takes part in training but does not need it (spec.trains is False) makes no training stage.
    phases = step.phases() - ({Phase.TRAIN} if not step.spec.trains else set())
    return frozenset(phases - {Phase.LOAD}) or frozenset({Phase.TRANSFORM})


def compose(steps: Sequence[Technique], traits: frozenset[Trait]) -> frozenset[Trait]:
    """Apply the contracts of the steps to a model with these traits; return the traits of the result.

    Raises ``RecipeError``, which names what to change, the step and the trait.
    """
    found, owed = _follow(steps, traits)
    for who, trait in owed:
        raise RecipeError(
            f"{who} must be followed by {trait.step or f'a step that adds {trait}'}: {_how_to_get(trait, 'after')}"
        )
    _check_load_steps(steps)
    return found


def _follow(
    steps: Sequence[Technique], start: frozenset[Trait], tries: bool = True
) -> tuple[frozenset[Trait], list[tuple[str, Trait]]]:
    """Return the traits after the steps, and what they still owe. With ``tries``, errors name an order that works."""
    owners: dict[str, str] = {}
    origins: dict[Trait, int] = {}
    owed: list[tuple[str, Trait]] = []
    traits = start
    for index, step in enumerate(steps):
        label = step_label(index, step)
        contract = step.contract()
        for other, reason in _preconditions(steps, index, traits, origins):
            raise RecipeError(f"{_remedy(steps, index, other, start) if tries else label}: {reason}")
        for slot in sorted(contract.owns):
            if slot in owners:
                raise RecipeError(f"keep only one of {label} and {owners[slot]}: both set {slot!r}")
            owners[slot] = label
        for other, reason in _fragile(step, label, traits, origins):
            raise RecipeError(f"{_remedy(steps, index, other, start) if tries else label}: {reason}")
        owed = [(who, trait) for who, trait in owed if trait not in contract.adds]
        owed += [(label, trait) for trait in sorted(contract.owes, key=str)]
        origins.update(dict.fromkeys(contract.adds, index))
        traits = (traits - contract.drops) | contract.adds
    return traits, owed


def _remedy(steps: Sequence[Technique], index: int, other: int | None, start: frozenset[Trait]) -> str:
    """Return what to do about a step that does not go with the result of the step ``other`` (None: with the model)."""
    step = steps[index]
    if other is None:
        return f"remove {step.name}, or start from another model"
    label = step_label(other, steps[other])
    moved = [*steps[:other], step, *steps[other:index]]
    try:
        _follow(moved, start, tries=False)
        _check_load_steps(moved)
    except RecipeError:
        return f"keep only one of {step_label(index, step)} and {label}"
    return f"move {step.name} before {label}, or remove one of them"


def step_label(index: int, step: Technique) -> str:
    """Return the name of a step in messages, counted from 1: ``"step 2 (gptq)"``."""
    return f"step {index + 1} ({step.name})"


def _preconditions(
    steps: Sequence[Technique], index: int, traits: frozenset[Trait], origins: Mapping[Trait, int]
) -> Iterator[tuple[int | None, str]]:
    """Yield for each trait that a step forbids or that an earlier one dropped: the number of that step, the reason.

    Raises ``RecipeError`` for a trait that is needed and that no step had.
    """
    step, label = steps[index], step_label(index, steps[index])
    contract = step.contract()
    for trait in sorted(contract.needs - traits, key=str):
        dropped = next((i for i in reversed(range(index)) if trait in steps[i].contract().drops), None)
        if dropped is None:
            raise RecipeError(f"{label} needs a model that {trait.meaning}: {_how_to_get(trait, 'before')}")
        after = steps[dropped].name
        yield dropped, f"{label} needs a model that {trait.meaning}; that no longer holds after {after}"
    for trait in sorted(contract.forbids & traits, key=str):
        loaded = "" if trait in origins else ", as the loaded one does"
        yield origins.get(trait), f"{label} does not support a model that {trait.meaning}{loaded}"


def _fragile(
    step: Technique, label: str, traits: frozenset[Trait], origins: Mapping[Trait, int]
) -> Iterator[tuple[int | None, str]]:
    """Yield the same for fragile traits that a step would destroy, and that its contract does not keep."""
    contract = step.contract()
    for trait in sorted(traits - contract.keeps - contract.drops, key=str):
        if trait.fragile and _rewrites_weights(step):
            loaded = "" if trait in origins else ", which the loaded model has"
            yield origins.get(trait), f"{label} rewrites weights and would destroy {trait}{loaded}"


def _check_load_steps(steps: Sequence[Technique]) -> None:
    """Raise ``RecipeError`` if a step that acts while the model is loaded is not in the first stage."""
    for number, stage in enumerate(split_stages(steps)[1:], start=2):
        for step in stage.steps:
            if step.implements("prepare_load"):
                index = next(index for index, other in enumerate(steps) if other is step)
                raise RecipeError(
                    f"move {step_label(index, step)} before the steps that train or calibrate: it acts while the model "
                    f"is loaded, but is in stage {number}"
                )


def _rewrites_weights(step: Technique) -> bool:
    return bool(step.phases() & {Phase.TRANSFORM, Phase.CALIBRATE}) or step.spec.trains


def _how_to_get(trait: Trait, where: str) -> str:
    """Return what to do about a missing trait: the techniques that add it, or the trait's own remedy."""
    names = [cls.spec.name for cls in catalogue().all() if trait in cls.spec.contract.adds]
    if names:
        return f"add {' or '.join(filter(None, [', '.join(names[:-1]), names[-1]]))} {where} it"
    return trait.remedy or f"use another recipe (no technique in the catalogue adds {trait})"
