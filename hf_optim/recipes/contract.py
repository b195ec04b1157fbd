"""What a technique states about itself: its paper, its phases, what it needs and what it leaves."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Set
from dataclasses import dataclass

from .traits import Trait


class Reload(enum.Enum):
    """How a checkpoint comes back in stock transformers (docs/checkpoints.md)."""

    STOCK_DENSE = "an ordinary checkpoint of the same class"
    STOCK_FORMAT = "a format that transformers reads natively (compressed-tensors)"
    STOCK_ARCH = "another class that ships in transformers"
    REMOTE_CODE = "own model code: stock transformers refuses without trust_remote_code"


class Phase(enum.IntEnum):
    """The parts of a stage, in the order in which the host runs them."""

    LOAD = 0
    TRANSFORM = 1
    CALIBRATE = 2
    TRAIN = 3


PHASE_OF_HOOK = {
    "prepare_load": Phase.LOAD,
    "transform_model": Phase.TRANSFORM,
    "calibrate": Phase.CALIBRATE,
    "training_callbacks": Phase.TRAIN,
    "training_loss": Phase.TRAIN,
    "parameter_groups": Phase.TRAIN,
}


# Training hooks that a callback cannot serve: they take OptimTrainer.
TRAINER_HOOKS = ("training_loss", "parameter_groups")


@dataclass(frozen=True)
class Paper:
    """The source of a technique: arXiv identifier (or DOI), title and year."""

    id: str
    title: str
    year: int

    @property
    def url(self) -> str:
        return f"https://arxiv.org/abs/{self.id}" if not self.id.startswith("10.") else f"https://doi.org/{self.id}"


@dataclass(frozen=True)
class Contract:
    """What a step asks of the model and what it leaves, over traits.

    Attributes:
        needs: traits that must hold before the step.
        forbids: traits that must not hold before the step.
        adds: traits that hold after it.
        drops: traits that it ends, knowingly.
        keeps: fragile traits that survive it.
        owes: traits that some *later* step must add, or the recipe is refused.
        owns: names of places that only one step of a recipe may fill (``"attention"``, ``"experts"``).
    """

    needs: Set[Trait] = frozenset()
    forbids: Set[Trait] = frozenset()
    adds: Set[Trait] = frozenset()
    drops: Set[Trait] = frozenset()
    keeps: Set[Trait] = frozenset()
    owes: Set[Trait] = frozenset()
    owns: Set[str] = frozenset()

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            object.__setattr__(self, f.name, frozenset(getattr(self, f.name)))


@dataclass(frozen=True)
class TechniqueSpec:
    """What ``@technique`` records about a class."""

    name: str
    family: str
    contract: Contract
    reload: Reload
    paper: Paper | None = None
    trains: bool = False
    summary: str = ""
