"""Whether the steps of a recipe compose, and where its stages end. Nothing here loads a model."""

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
        """True when some step of the stage is nothing without training."""
        return any(step.spec.trains for step in self.steps)

    @property
    def calibrates(self) -> bool:
        return any(Phase.CALIBRATE in step.phases() for step in self.steps)

    @property
    def needs_data(self) -> bool:
        """Whether some step must see calibration batches."""
        return any(Phase.CALIBRATE in step.phases() and step.needs_data() for step in self.steps)

    def __str__(self) -> str:
        return "[" + ", ".join(step.name for step in self.steps) + "]"


def split_stages(steps: Sequence[Technique]) -> list[Stage]:
    """Cut a recipe into stages: a new one begins where a step's work comes before work that is already behind it.

    The phases of a stage run in one order (load, transform, calibrate, train). A step that calibrates cannot join
    a stage that trains before it, nor a step that transforms one that has calibrated.
    """
    stages: list[list[Technique]] = []
    reached = Phase.LOAD
    for step in steps:
        phases = _binding_phases(step)
        if not stages or min(phases) < reached:
            stages.append([])
            reached = Phase.LOAD
        stages[-1].append(step)
        reached = max(reached, *phases)
    return [Stage(tuple(members)) for members in stages]


def _binding_phases(step: Technique) -> frozenset[Phase]:
    # A step that merely takes part in training (spec.trains False) does not make its stage a training stage.
    phases = step.phases() - ({Phase.TRAIN} if not step.spec.trains else set())
    return frozenset(phases - {Phase.LOAD}) or frozenset({Phase.TRANSFORM})


def compose(steps: Sequence[Technique], traits: frozenset[Trait]) -> frozenset[Trait]:
    """The traits of the result. Raises ``RecipeError`` naming the step, the trait and the remedy."""
    owners: dict[str, str] = {}
    givers: dict[Trait, str] = {}
    debts: list[tuple[str, Trait]] = []
    for position, step in enumerate(steps):
        label = f"step {position + 1} ({step.name})"
        contract = step.contract()
        for trait in sorted(contract.needs - traits, key=str):
            raise RecipeError(f"{label} needs a model that {trait.meaning}; {_why_missing(trait, steps[:position])}")
        for trait in sorted(contract.forbids & traits, key=str):
            giver = givers.get(trait, "the model as loaded")
            raise RecipeError(
                f"{label} cannot work on a model that {trait.meaning}, which comes from {giver}; "
                f"put {step.name} before it, or leave one of them out"
            )
        for place in sorted(contract.owns):
            if place in owners:
                raise RecipeError(f"{label} and {owners[place]} both set {place!r}; leave one of them out")
            owners[place] = label
        for trait in sorted(traits - contract.keeps - contract.drops, key=str):
            if trait.fragile and _rewrites_weights(step):
                raise RecipeError(
                    f"{label} rewrites weights and would destroy {trait} ({givers.get(trait, 'the model as loaded')}); "
                    f"put {step.name} before the step that makes it"
                )
        debts = [(who, trait) for who, trait in debts if trait not in contract.adds]
        debts += [(label, trait) for trait in sorted(contract.owes, key=str)]
        givers.update(dict.fromkeys(contract.adds, label))
        traits = (traits - contract.drops) | contract.adds
    for who, trait in debts:
        raise RecipeError(
            f"{who} owes a later step that adds {trait} (after it the model must be one that {trait.meaning}); "
            f"{_remedy(trait)}"
        )
    for position, stage in enumerate(split_stages(steps)[1:]):
        for step in stage.steps:
            if step.implements("prepare_load"):
                raise RecipeError(
                    f"{step.name} acts while the model is loaded, but stands in stage {position + 2}; "
                    "put it before the steps that train or calibrate"
                )
    return traits


def _rewrites_weights(step: Technique) -> bool:
    return bool(step.phases() & {Phase.TRANSFORM, Phase.CALIBRATE}) or step.spec.trains


def _why_missing(trait: Trait, before: Sequence[Technique]) -> str:
    for step in reversed(before):
        if trait in step.contract().drops:
            return f"{step.name} before it ended that; move {step.name} after it"
    return _remedy(trait)


def _remedy(trait: Trait) -> str:
    givers = [cls.spec.name for cls in catalogue().all() if trait in cls.spec.contract.adds]
    if givers:
        return f"add {' or '.join(givers)}"
    return trait.remedy or f"no technique in the catalogue adds {trait}"
