"""What a technique is: a frozen class whose fields are its configuration and whose methods are hooks.

Example::

    @technique("rtn", family="quantization", paper=Paper("1712.05877", "Quantization and Training ...", 2018),
               contract=Contract(needs={FLOAT_WEIGHTS}, adds={QUANTIZED}, drops={FLOAT_WEIGHTS}),
               reload=Reload.STOCK_FORMAT)
    class RTN(Technique):
        bits: int = option(8, low=2, high=8)

        @hookimpl
        def calibrate(self, run, scope): ...

An object of the class is at once the configuration, the pluggy plugin and the step of a recipe. Mutable state lives in
``run.state(step)``, never in the step: one step object may serve several runs.
"""

from __future__ import annotations

import dataclasses
import difflib
import enum
import math
import types
import typing
from collections.abc import Callable, Iterable, Set
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar, dataclass_transform

from .errors import RecipeError
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
class Spec:
    """What ``@technique`` records about a class."""

    name: str
    family: str
    contract: Contract
    reload: Reload
    paper: Paper | None = None
    trains: bool = False
    summary: str = ""


def option(
    default: Any = dataclasses.MISSING,
    *,
    low: float | None = None,
    high: float | None = None,
    below: float | None = None,
    above: float | None = None,
    choices: Iterable[Any] | None = None,
    infinite: bool = False,
) -> Any:
    """A field with a stated range: ``low <= value <= high``, ``above < value < below``, or one of ``choices``.

    Checked when the technique is constructed; ``None`` passes if the annotation admits it. A float must be finite,
    unless ``infinite`` says that infinity has a meaning; NaN never passes.
    """
    limits = {"low": low, "high": high, "below": below, "above": above, "choices": choices and tuple(choices)}
    metadata = {key: value for key, value in limits.items() if value is not None} | {"infinite": infinite}
    if isinstance(default, (list, dict, set)):
        raise TypeError("a technique is frozen: give a tuple as the default")
    return field(default=default, metadata=metadata)


class Technique:
    """Base of every technique. Subclasses are made with the decorator ``@technique``.

    Some things may depend on the fields, and are methods for that reason: ``contract()``, ``reload()``,
    ``needs_data()``, ``needs_whole_model()``, ``needs_teacher()`` and ``changes_architecture()``.
    """

    spec: ClassVar[Spec]

    def __post_init__(self) -> None:
        check_fields(self)
        self.validate()

    def validate(self) -> None:
        """Raise ``RecipeError`` for field values that do not go together. The single ranges are checked before."""

    def contract(self) -> Contract:
        """The traits this step needs, adds, drops, keeps and owes, with these fields."""
        return self.spec.contract

    def reload(self) -> Reload:
        """The reload level of a checkpoint whose last word is this step's."""
        return self.spec.reload

    def needs_data(self) -> bool:
        """Whether ``calibrate`` must see batches. True by default for a technique that implements the hook."""
        return Phase.CALIBRATE in self.phases()

    def needs_whole_model(self) -> bool:
        """Whether ``calibrate`` must see all blocks at once (a global ranking), whatever the driver."""
        return False

    def needs_teacher(self) -> bool:
        """Whether ``calibrate`` works towards what each block computed before this stage: see ``Scope.teacher``."""
        return False

    def phases(self) -> frozenset[Phase]:
        """The phases of a stage that this step takes part in, read off the hooks it implements."""
        return frozenset(phase for hook, phase in PHASE_OF_HOOK.items() if hasattr(type(self), hook))

    def changes_architecture(self) -> bool:
        """Whether the model behind this step has other modules or shapes than the configuration said before it.

        True by default for a technique that takes part in the phase of ``transform_model``; override it in one that
        makes the model smaller while it calibrates.
        """
        return Phase.TRANSFORM in self.phases()

    def implements(self, hook: str) -> bool:
        """Whether this technique has a hook of that name."""
        return hasattr(type(self), hook)

    @property
    def name(self) -> str:
        return self.spec.name

    @classmethod
    def sample(cls) -> Technique:
        """A step that does something, for tests: with its defaults, unless these leave to say what it is to do."""
        return cls()

    def to_dict(self) -> dict[str, Any]:
        """``{"technique": name, field: value, ...}`` with the fields that differ from their defaults."""
        changed, hints = {}, typing.get_type_hints(type(self))
        for f in dataclasses.fields(typing.cast(Any, self)):
            value = getattr(self, f.name)
            # Of a position in training, 1 is the first step and 1.0 the end, though they are equal.
            either = _admits(hints[f.name], 1) and _admits(hints[f.name], 0.5)
            same = value == f.default and not (either and type(value) is not type(f.default))
            if f.default is dataclasses.MISSING or not same:
                changed[f.name] = list(value) if isinstance(value, tuple) else value
        return {"technique": self.name, **changed}

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Technique:
        """Build a step from its fields. Unknown fields raise ``RecipeError`` with the nearest right name."""
        known = [f.name for f in dataclasses.fields(typing.cast(Any, cls))]
        for key in fields:
            if key not in known:
                hint = did_you_mean(key, known)
                raise RecipeError(f"{cls.spec.name} has no field {key!r}{hint} (it has {', '.join(known)})")
        values = {key: tuple(value) if isinstance(value, list) else value for key, value in fields.items()}
        return cls(**values)


T = TypeVar("T", bound=Technique)


