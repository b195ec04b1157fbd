"""A run: one recipe applied to one model. It owns the model, the state of every step, and the record."""

from __future__ import annotations

import enum
import logging
import weakref
from collections.abc import Callable, Iterable, Mapping
from types import SimpleNamespace
from typing import Any

import pluggy
import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from ..errors import ModelError, OptimError
from ..recipes.catalogue import catalogue
from ..recipes.composition import Stage
from ..recipes.config import OptimConfig
from ..recipes.technique import Technique
from ..recipes.traits import FLOAT_WEIGHTS, MOE, QUANTIZED, TIED_BLOCKS, Trait
from ..toolkit import topology
from ..toolkit.modules import tied_blocks
from .record import Record, public_recipe, versions
from .scope import Scope

log = logging.getLogger(__name__)

ATTRIBUTE = "_hf_optim_run"


class StageState(enum.Enum):
    """How far the current stage of a run is. It changes after the work, never before (``lifecycle.stages``)."""

    PENDING = "pending"
    ENTERED = "entered"  # transformed and calibrated; a stage that trains now waits for that
    TRAINING = "training"
    FAILED = "failed"


class Run:
    """The state of one optimization.

    Attributes:
        model: the current model; a ``transform_model`` hook may replace it. A run owns it only while stages run: the
            model owns its run, so that deleting the model frees both at once (``lend_model``).
        config: the model's configuration, which exists during ``prepare_load``, before the model does.
        recipe: what to do.
        record: what was done, written as ``hf_optim.json``.
        traits: the current traits of the model.
        masks: parameter name -> bool tensor of the parameter's shape, True = kept. They are kept here, never in the
            state dict; the host re-applies them after every optimizer step.
        nm_patterns: parameter name -> ``(keep, group)`` for parameters whose mask follows an N:M pattern
            (along the input dimension).
        pending_zeros: parameter name -> entry of ``Record.pruned``: weights that an earlier recipe pruned, and whose
            masks are made once they have values (``runs.stored_zeros``).
        bit_plan: module name -> bits of a weight, if a step assigns them; steps that quantize follow it (``bits_of``).
        source: the calibration data of the caller, in any form; None for what the recipe names.
        data: the calibration batches (``data.calibration_set.CalibrationData``), or None.
        tokenizer: the tokenizer or processor of the model, if one was given or found.
        stage_index: index of the current stage; ``len(stages)`` once all are complete.
        stage_state: how far the current stage is.
        failure: what failed, if the current stage has failed; empty otherwise.
        loading: True while ``from_pretrained`` loads the weights.
        loaded_class: the class that ``from_pretrained`` was called of; None for a model that was in memory.
        roles: index of a step -> layer -> its role in the model as the step finds it.
        left_alone: index of a step -> role -> names of the layers that it leaves alone because of that role.
        dense: the caller will save the dense equivalent of a compressed model, so its format need not be loadable.
        announce: log how a model that waits for training is trained; False for a caller that trains it itself.
        trained_alone: an optimizer has changed its weights without the callbacks of the run.
        steps_checked: how many steps are known to work on the model, with a result that can be loaded.
        journal: keeps completed blocks, so that a killed run can resume (``BlockJournal``), or None.
    """

    def __init__(self, recipe: OptimConfig, config: PretrainedConfig, manager: pluggy.PluginManager) -> None:
        self.recipe = recipe
        self.config = config
        packages = catalogue().packages(step.spec.name for step in recipe.steps)
        self.record = Record(
            recipe=public_recipe(recipe.to_dict()), versions=packages | versions(), reload=recipe.reload.name
        )
        self.traits: set[Trait] = set()
        self.masks: dict[str, torch.Tensor] = {}
        self.nm_patterns: dict[str, tuple[int, int]] = {}
        self.pending_zeros: dict[str, dict[str, Any]] = {}
        self.bit_plan: dict[str, int] = {}
        self.source: Any = None
        self.data: Any = None
        self.tokenizer: Any = None
        self.device: torch.device | None = None
        self.stages: list[Stage] = recipe.stages
        self.stage_index = 0
        self.stage_state = StageState.PENDING
        self.failure = ""
        self.loading = False
        self.loaded_class: type | None = None
        self.dense = False
        self.announce = True
        self.trained_alone = False
        self.steps_checked = 0
        self.journal: Any = None
        self._model: PreTrainedModel | None = None
        self._lent: weakref.ref[PreTrainedModel] | None = None
        self._states: dict[int, SimpleNamespace] = {}
        self.roles: dict[int, dict[str, str]] = {}
        self.left_alone: dict[int, dict[str, set[str]]] = {}
        self._covered: dict[int, tuple[set[str], dict[str, set[str]]]] = {}
        self.manager = manager

    # -- the model ------------------------------------------------------------------------------------------------
    @property
    def model(self) -> PreTrainedModel:
        """The current model. Raises ``ModelError`` before it is loaded, and after its owner has deleted it."""
        model = self._current_model()
        if model is None and self._lent is not None:
            raise ModelError(
                "the model of this run no longer exists: a run does not keep its model alive, so keep a reference to "
                "the model that optimize or from_pretrained returned for as long as you use the run"
            )
        if model is None:
            raise ModelError("the model is not loaded yet: during prepare_load there is only run.config")
        return model

    @model.setter
    def model(self, model: PreTrainedModel) -> None:
        former = self._current_model()
        if former is not None and former is not model:
            _detach(former)
        self._model = model
        self.config = model.config
        object.__setattr__(model, ATTRIBUTE, _Link(self))

    def lend_model(self) -> PreTrainedModel:
        """Return the model to its owner: from now on the run refers to it only weakly.

        A strong reference would form a cycle with the one from the model to its run, and the memory of a deleted model
        would be kept until the garbage collector runs.
        """
        model = self.model
        self._lent, self._model = weakref.ref(model), None
        return model

    def _current_model(self) -> PreTrainedModel | None:
        if self._model is not None:
            return self._model
        return self._lent() if self._lent is not None else None

    # -- steps ----------------------------------------------------------------------------------------------------
    def state(self, step: Technique) -> SimpleNamespace:
        """Return the mutable state of a step in this run; empty at first."""
        return self._states.setdefault(id(step), SimpleNamespace())

    def drop_inputs(self) -> None:
        """Let go of what only the stages of the run needed: its data, and tensors and modules in the states of steps.

        Called once the run has finished or failed. Of a state, plain values (JSON types) stay for ``export``; ``masks``
        stay since later training and saving need them.
        """
        self.source = self.data = None
        if (model := self._current_model()) is not None:
            topology.shorten_example(model)
        for state in self._states.values():
            for key in [key for key, value in vars(state).items() if not is_plain(value)]:
                delattr(state, key)

    def label(self, step: Technique) -> str:
        """Return ``"step 2 (gptq)"``, for messages."""
        return f"step {self.index(step) + 1} ({step.name})"

    def index(self, step: Technique) -> int:
        """Return the place of a step in the recipe, from 0."""
        return next(i for i, s in enumerate(self.recipe.steps) if s is step)

    @property
    def stage(self) -> Stage | None:
        """The current stage, or None once all stages are complete."""
        return self.stages[self.stage_index] if self.stage_index < len(self.stages) else None

    @property
    def stage_entered(self) -> bool:
        """True once the current stage has been transformed and calibrated: it waits for training, or is training."""
        return self.stage_state in (StageState.ENTERED, StageState.TRAINING)

    @property
    def finished(self) -> bool:
        """True once all stages are complete."""
        return self.stage is None

    def call(self, hook: str, **arguments: Any) -> list[Any]:
        """Call a hook on the steps of the current stage in recipe order; return the results that are not None."""
        return self.call_on(self.stage.steps if self.stage else (), hook, **arguments)

    def call_on(self, steps: Iterable[Technique], hook: str, **arguments: Any) -> list[Any]:
        """Call a hook on these steps in recipe order; return the results that are not None."""
        chosen = {id(step) for step in steps}
        others = [plugin for plugin in self.manager.get_plugins() if id(plugin) not in chosen]
        return self.manager.subset_hook_caller(hook, others)(run=self, **arguments)

    def bits_of(self, name: str, default: int) -> int:
        """Return the bits for the weight of the module ``name``: those of the bit plan, else ``default``."""
        return self.bit_plan.get(name, default)

    # -- what steps report ----------------------------------------------------------------------------------------
    def report(self, step: Technique, **metrics: Any) -> None:
        """Put metrics of a step (JSON types) on the record; they appear on the card.

        Calls accumulate: a mapping is merged into the one reported before under the same name, any other value
        replaces it.
        """
        entry = self.record.steps.setdefault(str(self.index(step)), {"technique": step.name})
        for name, value in metrics.items():
            former = entry.get(name)
            entry[name] = {**former, **value} if isinstance(former, dict) and isinstance(value, Mapping) else value

    def reported(self, step: Technique) -> dict[str, Any]:
        """Return what a step has reported; empty if it has reported nothing."""
        return self.record.steps.get(str(self.index(step)), {})

    def warn(self, step: Technique, sentence: str) -> None:
        """Log a warning about a step, and note it on the card."""
        sentence = f"{self.label(step)}: {sentence}"
        self.record.note(sentence)
        log.warning(sentence)

    def cover(self, step: Technique, names: Iterable[str], skipped: Mapping[str, Iterable[str]] | None = None) -> None:
        """Record which modules a step worked on (full names), and which it skipped, by reason.

        May be called once per scope; calls accumulate. The host logs the coverage and puts it on the record.
        """
        covered = self._covered.setdefault(self.index(step), (set(), {}))
        covered[0].update(names)
        for reason, left_out in (skipped or {}).items():
            covered[1].setdefault(reason, set()).update(left_out)

    def covered(self, step: Technique) -> tuple[set[str], dict[str, set[str]]] | None:
        """Return the modules recorded by ``cover`` and the skipped ones by reason, or None if there are none."""
        return self._covered.get(self.index(step))

    def select(
        self, targets: Iterable[str], skip: Iterable[str] = (), embeddings: bool = False, experts: bool = False
    ) -> dict[str, Any]:
        """Return the linears of the whole model that match ``targets`` and not ``skip`` (see ``Scope.select``).

        With ``embeddings`` also the embeddings that a pattern names, with ``experts`` the matrices of experts.
        """
        return Scope("", self.model, self.model).select(targets, skip, experts=experts, embeddings=embeddings)

    def rename(self, renamed: Callable[[str], Iterable[str]]) -> None:
        """Rename everything that the run keeps by name of a module or parameter.

        That is ``masks``, ``nm_patterns``, ``pending_zeros``, ``bit_plan``, and the coverage of earlier steps. A step
        whose ``transform_model`` or ``calibrate`` moves, removes or copies layers calls it before its own ``cover``.

        Args:
            renamed: maps a name to the names after the change: none if the module was removed, several if it was
                copied.
        """
        tables: list[dict[str, Any]] = [self.masks, self.nm_patterns, self.pending_zeros, self.bit_plan]
        for table in tables:
            moved = {new: value for name, value in table.items() for new in renamed(name)}
            table.clear()
            table.update(moved)
        for step in self.recipe.steps:
            names, skipped = self.covered(step) or (set(), {})
            alone, roles = self.left_alone.get(self.index(step), {}), self.roles.get(self.index(step), {})
            moved_roles = {new: role for name, role in roles.items() for new in renamed(name)}
            roles.clear()
            roles.update(moved_roles)
            for modules in (names, *skipped.values(), *alone.values()):
                renamed_modules = {new for name in modules for new in renamed(name)}
                modules.clear()
                modules.update(renamed_modules)


