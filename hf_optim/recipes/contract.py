"""What a technique declares about itself: its paper, its phases, its contract and its reload level."""

from __future__ import annotations

import dataclasses
import difflib
import enum
from collections.abc import Set
from dataclasses import dataclass

from ..errors import RecipeError
from ..trust.bounds import shown
from . import traits
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
        drops: traits that the step removes.
        keeps: fragile traits that the step preserves. A step that rewrites weights destroys all others.
        owes: required later steps, as the traits that they must add: with ``owes={QUANTIZED}`` the step must be
            followed by a quantization step.
        owns: names of exclusive slots (``"attention"``, ``"experts"``), each of which one step of a recipe may fill.

    Raises ``RecipeError`` for a value that is not a ``Trait`` (for ``owns``: not a name).
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
            given = getattr(self, f.name)
            values = frozenset((given,) if isinstance(given, (str, Trait)) else given)
            wrong = next((v for v in values if not isinstance(v, str if f.name == "owns" else Trait)), None)
            if wrong is not None:
                what = f"{shown(wrong)} is not the name of a slot" if f.name == "owns" else _not_a_trait(wrong)
                raise RecipeError(f"Contract({f.name}=...): {what}")
            object.__setattr__(self, f.name, values)


def _not_a_trait(value: object) -> str:
    """Return what is wrong with a value that should be a trait, with the trait of that name if there is one."""
    names = {str(trait): key for key, trait in vars(traits).items() if isinstance(trait, Trait)}
    close = difflib.get_close_matches(str(value)[:60].lower().replace("_", "-"), names, n=1)
    hint = f"; did you mean traits.{names[close[0]]}?" if close else ""
    return f"{shown(value)} is not a Trait{hint} (the traits are objects of hf_optim.traits)"


class OnRanks(enum.Enum):
    """What is known of a technique on several ranks, for one way of using them."""

    YES = "yes"  # a test shows that several ranks give the result of one
    UNTRIED = "untried"  # nothing is in its way, and no test shows it
    NO = "no"  # refused
    NONE = "-"  # there is nothing to divide


@dataclass(frozen=True)
class Parallel:
    """What several ranks can share of a technique's work, and of the model that it leaves.

    Attributes:
        calibration: ranks share the calibration data; statistics are reduced over them.
        data: ranks train on their own batches (DDP).
        fsdp: ranks train with weights in shards (FSDP2).
        tensor: the linear layers of the result are cut over ranks when it is loaded (``parallelism``).
        expert: the experts of the result are divided among ranks when it is loaded.
    """

    calibration: OnRanks = OnRanks.NONE
    data: OnRanks = OnRanks.NONE
    fsdp: OnRanks = OnRanks.NONE
    tensor: OnRanks = OnRanks.UNTRIED
    expert: OnRanks = OnRanks.UNTRIED

    def to_dict(self) -> dict[str, str]:
        """Return the fields as words."""
        return {f.name: getattr(self, f.name).value for f in dataclasses.fields(self)}


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
    parallel: Parallel = Parallel()
