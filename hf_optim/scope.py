"""The part of a model that a calibrating step may touch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

from torch import nn
from transformers import PreTrainedModel

from .toolkit import topology


@dataclass(frozen=True)
class Scope:
    """One block of a model, or all of it. Names are always the full names in ``model``.

    Attributes:
        name: the qualified name of ``module`` in ``model``; empty for the whole model.
        module: the block (or the model itself).
        model: the model that is being optimized.
        index, count: position among the scopes of this pass, for progress and messages.
        outside: names of modules that are not part of the scope although they lie inside ``module``.
    """

    name: str
    module: nn.Module
    model: PreTrainedModel
    index: int = 0
    count: int = 1
    outside: tuple[str, ...] = ()

    @property
    def whole(self) -> bool:
        """True when the scope is the whole model."""
        return self.module is self.model

    def holds(self, name: str) -> bool:
        """Whether the qualified ``name`` lies inside the scope."""
        return _within(name, self.name) and not any(_within(name, other) for other in self.outside)

    @cached_property
    def linears(self) -> Mapping[str, nn.Module]:
        """Every ``nn.Linear`` and ``Conv1D`` inside, by qualified name, in execution order where known."""
        return {name: m for name, m in topology.linears(self.model).items() if self.holds(name)}

    def select(self, targets: Iterable[str], skip: Iterable[str] = ()) -> dict[str, nn.Module]:
        """The linears of this scope that match ``targets`` and not ``skip`` (see ``topology.match``).

        Output heads are left out unless a target names them exactly. The patterns are matched against the whole
        model, so that a pattern for one block is no error in another.
        """
        targets = tuple(targets)
        everything = topology.linears(self.model)
        names = topology.match(everything, targets, tuple(skip))
        return {
            name: everything[name]
            for name in names
            if self.holds(name) and (name in targets or not topology.is_output_head(self.model, name))
        }


def _within(name: str, module: str) -> bool:
    return not module or name == module or name.startswith(module + ".")
