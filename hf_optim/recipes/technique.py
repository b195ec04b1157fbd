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
import typing
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar, dataclass_transform

from ..errors import RecipeError
from .contract import PHASE_OF_HOOK, Contract, Paper, Phase, Reload, TechniqueSpec
from .field_checks import _admits, check_fields, did_you_mean, option


class Technique:
    """Base of every technique. Subclasses are made with the decorator ``@technique``.

    Some things may depend on the fields, and are methods for that reason: ``contract()``, ``reload()``,
    ``needs_data()``, ``needs_whole_model()``, ``needs_teacher()`` and ``changes_architecture()``.
    """

    spec: ClassVar[TechniqueSpec]

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
    def for_testing(cls) -> Technique:
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
        made.spec = TechniqueSpec(name, family, contract, reload, paper, trains, summary)
        return made

    return decorate
