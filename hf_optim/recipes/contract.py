"""What a technique declares about itself: its paper, its phases, its contract and its reload level."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Set
from dataclasses import dataclass

from .traits import Trait


class Reload(enum.Enum):
    """How stock transformers loads a checkpoint (docs/checkpoints.md)."""

    STOCK_DENSE = "an ordinary checkpoint of the same class"
    STOCK_FORMAT = "a format that transformers reads natively (compressed-tensors)"
    STOCK_ARCH = "another class that ships in transformers"
    REMOTE_CODE = "own model code: stock transformers refuses without trust_remote_code"


class Phase(enum.IntEnum):
    """The phases of a stage, in the order in which the host runs them."""

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


# Training hooks that a callback cannot replace: they need OptimTrainer.
TRAINER_HOOKS = ("training_loss", "parameter_groups")


@dataclass(frozen=True)
class Paper:
    """The source of a technique: arXiv identifier (or DOI), title and year."""

    id: str
    title: str
    year: int

    @property
    def url(self) -> str:
        """Address of the paper on arxiv.org or doi.org."""
        return f"https://arxiv.org/abs/{self.id}" if not self.id.startswith("10.") else f"https://doi.org/{self.id}"


@dataclass(frozen=True)
class Contract:
    """The preconditions and effects of a step, written in traits of the model.

    Attributes:
        needs: preconditions: traits that the model must have before the step.
        forbids: traits that the model must not have before the step.
        adds: postconditions: traits that the model has after the step.
        drops: traits that the step removes on purpose.
        keeps: fragile traits that survive the step.
        owes: traits that a *later* step must add: the step must be followed by one that adds them.
        owns: names of exclusive slots (``"attention"``, ``"experts"``), each of which one step of a recipe may fill.
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
    """The arguments of ``@technique``, and the first line of the class docstring as ``summary``."""

    name: str
    family: str
    contract: Contract
    reload: Reload
    paper: Paper | None = None
    trains: bool = False
    summary: str = ""
