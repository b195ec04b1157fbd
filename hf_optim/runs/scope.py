"""The part of a model that a calibrating step may change."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from ..toolkit import topology


@dataclass(frozen=True, eq=False)
class Example:
    """One batch as a block saw it before the stage changed anything: its arguments, and what it made of them.

    Tensors are where the model is; a step moves them to the device of the block. ``output`` is whatever the block
    returns: the hidden states, or a tuple that begins with them. ``rows`` is True for the rows of these hidden states
    that are not padding, bool in their shape without features; None if all rows count.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    output: Any
    rows: Tensor | None = None


@dataclass(frozen=True)
class Scope:
    """One block of a model, or the whole model. Names are always full names in ``model``.

    Attributes:
        name: the qualified name of ``module`` in ``model``; empty for the whole model.
        module: the block (or the model itself).
        model: the model that is being optimized.
        index, count: position among the scopes of this pass, for progress and messages.
        outside: names of modules inside ``module`` that are not part of the scope.
        teacher: for a step with ``needs_teacher()``, the block's reference inputs and outputs, batch by batch: those of
            the unmodified model, not those that the changed blocks before it produce.
    """

    name: str
    module: nn.Module
    model: PreTrainedModel
    index: int = 0
    count: int = 1
    outside: tuple[str, ...] = ()
    teacher: Sequence[Example] = ()

    @property
    def whole(self) -> bool:
        """True when the scope is the whole model."""
        return self.module is self.model

    def holds(self, name: str) -> bool:
        """Return True if the module ``name`` is inside the scope."""
        return _within(name, self.name) and not any(_within(name, other) for other in self.outside)

    @cached_property
    def linears(self) -> Mapping[str, nn.Module]:
        """Every ``nn.Linear`` and ``Conv1D`` of the scope by full name, in execution order where known."""
        return {name: m for name, m in topology.linears(self.model).items() if self.holds(name)}

    def select(
        self, targets: Iterable[str], skip: Iterable[str] = (), experts: bool = False, embeddings: bool = False
    ) -> dict[str, Any]:
        """Return the linears of this scope that match ``targets`` and not ``skip`` (see ``topology.select_layers``).

        Layers with a role (``topology.roles``) are left out unless a target names them: routers, gates of shared
        experts and output heads by an exact name; towers, projectors, poolers and other layers outside the blocks also
        by a name pattern that matches nothing else. Patterns are matched against the whole model, so that a pattern for
        one block is not an error in another. With ``experts`` the matrices of experts are included
        (``topology.ExpertLinear``), as ``model.layers.0.mlp.experts.3.down_proj``; with ``embeddings`` the
        ``nn.Embedding`` modules that a pattern names.
        """
        selected = topology.select_layers(self.model, targets, skip, experts=experts, embeddings=embeddings)
        return {name: layer for name, layer in selected.items() if self.holds(name)}


def _within(name: str, module: str) -> bool:
    return not module or name == module or name.startswith(module + ".")
