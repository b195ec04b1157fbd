"""Composition of the steps of a recipe: check their contracts, and split them into stages. No model is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import RecipeError
from .catalogue import catalogue
from .contract import Phase
from .technique import Technique
from .traits import Trait


@dataclass(frozen=True)
class Stage:
    """Steps that go through the lifecycle together: load, transform, calibrate, train, finalize."""

    steps: tuple[Technique, ...]

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
    return [Stage(tuple(members)) for members in stages]


def _ordering_phases(step: Technique) -> frozenset[Phase]:
    # A step that takes part in training but does not need it (spec.trains is False) makes no training stage.
    phases = step.phases() - ({Phase.TRAIN} if not step.spec.trains else set())
    return frozenset(phases - {Phase.LOAD}) or frozenset({Phase.TRANSFORM})


def compose(steps: Sequence[Technique], traits: frozenset[Trait]) -> frozenset[Trait]:
    """Apply the contracts of the steps to a model with these traits; return the traits of the result.

    Raises ``RecipeError``, which names what to change, the step and the trait.
    """
    owners: dict[str, str] = {}
    origins: dict[Trait, str] = {}
    owed: list[tuple[str, Trait]] = []
    for index, step in enumerate(steps):
        label = step_label(index, step)
        contract = step.contract()
        _check_preconditions(step, label, traits, origins, steps[:index])
        for slot in sorted(contract.owns):
            if slot in owners:
                raise RecipeError(f"keep only one of {label} and {owners[slot]}: both set {slot!r}")
            owners[slot] = label
        _check_fragile(step, label, traits, origins)
        owed = [(who, trait) for who, trait in owed if trait not in contract.adds]
        owed += [(label, trait) for trait in sorted(contract.owes, key=str)]
        origins.update(dict.fromkeys(contract.adds, label))
        traits = (traits - contract.drops) | contract.adds
    for who, trait in owed:
        raise RecipeError(
            f"{who} must be followed by {trait.step or f'a step that adds {trait}'}: {_how_to_get(trait, 'after')}"
        )
    _check_load_steps(steps)
    return traits


def step_label(index: int, step: Technique) -> str:
    """Return the name of a step in messages, counted from 1: ``"step 2 (gptq)"``."""
    return f"step {index + 1} ({step.name})"


def _check_preconditions(
    step: Technique, label: str, traits: frozenset[Trait], origins: dict[Trait, str], before: Sequence[Technique]
) -> None:
    """Raise ``RecipeError`` if the model lacks a trait that a step needs, or has one that it forbids."""
    contract = step.contract()
    for trait in sorted(contract.needs - traits, key=str):
        dropped = next((other.name for other in reversed(before) if trait in other.contract().drops), None)
        if dropped is not None:
            raise RecipeError(
                f"move {step.name} before {dropped}: {label} needs a model that {trait.meaning}; that no longer "
                f"holds after {dropped}"
            )
        raise RecipeError(f"{label} needs a model that {trait.meaning}: {_how_to_get(trait, 'before')}")
    for trait in sorted(contract.forbids & traits, key=str):
        reason = f"{label} does not support a model that {trait.meaning}"
        if trait in origins and trait in contract.adds:
            raise RecipeError(f"keep only one of {label} and {origins[trait]}: {reason}")
        if trait in origins:
            raise RecipeError(f"move {step.name} before {origins[trait]}, or remove one of them: {reason}")
        raise RecipeError(f"remove {step.name}, or start from another model: {reason}, as the loaded one does")


def _check_fragile(step: Technique, label: str, traits: frozenset[Trait], origins: dict[Trait, str]) -> None:
    """Raise ``RecipeError`` if a step would destroy a fragile trait that its contract does not keep."""
    contract = step.contract()
    for trait in sorted(traits - contract.keeps - contract.drops, key=str):
        if trait.fragile and _rewrites_weights(step):
            if trait in origins:
                remedy = f"move {step.name} before {origins[trait]}"
            else:
                remedy = f"remove {step.name}, or start from another model"
            raise RecipeError(f"{remedy}: {label} rewrites weights and would destroy {trait}")


def _check_load_steps(steps: Sequence[Technique]) -> None:
    """Raise ``RecipeError`` if a step that acts while the model is loaded is not in the first stage."""
    for number, stage in enumerate(split_stages(steps)[1:], start=2):
        for step in stage.steps:
            if step.implements("prepare_load"):
                raise RecipeError(
                    f"move {step.name} before the steps that train or calibrate: it acts while the model is loaded, "
                    f"but is in stage {number}"
                )


def _rewrites_weights(step: Technique) -> bool:
    return bool(step.phases() & {Phase.TRANSFORM, Phase.CALIBRATE}) or step.spec.trains


def _how_to_get(trait: Trait, where: str) -> str:
    """Return what to do about a missing trait: the techniques that add it, or the trait's own remedy."""
    names = [cls.spec.name for cls in catalogue().all() if trait in cls.spec.contract.adds]
    if names:
        return f"add {' or '.join(filter(None, [', '.join(names[:-1]), names[-1]]))} {where} it"
    return trait.remedy or f"use another recipe (no technique in the catalogue adds {trait})"