@dataclass_transform(frozen_default=True, kw_only_default=True, eq_default=False, field_specifiers=(option, field))
def technique(
    name: str,
    *,
    family: str,
    contract: Contract,
    reload: Reload,
    paper: Paper | None = None,
    trains: bool = False,
) -> Callable[[type[T]], type[T]]:
    """Make a class a technique: a frozen, keyword-only dataclass that compares by identity.

    Args:
        name: the name in recipes; by convention the paper's own, in snake case.
        family: the folder of the catalogue it belongs to.
        contract: over traits; override the method ``contract`` where it depends on the fields.
        reload: reload level of its checkpoints; override the method ``reload`` where it depends on the fields.
        paper: the source.
        trains: True when the technique is nothing without training steps (a schedule, a distillation loss). Such a
            step makes its stage a training stage; a technique with training hooks and ``trains=False`` takes part
            in training when there is some.
    """

    def decorate(cls: type[T]) -> type[T]:
        # eq=False: pluggy refuses two equal plugins, and one technique may stand twice in a recipe.
        made = dataclass(frozen=True, eq=False, kw_only=True)(cls)
        summary = (cls.__doc__ or "").strip().split("\n")[0].rstrip(".")
        made.spec = Spec(name, family, contract, reload, paper, trains, summary)
        return made

    return decorate


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """``"; did you mean 'x'?"`` for the nearest of ``known``, or an empty string."""
    word, names = str(word), [str(name) for name in known]
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.7)
    # The beginning of a name is meant for it, however long it goes on.
    close = close or [name for name in names if len(word) > 2 and name.startswith(word)]
    return f"; did you mean {close[0]!r}?" if close else ""


def check_fields(step: Technique) -> None:
    """Check every field against its annotation and its stated range. Raises ``RecipeError``."""
    hints = typing.get_type_hints(type(step))
    for f in dataclasses.fields(typing.cast(Any, step)):
        value = getattr(step, f.name)
        if isinstance(value, list):
            value = tuple(value)
            object.__setattr__(step, f.name, value)
        if isinstance(value, int) and not isinstance(value, bool) and _admits(hints[f.name], 0.5):
            value = value if _admits(hints[f.name], 1) else float(value)
            object.__setattr__(step, f.name, value)
        if not _admits(hints[f.name], value):
            raise _misfit(f"{step.name}: {f.name}", value, hints[f.name])
        if value is not None:
            _check_finite(f"{step.name}: {f.name}", value, f.metadata.get("infinite", False))
            _check_range(f"{step.name}: {f.name}", value, f.metadata)


def _check_finite(what: str, value: Any, infinite: bool) -> None:
    for part in value if isinstance(value, tuple) else (value,):
        if isinstance(part, float) and not (math.isfinite(part) or (infinite and math.isinf(part))):
            raise RecipeError(f"{what} must be a finite number, not {value!r}")


def _check_range(what: str, value: Any, limits: typing.Mapping[str, Any]) -> None:
    if "choices" in limits and value not in limits["choices"]:
        raise _no_choice(what, value, limits["choices"])
    for key, sign, fine in (
        ("low", ">=", lambda v, b: v >= b),
        ("high", "<=", lambda v, b: v <= b),
        ("above", ">", lambda v, b: v > b),
        ("below", "<", lambda v, b: v < b),
    ):
        if key in limits and not fine(value, limits[key]):
            raise RecipeError(f"{what} must be {sign} {limits[key]}, not {value!r}")


def _misfit(what: str, value: Any, hint: Any) -> RecipeError:
    choices = choices_of(hint)
    if choices:
        return _no_choice(what, value, choices)
    remedy = f"; write [{value}]" if isinstance(value, str) and _admits(hint, (value,)) else ""
    return RecipeError(f"{what} must be {spell(hint)}, not {value!r}{remedy}")


def _no_choice(what: str, value: Any, choices: Iterable[Any]) -> RecipeError:
    choices = tuple(choices)
    hint = did_you_mean(value, choices) if isinstance(value, str) else ""
    return RecipeError(f"{what} must be one of {', '.join(map(repr, choices))}, not {value!r}{hint}")


def choices_of(hint: Any) -> tuple[Any, ...]:
    """The values that a ``Literal`` admits (with None, where that is an arm of a union); empty for other types."""
    if typing.get_origin(hint) is typing.Literal:
        return typing.get_args(hint)
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        arms = [(None,) if arm is type(None) else choices_of(arm) for arm in typing.get_args(hint)]
        found = tuple(value for arm in arms for value in arm)
        return found if all(arms) and found != (None,) else ()
    return ()


def _admits(hint: Any, value: Any) -> bool:
    origin = typing.get_origin(hint)
    if hint is Any:
        return True
    if hint is None or hint is type(None):
        return value is None
    if origin in (typing.Union, types.UnionType):
        return any(_admits(arm, value) for arm in typing.get_args(hint))
    if origin is typing.Literal:
        return value in typing.get_args(hint)
    if origin is tuple:
        arms = typing.get_args(hint)
        if not isinstance(value, tuple):
            return False
        if len(arms) == 2 and arms[1] is Ellipsis:
            return all(_admits(arms[0], v) for v in value)
        return len(arms) == len(value) and all(_admits(a, v) for a, v in zip(arms, value, strict=True))
    if origin is not None:
        return isinstance(value, origin)
    if hint in (int, float) and isinstance(value, bool):
        return False
    return isinstance(value, hint)


_PLURALS = {str: "names", int: "whole numbers", float: "numbers", bool: "booleans"}


def spell(hint: Any) -> str:
    """A type as people write it: ``int | None``, ``a list of names``."""
    if hint is None or hint is type(None):
        return "None"
    origin, arms = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " | ".join(map(spell, arms))
    if origin is typing.Literal:
        return " | ".join(map(repr, arms))
    if origin is tuple and len(arms) == 2 and arms[1] is Ellipsis:
        return f"a list of {_PLURALS.get(arms[0], spell(arms[0]))}"
    return hint.__name__ if isinstance(hint, type) and origin is None else str(hint).replace("typing.", "")