class _Link:
    """Links a model to its run, but not its copies: a deep copy or a pickle of the model has no run."""

    is_bookkeeping = True  # no forward depends on it (``topology.trace_cache``)

    def __init__(self, run: Run | None) -> None:
        self.run = run

    def __deepcopy__(self, memo: Any) -> _Link:
        return _Link(None)

    def __reduce__(self) -> Any:
        return (_Link, (None,))


def run_of(model: nn.Module) -> Run:
    """Return the run of an optimized model, also through peft and DDP wrappers. Raises ``OptimError`` without one."""
    run = find_run(model)
    if run is None:
        raise OptimError(
            f"this {type(model).__name__} was not optimized by hf_optim: load it with "
            "from_pretrained(..., optim_config=...) or call hf_optim.optimize(model, recipe) first"
        )
    return run


def find_run(model: Any) -> Run | None:
    """Return the run of a model, or None."""
    seen: set[int] = set()
    while model is not None and id(model) not in seen:
        seen.add(id(model))
        link = getattr(model, "__dict__", {}).get(ATTRIBUTE)
        if link is not None and link.run is not None:
            return link.run
        base = getattr(model, "get_base_model", None)
        model = base() if callable(base) else getattr(model, "module", None)
    return None


def is_plain(value: Any) -> bool:
    """Return True for JSON types and containers of them: they hold no memory to speak of, and survive a resume."""
    if isinstance(value, dict):
        return all(isinstance(key, str) and is_plain(inner) for key, inner in value.items())
    if isinstance(value, (list, tuple)):
        return all(map(is_plain, value))
    return value is None or isinstance(value, (bool, int, float, str))


