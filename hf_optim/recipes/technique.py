"""The base class and the decorator of techniques: frozen classes whose fields are configuration and methods hooks.

Example::

    @technique("rtn", family="quantization", paper=Paper("1712.05877", "Quantization and Training ...", 2018),
               contract=Contract(needs={FLOAT_WEIGHTS}, adds={QUANTIZED}, drops={FLOAT_WEIGHTS}),
               reload=Reload.STOCK_FORMAT)
    class RTN(Technique):
        bits: int = option(8, low=2, high=8)

        @hookimpl
        def calibrate(self, run, scope): ...

An object of the class is configuration, pluggy plugin and step of a recipe at once. Mutable state is kept in
``run.state(step)``, never in the step: one step object may be used in several runs.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar, dataclass_transform

from ..errors import RecipeError
from ..toolkit.distributed import RankSetting
from ..toolkit.topology import default_takes
from ..trust.bounds import shown
from .contract import PHASE_OF_HOOK, Contract, OnRanks, Paper, Parallel, Phase, Reload, TechniqueSpec
from .field_checks import admits, check_fields, did_you_mean, option
from .schemes import with_scheme

# The families of the catalogue.
FAMILIES = ("quantization", "pruning", "sparsity", "distillation", "moe", "attention", "adaptive", "runtime")
# The hooks that a technique may implement (``hookspecs``); modules implement ``register_techniques``.
HOOKS = (*PHASE_OF_HOOK, "register_kernels", "finalize_model", "export")
# The attribute by which ``recipes.hooks.hookimpl`` marks a method.
MARK = "hf_optim_impl"


class Technique:
    """Base of all techniques. Decorate subclasses with ``@technique``.

    Properties that may depend on the fields are methods, to be overridden: ``contract()``, ``reload()``,
    ``needs_data()``, ``needs_whole_model()``, ``needs_teacher()`` and ``changes_architecture()``.
    """

    spec: ClassVar[TechniqueSpec]

    def __post_init__(self) -> None:
        check_fields(self)
        self.validate()

    def validate(self) -> None:
        """Raise ``RecipeError`` for a wrong combination of field values. Each value has been checked before."""

    def contract(self) -> Contract:
        """Return the preconditions and effects of this step: see ``Contract``."""
        return self.spec.contract

    def reload(self) -> Reload:
        """Return the reload level that this step requires of the checkpoint."""
        return self.spec.reload

    def needs_data(self) -> bool:
        """Return True if ``calibrate`` needs batches; by default if the technique implements that hook."""
        return Phase.CALIBRATE in self.phases()

    def needs_whole_model(self) -> bool:
        """Return True if ``calibrate`` needs all blocks at once (for a global ranking), with any driver."""
        return False

    def takes(self, module: Any) -> bool:
        """Return True if ``targets`` may name this module: a linear layer, or a matrix of an expert.

        Override it in a technique whose targets are modules of other kinds. A pattern of ``targets`` or ``skip`` that
        matches none of them is an error.
        """
        return default_takes(module)

    def needs_teacher(self) -> bool:
        """Return True if ``calibrate`` needs the outputs of each block before this stage: see ``Scope.teacher``."""
        return False

    def rank_setting(self) -> RankSetting | None:
        """Return among how many ranks the step divides the layers of a model when it is loaded; None for one.

        Under a launcher, ``from_pretrained`` with a recipe of this step alone loads the part of each rank.
        """
        return None

    def training_teacher(self) -> str | None:
        """Return the teacher that training holds in memory: ``"self"``, a path or Hub id; None for none.

        For estimates of memory, as ``training_bytes`` is.
        """
        return None

    def training_bytes(self, width: int) -> float:
        """Return the bytes that training holds for each weight of the targeted layers, beside those of plain training.

        ``width`` is the bytes of a weight. For masks, copies of weights that the backward pass reads, learned noise.
        """
        return 0.0

    def loss_items(self, run: Any, inputs: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return, by the name of a term of ``training_loss``, how many items of a batch the term is a mean over.

        The host weights each term by its items' share of the optimizer step, over accumulated batches and ranks, so
        that the step is that of one large batch. It is called before the forward, with the batch alone. A count is

        - a number or a scalar tensor; 1 for a term that does not depend on the batch, such as a penalty on the weights,
          which then counts once for each step;
        - a list of these, for a term that is a vector of means;
        - a function that returns one of these, called only if the step has several batches: for counts that cost a
          forward.

        A term that is not named is taken as a mean over the items that have a label.
        """
        return {}

    def check_model(self, model: Any, label: str) -> None:
        """Raise ``ModelError`` or ``RecipeError`` if the step cannot work on ``model``.

        Called before any work, by ``hf-optim check`` as well, for what the step would otherwise refuse in the middle of
        it: a kind of layer that the model does not have, a size that does not fit. Linear layers that it cannot store
        in a stock format are refused without this.

        Args:
            model: a ``PreTrainedModel`` as the step finds it, unless an earlier step changes its architecture. Its
                weights may be on the meta device: shapes, names and the configuration are known, values are not.
            label: the beginning of the message, such as ``"step 2 (gptq)"``.
        """

    def model_after(self, model: Any, label: str) -> Any:
        """Return the model as a step that changes its architecture will leave it, without values, or None if unknown.

        It is called after ``check_model``, with the same arguments, so that the steps that follow can be checked before
        any work. ``model`` must not be changed.
        """
        return None

    def check_training(self, model: Any, stage: Sequence[Technique], labels: bool, label: str) -> None:
        """Raise ``ModelError`` or ``RecipeError`` if a stage cannot be trained as its recipe stands.

        For callers who neither change the model nor set anything before training, as ``hf-optim compress``.

        Args:
            model: as in ``check_model``.
            stage: the steps of the stage, this one among them.
            labels: the training data has labels, so that there is a task loss.
            label: the beginning of the message.
        """

    def offloading(self) -> Mapping[str, Any] | None:
        """Return the arguments of ``hf_optim.offload`` with which the finished model is offloaded; None if it is not.

        The host does it last, when the model is on its kernels; a recipe of this step alone never holds the whole
        model while it loads it.
        """
        return None

    def phases(self) -> frozenset[Phase]:
        """Return the phases of a stage that this step takes part in, derived from the hooks it implements."""
        return frozenset(phase for hook, phase in PHASE_OF_HOOK.items() if hasattr(type(self), hook))

    def changes_architecture(self) -> bool:
        """Return True if the step changes modules or shapes, so that the model no longer matches its configuration.

        True by default for a technique that implements ``transform_model``. Override it in a technique that makes the
        model smaller while it calibrates.
        """
        return Phase.TRANSFORM in self.phases()

    def code_bits(self) -> float | None:
        """Return the mean bits of the codes that a step makes of weights; None if it leaves them in floating point.

        For estimates. By default its field ``bits``, or 8 if it has none.
        """
        bits: float | None = getattr(self, "bits", 8)
        return bits

    def implements(self, hook: str) -> bool:
        """Return True if this technique implements the hook."""
        return hasattr(type(self), hook)

    @property
    def name(self) -> str:
        """Name of the technique, as in recipes."""
        return self.spec.name

    @classmethod
    def for_testing(cls) -> Technique:
        """Return a step for the conformance suite. Override it if the defaults do nothing or are slow."""
        return cls()

    def recompute(self, case: Any) -> dict[str, Any]:
        """Return every number that this step reports (``Run.report``), recomputed for the conformance suite.

        From the checkpoint, the model before it and forwards with hooks, never from what was reported. A number on the
        record that this does not return fails the suite.

        Args:
            case: a finished run on a small model (``hf_optim.testing.recompute.Case``).
        """
        return {}

    def to_dict(self) -> dict[str, Any]:
        """Return ``{"technique": name, field: value, ...}`` with the fields that differ from their defaults."""
        changed, hints = {}, typing.get_type_hints(type(self))
        for f in dataclasses.fields(typing.cast(Any, self)):
            value = getattr(self, f.name)
            # As a position in training, 1 is the first step and 1.0 the end, although they are equal.
            ambiguous = admits(hints[f.name], 1) and admits(hints[f.name], 0.5)
            same = value == f.default and not (ambiguous and type(value) is not type(f.default))
            if f.default is dataclasses.MISSING or not same:
                changed[f.name] = list(value) if isinstance(value, tuple) else value
        return {"technique": self.name, **changed}

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Technique:
        """Build a step from its fields. Raises ``RecipeError``, for an unknown field with the nearest known name.

        A technique that quantizes uniformly takes ``scheme`` in place of its fields (``recipes.schemes``).
        """
        known = [f.name for f in dataclasses.fields(typing.cast(Any, cls))]
        hints = typing.get_type_hints(cls)
        if "scheme" in fields and "scheme" not in known:
            fields = with_scheme(cls.spec.name, {name: hints[name] for name in known}, fields)
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
    parallel: Mapping[str, str] | None = None,
) -> Callable[[type[T]], type[T]]:
    """Turn a class into a technique: a frozen, keyword-only dataclass that compares by identity.

    Args:
        name: the name in recipes; by convention that of the paper, in snake case.
        family: the group in which ``hf-optim list`` shows it, one of ``FAMILIES``, or a lower-case word of your own.
        contract: preconditions and effects; override the method ``contract`` if it depends on the fields.
        reload: reload level of its checkpoints; override the method ``reload`` if it depends on the fields.
        paper: the source.
        trains: True if the technique has no effect without training steps (a schedule, a distillation loss). Such a
            step makes its stage a training stage. A technique with training hooks and ``trains=False`` takes part in
            training if the stage trains anyway.
        parallel: what a test shows of it on several ranks, or what it refuses there: a field of ``Parallel`` -> "yes",
            "no", "untried" or "-". What is not named follows from the hooks and the reload level: calibration and
            training are untried, and a model with code of its own cannot be cut, since no plan names its layers.

    Raises ``RecipeError`` for a family that is a misspelling of a known one, and for a method that has the name of a
    hook but is not marked ``@hookimpl``: the host would never call it.
    """
    _check_family(name, family)

    def decorate(cls: type[T]) -> type[T]:
        _check_hooks_marked(name, cls)
        # eq=False: pluggy rejects two equal plugins, but a recipe may have one technique twice.
        frozen = dataclass(frozen=True, eq=False, kw_only=True)(cls)
        summary = (cls.__doc__ or "").strip().split("\n")[0].rstrip(".")
        on_ranks = _parallel_of(name, frozen, reload, trains, parallel or {})
        frozen.spec = TechniqueSpec(name, family, contract, reload, paper, trains, summary, on_ranks)
        return frozen

    return decorate