def require_sound(run: Run) -> None:
    """Raise ``OptimError`` if a stage of the run has failed: the model is partly changed."""
    if run.stage_state is StageState.FAILED:
        raise OptimError(
            f"{run.failure}. The model is partly changed and can neither go on nor be saved: load it again, fix "
            "the cause and start over (hf_optim.release(model) drops the recipe and keeps the model as it is)"
        )


def _detach(model: PreTrainedModel) -> None:
    model.__dict__.pop(ATTRIBUTE, None)


def traits_of_config(config: PretrainedConfig) -> set[Trait]:
    """Return the traits of a model before optimization, as far as its configuration determines them."""
    traits = {QUANTIZED} if getattr(config, "quantization_config", None) is not None else {FLOAT_WEIGHTS}
    if isinstance(getattr(config, tied_blocks.FIELD, None), Mapping):
        traits.add(TIED_BLOCKS)
    return traits


def has_codes(model: nn.Module) -> bool:
    """Return True if a module of the model holds quantized weights."""
    # Modules of remote code that hold codes have the attribute holds_codes.
    return any(
        getattr(module, "quantization_scheme", None) is not None or getattr(module, "holds_codes", False)
        for module in model.modules()
    )


def traits_of(model: nn.Module) -> set[Trait]:
    """Return the traits of a model that has no run yet."""
    config = getattr(model, "config", None)
    quantized = getattr(config, "quantization_config", None) is not None or has_codes(model)
    traits = {QUANTIZED} if quantized else {FLOAT_WEIGHTS}
    if topology.has_experts(model):
        traits.add(MOE)
    if tied_blocks.has_steps(model):
        traits.add(TIED_BLOCKS)
    return traits