def _parallel_of(
    name: str, cls: type[Technique], reload: Reload, trains: bool, declared: Mapping[str, str]
) -> Parallel:
    """Return what a technique says of several ranks, completed by what its hooks say."""
    trained = trains or any(hasattr(cls, hook) for hook, phase in PHASE_OF_HOOK.items() if phase is Phase.TRAIN)
    learns = cls.needs_teacher is not Technique.needs_teacher
    calibration = OnRanks.NO if learns else OnRanks.UNTRIED
    found = {
        "calibration": calibration if hasattr(cls, "calibrate") else OnRanks.NONE,
        "data": OnRanks.UNTRIED if trained else OnRanks.NONE,
        "fsdp": OnRanks.UNTRIED if trained else OnRanks.NONE,
        "tensor": OnRanks.NO if reload is Reload.REMOTE_CODE else OnRanks.UNTRIED,
        "expert": OnRanks.NO if reload is Reload.REMOTE_CODE else OnRanks.UNTRIED,
    }
    for key, value in declared.items():
        if key not in found or value not in [each.value for each in OnRanks]:
            raise RecipeError(
                f"technique {shown(name)}: parallel has {shown(key)}: {shown(value)}; it takes {', '.join(found)}, and "
                f"the values {', '.join(each.value for each in OnRanks)}"
            )
        found[key] = OnRanks(value)
    return Parallel(**found)


def _check_family(name: str, family: str) -> None:
    """Raise ``RecipeError`` for a family that is not a lower-case word, or that is nearly one of ``FAMILIES``."""
    if not isinstance(family, str) or not re.fullmatch(r"[a-z][a-z0-9_-]{0,39}", family):
        raise RecipeError(f"technique {shown(name)}: the family must be a lower-case word, not {shown(family)}")
    hint = did_you_mean(family, FAMILIES) if family not in FAMILIES else ""
    if hint:
        raise RecipeError(
            f"technique {shown(name)}: no family {family!r}{hint} (the families are {', '.join(FAMILIES)}; the name of "
            "a new one must differ more)"
        )


def _check_hooks_marked(name: str, cls: type) -> None:
    """Raise ``RecipeError`` if a method has the name of a hook without its mark: it would count, but not be called."""
    for hook in HOOKS:
        method = inspect.getattr_static(cls, hook, None)
        if method is not None and not hasattr(method, MARK):
            raise RecipeError(
                f"technique {shown(name)}: mark its method {hook} with @hookimpl, or the host never calls it"
            )
